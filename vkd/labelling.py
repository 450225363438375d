"""Labelling: what a store lacks is decoded, taught and committed, one chunk at a time, in one execution or, after losses, several."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vkd import cluster, execution, planning, resources, stages, status, worklist
from vkd.clips import ViewPolicy, assign_splits
from vkd.compute import Compute
from vkd.errors import ConfigError, ManifestError, VideoError
from vkd.label_report import LabelReport, Rates
from vkd.manifest import Manifest
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.resources import Resources
from vkd.rounds import Chunk
from vkd.run import Run
from vkd.schema import FRAMES, URI
from vkd.stages import Item, Job
from vkd.store import files, housekeeping, leases
from vkd.store.labelset import LabelSet, LabelSetSpec
from vkd.teachers.base import Teacher
from vkd.window import Link
from vkd.worklist import Retry

REPLACED_S = 180.0  # for nodes that take the place of lost ones
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
    report.present = report.planned - worklist.total_rows(plan, items)
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
    num_lacking = worklist.total_rows(plan, items)
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
    started_s, rates = time.monotonic(), Rates()
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
            paced = run.labels.mode == "live"  # by training, which reads in order, and from a store that nobody shares
            items = job.items if paced else leases.in_turn(job.items, others)
            for stats in _in_spite_of_losses(replace(job, items=items), run.compute, report, paced):
                report.add(stats)
                report.wall_s = time.monotonic() - started_s
                progress(report)
                cluster.export_metrics(rates.of(report))
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
        if URI in first.column_names:
            run.data.access.resolve(first[URI][0].as_py())
    except VideoError as error:
        if error.kind == "not_allowed":
            raise ConfigError(error.what, where=error.where, action="add its folder to data.allow") from error
    assign_splits(first, run.data.split)
    for alias, teacher in teachers.items():
        planning.require_columns(plan, planning.columns_for([teacher]), f"recipe.{alias}")
    if run.recipe.trains:
        run.recipe.distiller({alias: teacher.emits for alias, teacher in teachers.items()}, len(plan.classes()))


def _job(run: Run, plan: Plan, specs: Mapping[str, LabelSetSpec], teachers: Mapping[str, Teacher], items: Sequence[Item]) -> Job:
    looked_at = {alias: teacher.sampling for alias, teacher in teachers.items()}
    if FRAMES_ALIAS in specs:
        looked_at[FRAMES_ALIAS] = planning.student_sampling(run)
    wanted = {alias: sampling for alias, sampling in looked_at.items() if sampling is not None}
    samplings = list(dict.fromkeys(wanted.values()))
    column = {alias: f"{FRAMES}.{samplings.index(sampling)}" for alias, sampling in wanted.items()}
    views = ViewPolicy(**run.data.views.policy())
    how, columns = planning.decoding(run, samplings), planning.columns_for(teachers.values())
    return Job(plan, views, how, run.store, run.recipe.teachers, specs, column, items, run.data.views.count, columns=columns)


def _free(job: Job, compute: Compute, patience_s: float) -> Resources:
    """What the job asks for, once it is free; nodes that were lost have so long to be replaced."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            asked = resources.requested(compute, list(job.teachers), beside_training=job.link is not None)
            resources.wait_until_free(asked)
            return asked
        except ConfigError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(1.0)


def _in_spite_of_losses(job: Job, compute: Compute, report: LabelReport, paced: bool) -> Iterator[dict[str, Any]]:
    """The labelling execution, again for what is left when nodes or actors are lost for good, as long as it gets on."""
    patience_s = 0.0
    while True:
        asked = _free(job, compute, patience_s)
        report.pools = asked.num_workers
        done = report.done
        try:
            yield from execution.execute(job, asked, paced)
            return
        except cluster.LOST as error:
            left = [item for item in job.items if stages.still_lacking(job, item)]
            committed = worklist.total_rows(job.plan, job.items) - worklist.total_rows(job.plan, left)
            if len(left) == len(job.items):
                raise
            cluster.let_go(error)
        report.elsewhere += max(0, committed - (report.done - done))  # those who died had not told yet
        job, patience_s = replace(job, items=left), REPLACED_S
        print(f"vkd: nodes or actors were lost; {len(left)} chunks are left to label", file=sys.stderr, flush=True)


def _check_rejects(report: LabelReport, max_fraction: float) -> None:
    if report.rejected.total() <= max_fraction * report.planned:
        return
    kind, count = report.rejected.most_common(1)[0]
    raise ManifestError(
        f"{report.rejected.total()} of {report.planned} examples are rejected, most often {kind!r} ({count}); committed labels are kept",
        where="data.max_reject_fraction",
        action="vkd verify RUN --rejects lists them; mend the source or raise the limit",
    )
