"""Training: in the driver, or in a Ray Train worker group. Every start is an attempt; the newest finished round decides the state."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from vkd import checkpoint, claim, cluster, gather, heartbeat, phased, planning, preemption, resources, teacher_use
from vkd import run as run_files
from vkd.beside import Beside, labelling_beside
from vkd.board import Board
from vkd.checkpoint import Position, Saver
from vkd.efficiency import STUDENT, Efficiency, Stage
from vkd.errors import ConfigError, LabellingEnded
from vkd.feeding import Feeder, open_sets
from vkd.label_report import LabelReport
from vkd.labelling import Progress
from vkd.loop import Loop, RoundReport, as_metrics
from vkd.planning import Plan
from vkd.preemption import Notice
from vkd.rounds import Round, rounds_from
from vkd.run import Run
from vkd.schema import TRAIN
from vkd.stages import device
from vkd.store import files, housekeeping
from vkd.store.labelset import LabelSet, LabelSetSpec
from vkd.window import Awaited, Link

OnRound = Callable[[RoundReport], None]
MAX_FAILURES = 3
STUDENT_TIME = "student_time.json"  # in the output: what rank 0 of the newest start spent


@dataclass(frozen=True)
class TrainReport:
    """What training did: `resumed_from` is a step, 0 for a fresh start; `skipped` when it was finished before."""

    student: str
    skipped: bool
    resumed_from: int
    num_steps: int
    num_examples: int
    labels: LabelReport | None = None  # of what was labelled beside
    efficiency: Efficiency | None = None


def student_folder(run: Run) -> str:
    """Where the run exports its student."""
    return files.join(run.output, "student")


def train(run: Run, on_round: OnRound, on_labels: Progress = lambda _: None) -> TrainReport:
    """Train the run's student and export it, on labels that are there or, with `labels.mode` tee or live, are made meanwhile.

    Goes on from the newest checkpoint; does nothing when it is finished.
    """
    claim.claim_output(run)
    folder = student_folder(run)
    if files.exists(files.join(folder, checkpoint.CONFIG)):
        exported, _ = checkpoint.read_export(folder)
        claim.require_same_labels(run, exported)
        done = exported["trained"]
        with labelling_beside(run, (run.train.epochs, 0), on_labels):
            pass  # what a start that was killed right after training left to label
        return TrainReport(folder, True, done["step"], done["step"], done["num_examples"])
    found = checkpoint.newest(run.output)
    start = checkpoint.position(found) if found else Position()
    attempt = checkpoint.new_attempt(run.output)
    with labelling_beside(run, (start.epoch, start.round), on_labels) as beside:
        link = beside.link if beside is not None else None
        if run.compute.student.max_workers == 0:
            train_rank(run, attempt, on_round, link)
        else:
            _plan_and_sets(run, link)  # what lacks is said here, not by a worker
            with cluster.session(run.compute), cluster.worker_errors():
                _fit_group(run, attempt, link)
    done = json.loads(files.read(files.join(folder, checkpoint.CONFIG)))["trained"]
    labels = beside.report if beside is not None else None
    return TrainReport(folder, False, start.step, done["step"], done["num_examples"], labels, _efficiency(run, beside))


def _efficiency(run: Run, beside: Beside | None) -> Efficiency:
    """Of this start: what rank 0 noted of itself, and what the labelling beside it told."""
    told = files.read_json(files.join(run.output, STUDENT_TIME), ("elapsed_s", "wait_s", "cpu_s", "num_examples", "world_size"))
    elapsed_s, wait_s, world_size = told["elapsed_s"], told["wait_s"], told["world_size"]
    stages = {STUDENT: Stage(world_size, (elapsed_s - wait_s) * world_size, told["cpu_s"] * world_size)}
    if beside is None:
        return Efficiency(stages, elapsed_s, wait_s, told["num_examples"], os.cpu_count() or 1)
    given = elapsed_s, wait_s, told["num_examples"], beside.num_cores, beside.handed_over_bytes, beside.spilled_bytes
    return Efficiency(beside.report.stages() | stages, *given)


def train_rank(run: Run, attempt: str, on_round: OnRound, link: Link | None = None, beat: Callable[[], None] = lambda: None) -> None:
    """One rank's training, from the newest checkpoint to the export; `link` leads to a labelling that runs beside."""
    rank, world_size = gather.world()
    plan, sets = _plan_and_sets(run, link)
    loop = new_loop(run, plan, {alias: label_set.spec for alias, label_set in sets.items()})
    feeder = phased.equip(loop, Feeder(run, plan, sets, TRAIN, rank, world_size, beat=beat), cluster.map_chunks)
    if not sum(feeder.sizes):
        raise ConfigError("no example is left to train on", where="data.split", action="hold out less, or add videos")
    if rank == 0 and plan.share < 1:
        print(
            f"training on {plan.share:.0%} of the planned clips: the others lack labels (labels.allow_partial)", file=sys.stderr, flush=True
        )
    found = gather.of_rank_0(checkpoint.newest(run.output))
    position = loop.restore(found) if found else Position()
    use = teacher_use.watched(loop, run, position.step)
    nodes = preemption.nodes_of_ranks()
    if rank != 0:
        loop.fit(feeder, run.checkpoint.every_examples, position, lambda report, _: on_round(report))
        return
    board = Board(run.output, position.step + 1)
    with closing(board), closing(Notice(nodes)) as notice, _Chief(run, attempt, loop, feeder, link) as chief:

        def after_round(report: RoundReport, reached: Position) -> None:
            board.add(as_metrics(report) | use.metrics() | loop.metrics(), reached.step)
            chief.after_round(report, reached, board)
            use.save(run.output)
            cluster.export_metrics({"data_wait": report.wait_fraction, "trained_per_s": report.examples_per_s})
            on_round(report)

        started_s, started_cpu_s, before = time.monotonic(), time.process_time(), position
        on_step = partial(chief.after_step, notice)
        position = loop.fit(feeder, run.checkpoint.every_examples, position, after_round, on_step)
    told = {"elapsed_s": time.monotonic() - started_s, "wait_s": feeder.wait_s, "cpu_s": time.process_time() - started_cpu_s}
    told |= {"num_examples": position.num_examples - before.num_examples, "world_size": world_size}
    files.put(files.join(run.output, STUDENT_TIME), json.dumps(told).encode())
    _export(run, loop, {label_set.spec.name for label_set in sets.values()}, position, student_folder(run))


class _Chief:
    """What rank 0 does beside training: it saves each round and lets labelling go on."""

    def __init__(self, run: Run, attempt: str, loop: Loop, feeder: Feeder, link: Link | None) -> None:
        self.run, self.attempt, self.loop, self.feeder, self.link = run, attempt, loop, feeder, link
        self.saver, train = Saver(), run.train
        rounds = rounds_from(feeder.sizes, (0, 0), train.epochs, run.checkpoint.every_examples, train.seed)
        self.rounds = {(r.epoch, r.index): (number, r) for number, r in enumerate(rounds)}

    def __enter__(self) -> _Chief:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.saver.flush()
        finally:
            self.saver.close()

    def after_round(self, report: RoundReport, reached: Position, board: Board) -> None:
        """A round is trained: its checkpoint is written beside the next round."""
        contents = self.loop.snapshot(reached, sum(report.losses.values()))
        number, round_ = self.rounds[report.epoch, report.round]
        self.saver.submit(partial(self._save, reached.step, contents, round_, board))
        if self.link is not None:
            self.link.trained(number)

    def after_step(self, notice: Notice, reached: Position) -> None:
        """A step inside a round is done: it is saved when a node of the group is about to go, if all of the state is at hand."""
        if self.loop.resumes_inside_rounds and notice():
            print(f"vkd: a node is being taken away; saving after step {reached.step}", file=sys.stderr, flush=True)
            contents = self.loop.snapshot(reached)
            self.saver.submit(partial(checkpoint.save, self.attempt, reached.step, contents))

    def _save(self, step: int, contents: Mapping[str, bytes], round_: Round, board: Board) -> None:
        checkpoint.save(self.attempt, step, contents)
        board.put()
        checkpoint.prune(self.run.output, self.run.checkpoint.keep)
        if self.run.labels.mode != "live":
            return
        for label_set in self.feeder.sets.values():  # no start of training reads them any more
            for chunk in round_.chunks:
                uri = files.join(self.run.store, label_set.spec.name)
                housekeeping.drop(uri, self.run.stored_view(round_.epoch), self.feeder.plan.chunks[chunk])


def export_newest(run: Run, folder: str, best: bool = False) -> int:
    """Export the student of the newest checkpoint (or the one with the lowest loss), finished or not; the steps that it was trained."""
    found = checkpoint.best(run.output) if best else checkpoint.newest(run.output)
    if found is None:
        raise ConfigError("no checkpoint yet", where=run.output, action="vkd distill RUN first")
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    partial = run.labels.mode == "stored" and run.labels.allow_partial
    plan = open_sets(run, Plan.of(run))[0] if partial else Plan.of(run)
    loop = new_loop(run, plan, specs)
    position = loop.restore(found)
    if _exported_at(run) == position.step:  # it may be of an earlier epoch of the last phase
        checkpoint.load_weights(loop.distiller.student, student_folder(run))
    _export(run, loop, {spec.name for spec in specs.values()}, position, folder)
    return position.step


def _exported_at(run: Run) -> int | None:
    """The step after which training exported its student; None while it has not."""
    config = files.join(student_folder(run), checkpoint.CONFIG)
    return int(json.loads(files.read(config))["trained"]["step"]) if files.exists(config) else None


def _plan_and_sets(run: Run, link: Link | None) -> tuple[Plan, Mapping[str, LabelSet | Awaited]]:
    """All of the plan and sets that are being filled, or the plan cut to what the sets hold."""
    if link is None:
        return open_sets(run, Plan.of(run))
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    return Plan.of(run), {alias: Awaited(run.store, spec, link) for alias, spec in specs.items()}


def new_loop(run: Run, plan: Plan, specs: Mapping[str, LabelSetSpec]) -> Loop:
    """The run's untrained loop, the same on every rank."""
    emits = {alias: spec.tensors for alias, spec in specs.items()}
    torch.manual_seed(run.train.seed)
    return Loop(run.recipe.distiller(emits, len(plan.classes())), run.train, device())


def _export(run: Run, loop: Loop, label_sets: Collection[str], position: Position, folder: str) -> None:
    trained = {"step": position.step, "num_examples": position.num_examples}
    extra = {"trained": trained, "label_sets": sorted(label_sets), **run.recipe.provenance(Plan.of(run))}
    checkpoint.export(loop.distiller.student, run.recipe.student, folder, extra)


def _fit_group(run: Run, attempt: str, link: Link | None) -> None:
    resources.check_students(run.compute.student)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for the next check: 2 s by default
    while True:
        before = checkpoint.newest(run.output)
        try:
            _trainer(run, attempt, link).fit()
            return
        except WorkerGroupError:
            if checkpoint.newest(run.output) == before:
                raise
            attempt = checkpoint.new_attempt(run.output)  # workers that die now and then end no training that gets on


def _trainer(run: Run, attempt: str, link: Link | None) -> TorchTrainer:
    asked = run.compute.student
    each_worker = {"CPU": asked.cpus} | ({"GPU": asked.gpus} if asked.gpus else {})
    where = asked.labels or None
    scaling = ScalingConfig(num_workers=asked.workers, use_gpu=asked.gpus > 0, resources_per_worker=each_worker, label_selector=where)
    filesystem, path = files.arrow_filesystem(files.join(run.output, "ray_train"))
    ray_run = RunConfig(
        name=os.path.basename(attempt),
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=MAX_FAILURES),
        logging_config=LoggingConfig("CRITICAL"),  # what goes wrong is raised
    )
    config = {"run": run.model_dump(mode="json"), "attempt": attempt, "link": link}
    return TorchTrainer(_train_worker, train_loop_config=config, scaling_config=scaling, run_config=ray_run)


def _train_worker(config: dict[str, Any]) -> None:
    """What each worker of the group does."""
    run = run_files.parse(config["run"])
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every report, and every printed line again
    torch.set_num_threads(max(1, int(run.compute.student.cpus)))
    rank, _ = gather.world()

    def on_round(report: RoundReport) -> None:
        if rank == 0:
            sys.stderr.write(round_line(report) + "\n")  # stdout is for results
            sys.stderr.flush()
        ray.train.report(as_metrics(report))

    with heartbeat.limited(run.compute.student.stalled_s) as beat, suppress(LabellingEnded):  # the driver says why it ended
        train_rank(run, config["attempt"], on_round, config["link"], beat)


def round_line(report: RoundReport) -> str:
    """A round in one line."""
    losses = "  ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
    lost = f"  {report.left_out} left out ({report.unreadable} unreadable)" if report.left_out else ""
    return (
        f"epoch {report.epoch + 1}  step {report.step}/{report.num_steps}  {losses}  "
        f"{report.examples_per_s:.1f} examples/s  data-wait {report.wait_fraction:.1%}{lost}"
    )
