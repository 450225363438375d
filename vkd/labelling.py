"""Labelling on Ray Data: chunks -> decode -> teach -> commit. Each stage commits what it makes, one chunk at a time."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.util.annotations import RayDeprecationWarning

from vkd import cluster, planning, resources, stages, status, worklist
from vkd.clips import ViewPolicy, assign_splits
from vkd.compute import Compute
from vkd.errors import ConfigError, ManifestError, VideoError, VkdError
from vkd.label_report import LabelReport
from vkd.manifest import Manifest
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.resources import Resources
from vkd.rounds import Chunk
from vkd.run import Run
from vkd.schema import FRAMES, URI, Columns
from vkd.stages import ITEM, STATS, Item, Job
from vkd.store import files, housekeeping, leases
from vkd.store.labelset import LabelSet, LabelSetSpec
from vkd.teachers.base import Teacher
from vkd.teaching import Teach
from vkd.window import Link
from vkd.worklist import Retry

MAX_RETRIES = 3  # Ray's own default is without end
Progress = Callable[[LabelReport], None]


def label(run: Run, chunks: Sequence[Chunk], progress: Progress, retry: Retry | None = None) -> LabelReport:
    """Label what the store lacks of these chunks, and what `retry` wants; the same call after any crash goes on where it stopped.

    Nothing is started when nothing lacks. Raises ManifestError when more than `data.max_reject_fraction` is rejected.
    """
    plan, teachers, specs = _planned(run)
    store, num_views = run.store, run.data.views.count
    items = worklist.missing_items(store, range(num_views), specs, chunks)
    items += [] if retry is None else worklist.retry_items(store, num_views, specs, chunks, retry)
    report = LabelReport(planned=sum(plan.examples(c).num_rows for c in chunks) * num_views)
    report.present = report.planned - sum(worklist.num_rows(plan, item) for item in items)
    return _perform(run, _job(run, plan, specs, teachers, items), report, progress)


def label_plan(run: Run, plan: Plan, progress: Progress) -> LabelReport:
    """Label all examples of a plan that need not be the run's own: view 0 of each."""
    _, teachers, specs = _planned(run)
    items = worklist.missing_items(run.store, range(1), specs, plan.chunks)
    return _perform(run, _job(run, plan, specs, teachers, items), LabelReport(planned=plan.num_examples), progress)


def lacks_for_training(run: Run, start: tuple[int, int]) -> bool:
    """Whether the store lacks anything that training reads from its position on. Refuses what `label` refuses."""
    plan, _, specs = _planned(run)
    return bool(worklist.training_items(run, plan, specs, start))


def label_for_training(run: Run, start: tuple[int, int], link: Link, progress: Progress) -> LabelReport:
    """Label what the store lacks for training from its position (epoch, round) on, in the order in which training reads it."""
    plan, teachers, specs = _planned(run)
    if run.labels.mode == "live":
        left = worklist.wanted(run, plan, start)
        for label_set in filter(None, (LabelSet.find(run.store, spec) for spec in specs.values())):
            housekeeping.drop_others(label_set, left)
    items = worklist.training_items(run, plan, specs, start)
    num_lacking = sum(worklist.num_rows(plan, item) for item in items)
    report = LabelReport(planned=num_lacking if run.labels.mode == "live" else plan.num_examples * run.data.views.count)
    report.present = report.planned - num_lacking
    if items:
        link.trained(items[0].round - 1)
    return _perform(run, replace(_job(run, plan, specs, teachers, items), link=link), report, progress)


def checked(run: Run) -> tuple[Plan, dict[str, LabelSetSpec]]:
    """What a run would label, refused where labelling would refuse it."""
    plan, _, specs = _planned(run)
    return plan, specs


def _planned(run: Run) -> tuple[Plan, dict[str, Teacher], dict[str, LabelSetSpec]]:
    """What a labelling needs to know, checked."""
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    specs = planning.label_specs(run, teachers)
    _refuse_early(run, plan, teachers)
    return plan, teachers, specs


def _perform(run: Run, job: Job, report: LabelReport, progress: Progress) -> LabelReport:
    """Do all items of a job."""
    started_s = time.monotonic()
    if job.items:
        planned = report.planned // job.num_views if job.link is None else job.plan.num_examples
        for spec in job.specs.values():
            status.note_planned(files.join(job.store, spec.name), planned)
        if FRAMES_ALIAS in job.specs:
            LabelSet.create(job.store, job.specs[FRAMES_ALIAS], {}, stages.recorded(), {})
        with (
            leases.held(files.join(job.store, next(iter(job.specs.values())).name)) as others,
            cluster.session(run.compute),
            cluster.worker_errors(),
        ):
            report.other_drivers = others
            asked = _free(job, run.compute)
            report.pools = asked.num_workers
            paced = run.labels.mode == "live"  # by training, which reads in order, and from a store that nobody shares
            items = job.items if paced else leases.in_turn(job.items, others)
            for stats in _execute(replace(job, items=items), asked, paced):
                report.add(stats)
                report.wall_s = time.monotonic() - started_s
                progress(report)
                _check_rejects(report, run.data.max_reject_fraction)
    report.wall_s = time.monotonic() - started_s
    return report


def compact(run: Run) -> int:
    """Put the chunks of every complete shard into one file, set by set and view by view; the number of files that result."""
    plan = Plan.of(run)
    num_chunks = Counter(chunk.shard for chunk in plan.chunks)
    sets = [
        LabelSet.open(run.labels.store, spec) for spec in planning.label_specs(run, planning.build_teachers(run.recipe.teachers)).values()
    ]
    done = 0
    for label_set, view in [(each, view) for each in sets for view in each.views()]:
        lacking = {chunk.shard for chunk in label_set.missing(view, plan.chunks)}
        for shard in num_chunks.keys() - lacking:
            label_set.compact(view, shard, num_chunks[shard])
            done += 1
    return done


def _refuse_early(run: Run, plan: Plan, teachers: Mapping[str, Teacher]) -> None:
    """Say before hours of labelling what training would refuse after them: no videos, an unknown split or student."""
    if not plan.chunks:
        rejects = Manifest.load(run.data.manifest).rejects().to_pylist()
        why = f"; {len(rejects)} are rejected, the first because {rejects[0]['message']}" if rejects else ""
        raise ManifestError(f"no usable video{why}", where=run.data.manifest, action="mend the source, or name another one")
    first = plan.examples(plan.chunks[0])
    try:
        run.data.access.resolve(first[URI][0].as_py())
    except VideoError as error:
        if error.kind == "not_allowed":
            raise ConfigError(error.what, where=error.where, action="add its folder to data.allow") from error
    assign_splits(first, run.data.split)
    run.recipe.distiller({alias: teacher.emits for alias, teacher in teachers.items()}, len(plan.classes()))


def _job(run: Run, plan: Plan, specs: Mapping[str, LabelSetSpec], teachers: Mapping[str, Teacher], items: Sequence[Item]) -> Job:
    wanted = {alias: teacher.sampling for alias, teacher in teachers.items()}
    if FRAMES_ALIAS in specs:
        wanted[FRAMES_ALIAS] = planning.student_sampling(run)
    samplings = list(dict.fromkeys(wanted.values()))
    column = {alias: f"{FRAMES}.{samplings.index(sampling)}" for alias, sampling in wanted.items()}
    views = ViewPolicy(**run.data.views.policy())
    how = planning.decoding(run, samplings)
    return Job(plan, views, how, run.store, run.recipe.teachers, specs, column, items, run.data.views.count)


def _free(job: Job, compute: Compute) -> Resources:
    """What the job asks for, once it is free."""
    asked = resources.requested(compute, list(job.teachers), beside_training=job.link is not None)
    resources.wait_until_free(asked)
    return asked


def _execute(job: Job, asked: Resources, paced: bool) -> Iterator[dict[str, Any]]:
    """The labelling execution; yields the statistics of each chunk as it is committed."""
    num_workers = asked.num_workers
    frame_bytes = sum(s.num_frames * s.size_px**2 * 3 for s in job.decoding.samplings) * job.plan.chunk_size
    gpus = sum(pool.actors * pool.gpus for pool in asked.pools.values())
    cluster.labelling_context(frame_bytes * 4 * sum(num_workers.values()), gpus, paced)
    with warnings.catch_warnings():
        # 2.60 knows bounds on retries only as `ray_remote_args`, which it calls deprecated, and retries without end by default
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = _dataset(replace(job, decoding=job.decoding.share(num_workers[stages.DECODE])), asked)
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        yield from (json.loads(text) for text in batch[STATS])


def _dataset(job: Job, asked: Resources) -> Dataset:
    """items -> decode -> one pool of actors a teacher; not yet started."""
    shared = ray.put(job)
    num_items = len(job.items)
    where = {"label_selector": dict(asked.decode_labels)} if asked.decode_labels else {}
    dataset = ray.data.read_datasource(
        _Items(num_items), override_num_blocks=num_items, num_cpus=asked.decode_cpus, ray_remote_args={"max_retries": MAX_RETRIES, **where}
    )
    dataset = dataset.map_batches(
        partial(_decode_stage, shared),
        batch_size=None,
        compute=TaskPoolStrategy(asked.decode_limit),
        num_cpus=asked.decode_cpus,
        max_retries=MAX_RETRIES,
        **where,
    )
    *_, last = job.teachers
    for alias, pool in asked.pools.items():
        dataset = dataset.map_batches(
            _TeachStage,
            fn_constructor_args=(shared, alias, pool.threads, alias == last),
            batch_size=None,
            compute=ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            label_selector=dict(pool.labels) or None,
            max_restarts=MAX_RETRIES,
            max_task_retries=MAX_RETRIES,
        )
    return dataset


class _Items(Datasource):  # type: ignore[misc]  # Ray is untyped
    """One block of one row per item: its number. One item stays one block from here to the store."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
        return [ReadTask(partial(_item_block, i), metadata) for i in range(self.num_items)]


def _item_block(number: int) -> list[pa.Table]:
    return [pa.table({ITEM: pa.array([number], pa.int64())})]


@lru_cache(maxsize=1)
def _job_of(shared: ray.ObjectRef) -> Job:
    job: Job = ray.get(shared)
    return job


def _decode_stage(shared: ray.ObjectRef, batch: Columns) -> Columns:
    return stages.decode(_job_of(shared), batch)


class _TeachStage:
    """A teacher in an actor. What its start raises is kept for the first call: of a constructor Ray hands on only the text."""

    def __init__(self, shared: ray.ObjectRef, alias: str, num_threads: int, last: bool) -> None:
        self.teach: Teach | VkdError
        try:
            self.teach = Teach(_job_of(shared), alias, num_threads, last)
        except VkdError as error:
            self.teach = error

    def __call__(self, batch: Columns) -> Columns:
        if isinstance(self.teach, VkdError):
            raise self.teach
        return self.teach(batch)


def _check_rejects(report: LabelReport, max_fraction: float) -> None:
    if report.rejected.total() <= max_fraction * report.planned:
        return
    kind, count = report.rejected.most_common(1)[0]
    raise ManifestError(
        f"{report.rejected.total()} of {report.planned} examples are rejected, most often {kind!r} ({count}); committed labels are kept",
        where="data.max_reject_fraction",
        action="vkd verify RUN --rejects lists them; mend the source or raise the limit",
    )
