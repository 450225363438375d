"""A run in small: some clips, light and heavy ones, are labelled and trained on in a scratch folder, and what that takes is measured."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from vkd import autoscaler, cluster, labelling, phased, planning, resources, schema, training
from vkd import run as run_files
from vkd.checkpoint import Position
from vkd.efficiency import STUDENT
from vkd.feeding import Feeder, Labels
from vkd.forecast import StageCost, group_of
from vkd.label_report import LabelReport
from vkd.label_table import REFINED
from vkd.loop import RoundReport
from vkd.placement import total
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk, chunks_of
from vkd.run import Run
from vkd.schema import TRAIN
from vkd.stages import DECODE
from vkd.store import files
from vkd.store.labelset import LabelSet

MIN_CLIPS, MIN_CHUNKS, MIN_CHUNK_SIZE = 8, 6, 4
STEPS, WARM_UP_STEPS = 24, 4


class SamplePlan(Plan):
    """Some examples of a plan, as a plan of their own; all of them train."""

    def __init__(self, plan: Plan, table: pa.Table) -> None:
        self.__dict__ |= copy.copy(plan).__dict__
        self.table, self.num_examples, self._classes = table, table.num_rows, plan.classes()
        self.chunk_size = min(plan.chunk_size, max(MIN_CHUNK_SIZE, table.num_rows // MIN_CHUNKS))
        self.chunks = chunks_of("sample", table.num_rows, self.chunk_size)

    def examples(self, chunk: Chunk) -> pa.Table:
        return self.table.slice(chunk.index * self.chunk_size, self.chunk_size)

    def rows(self, split: str) -> list[list[int]]:
        return [list(range(self.examples(chunk).num_rows)) for chunk in self.chunks]

    def classes(self) -> list[str]:
        return self._classes


@dataclass(frozen=True)
class Trial:
    """What a run in small took: an example of each stage, all that is neither labelling nor training, bytes of an example."""

    stages: list[StageCost]
    student: StageCost
    start_s: float
    num_clips: int
    num_rejected: int
    label_bytes: float
    frame_bytes: float
    cores: dict[str, float]
    nodes: dict[str, int]


def drawn(plan: Plan, fraction: float) -> SamplePlan:
    """A systematic sample: examples in the order of pixels times seconds, every n-th of them, mixed again; at least a few."""
    table = pa.concat_tables([plan.examples(chunk) for chunk in plan.chunks], promote_options="permissive")
    count = min(table.num_rows, max(MIN_CLIPS, int(fraction * table.num_rows)))
    by_work = np.argsort(_work(table), kind="stable")
    chosen = by_work[((np.arange(count) + 0.5) * table.num_rows / count).astype(int)]
    return SamplePlan(plan, table.take(pa.array(np.random.default_rng(0).permutation(chosen), pa.int64())))


def _work(table: pa.Table) -> np.ndarray:
    """What decoding an example costs, roughly: pixels times seconds; those of unknown size come first."""

    def column(name: str) -> np.ndarray:
        values = table[name] if name in table.column_names else pa.nulls(table.num_rows, pa.float64())
        return np.asarray(pc.fill_null(values.cast(pa.float64()), 0.0))

    pixels: np.ndarray = column(schema.WIDTH_PX) * column(schema.HEIGHT_PX)
    work: np.ndarray = pixels * np.maximum(column(schema.END_S) - column(schema.START_S), 0.1)
    return work


def measure(run: Run, plan: Plan, fraction: float, progress: Callable[[LabelReport], None]) -> Trial:
    """Label a sample and train on it as the run would, in a scratch folder of its output that goes again."""
    sample = drawn(plan, fraction)
    with _scratch(run) as small:
        started_s, first_s = time.monotonic(), list[float]()

        def told(report: LabelReport) -> None:
            first_s.append(time.monotonic() - started_s - sum(report.busy_s.values()))  # the first chunk has its own share of that
            progress(report)

        with cluster.session(run.compute):
            apart_s = 0.0 if run.labels.mode == "stored" else _seconds_of_an_actor()
            started_s += apart_s
            report = labelling.label_plan(small, sample, told)
            pools = resources.requested(run.compute, list(run.recipe.teachers))
            stages = _stages(report, pools)
            student = _student(small, sample, run.labels.store)
            nodes, counts = resources.cluster_nodes(), cluster.nodes_by_group()
            ending_s = time.monotonic()
        apart_s += time.monotonic() - ending_s
        groups = {stage.group for stage in [*stages, student]}
        cores = {group: total((node for node in nodes if not group or group_of(node.labels) == group), "CPU") for group in groups}
        label_bytes, frame_bytes = _bytes_per_example(small, sample.num_examples)
    start_s = apart_s + (max(0.0, first_s[0]) if first_s else 0.0)
    return Trial(stages, student, start_s, sample.num_examples, report.rejected.total(), label_bytes, frame_bytes, cores, counts)


def _seconds_of_an_actor() -> float:
    """What it takes to start the actor that labels beside training."""
    started_s = time.monotonic()
    ray.get(ray.remote(_LabellerInSmall).options(num_cpus=0).remote().ready.remote())
    return time.monotonic() - started_s


class _LabellerInSmall:
    """Imports what that actor imports."""

    def ready(self) -> str:
        return labelling.__name__


@contextmanager
def _scratch(run: Run) -> Iterator[Run]:
    """The run with its output and store in a folder that goes again."""
    folder = files.join(run.output, f"plan-{uuid.uuid4().hex[:8]}")
    changed = {"output": folder, "labels": run.labels.model_copy(update={"mode": "stored", "store": files.join(folder, "labels")})}
    try:
        yield run.model_copy(update=changed)
    finally:
        files.delete(folder)


def _stages(report: LabelReport, asked: resources.Resources) -> list[StageCost]:
    """Decoding, then the teachers in their order, the one that is busiest last."""
    done = max(report.done, 1)
    labels = {DECODE: asked.decode_labels} | {alias: pool.labels for alias, pool in asked.pools.items()}
    found = [
        StageCost(name, group_of(labels[name]), asked.num_workers[name], stage.busy_s / done, stage.cpu_s / done)
        for name, stage in report.stages().items()
    ]
    return sorted(found, key=lambda stage: (stage.name != DECODE, stage.busy_s / stage.num_workers))


def _student(run: Run, plan: SamplePlan, store: str) -> StageCost:
    """The cost of a training step, measured where training would run; `store` has what the sample's examples name."""
    group = run.compute.student
    if group.max_workers == 0:
        busy_s, cpu_s = _train(run, plan, store)
    else:
        autoscaler.call_for_nodes([resources.student_need(group, 1)], resources.cluster_nodes)
        task = ray.remote(_train_elsewhere).options(num_cpus=group.cpus, num_gpus=group.gpus, label_selector=group.labels or None)
        busy_s, cpu_s = ray.get(task.remote(run.model_dump(mode="json"), plan, store))
    return StageCost(STUDENT, group_of(group.labels), max(1, group.max_workers), busy_s, cpu_s)


def _train_elsewhere(tree: Mapping[str, Any], plan: SamplePlan, store: str) -> tuple[float, float]:
    run = run_files.parse(dict(tree))
    torch.set_num_threads(max(1, int(run.compute.student.cpus)))
    return _train(run, plan, store)


def _train(run: Run, plan: SamplePlan, store: str) -> tuple[float, float]:
    """(seconds of the clock, seconds of CPUs) of an example of training, its labels read from the store, after a warm-up."""
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    sets: dict[str, Labels] = {alias: LabelSet.open(run.store, spec) for alias, spec in specs.items()}
    table = phased.table_of(run, plan, sets[next(iter(run.recipe.teachers))])
    if table is not None:  # all of its versions cost the same to read
        sets[REFINED] = table.at(table.prepare(0))
    feeder = Feeder(run, plan, sets, TRAIN, store=store)
    steps_of_epoch = -(-plan.num_examples // run.train.batch_size)
    first = run.recipe.num_epochs or 0  # past all phases is still the last one, in which all of a student learns
    epochs = first + 1 + -(-WARM_UP_STEPS // steps_of_epoch) + -(-STEPS // steps_of_epoch)
    small = run.model_copy(update={"train": run.train.model_copy(update={"epochs": epochs, "check_every_steps": 0})})
    loop, start = training.new_loop(small, plan, specs), Position(first, step=first * steps_of_epoch)
    loop.between = None  # steps are measured, and not what is done between epochs
    loop.enter(first)
    seen: list[tuple[float, float, int]] = []  # clock, CPU, examples

    def on_round(report: RoundReport, position: Position) -> None:
        if position.step >= start.step + WARM_UP_STEPS:
            seen.append((time.monotonic(), time.process_time(), position.num_examples))

    loop.fit(feeder, plan.num_examples, start, on_round)
    (clock_s, cpu_s, before), (end_s, end_cpu_s, after) = seen[0], seen[-1]
    num_examples = max(1, after - before)
    return (end_s - clock_s) / num_examples, (end_cpu_s - cpu_s) / num_examples


def _bytes_per_example(run: Run, num_examples: int) -> tuple[float, float]:
    """(of labels, of kept frames) in the store."""
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    sizes = {
        alias: sum(size for _, size, _ in files.list_infos(files.join(run.store, s.name, "view=0", "sample"))) for alias, s in specs.items()
    }
    frames = sizes.pop(FRAMES_ALIAS, 0)
    return sum(sizes.values()) / num_examples, frames / num_examples
