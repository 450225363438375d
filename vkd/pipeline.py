"""The spine: read the manifest, plan its clips, decode them, let the teachers label them, and train a student on what they said."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any, Protocol

from vkd import claim, cluster, copying, evaluation, labelling, manifest, planning, preflight, training
from vkd.errors import ConfigError
from vkd.label_report import LabelReport
from vkd.loop import RoundReport
from vkd.manifest import BuildOptions
from vkd.planning import Plan
from vkd.preflight import PlanReport
from vkd.run import Run
from vkd.schema import VAL
from vkd.store import files
from vkd.training import TrainReport
from vkd.video.decode import check_decoder
from vkd.worklist import Retry


class Watcher(Protocol):
    """Who is told of progress; the command line prints it."""

    def stage(self, name: str) -> None: ...
    def copied(self, done: int, total: int) -> None: ...
    def probed(self, done: int, total: int) -> None: ...
    def labelled(self, report: LabelReport) -> None: ...
    def trained(self, report: RoundReport) -> None: ...


def plan(run: Run, watch: Watcher, fraction: float, before_s: float = 0.0) -> PlanReport:
    """Check every part of the run, measure a sample of its clips, and say what the whole takes. Writes no labels.

    `before_s` is what a command takes before it comes here.
    """
    check_decoder()
    planning.student_sampling(run)
    build_manifest(run, watch)
    watch.stage("plan")
    return preflight.preflight(run, fraction, watch.labelled, before_s)


def label(run: Run, watch: Watcher, fraction: float = 1.0, retry: Retry | None = None) -> LabelReport:
    """Label what the store lacks of the run's clips, or of a seeded sample of its chunks; `retry` says which rejects again."""
    if run.labels.mode == "live":
        raise ConfigError("mode live keeps no labels", where="labels.mode", action="vkd distill RUN labels and trains; or set it to tee")
    check_decoder()
    planning.student_sampling(run)  # a student that cannot be built is told now, not after hours of labelling
    build_manifest(run, watch)
    watch.stage("label")
    chunks = Plan.of(run).sample(fraction, run.data.views.seed)
    return labelling.label(run, chunks, watch.labelled, retry)


def compact(run: Run) -> int:
    """Put the chunks of complete shards into one file each; the number of such files."""
    return labelling.compact(run)


def distill(run: Run, watch: Watcher) -> TrainReport:
    """Train the student, from the newest checkpoint on, and export it; teachers label meanwhile what lacks, unless labels are `stored`."""
    if not run.recipe.trains:
        action = "vkd label RUN, or choose a recipe with a student"
        raise ConfigError(f"recipe {run.recipe.name!r} trains nothing", where="recipe.name", action=action)
    if run.labels.mode != "stored":
        check_decoder()
        build_manifest(run, watch)
    watch.stage("distill")
    return training.train(run, watch.trained, watch.labelled)


def evaluate(run: Run, watch: Watcher, student: str | None = None) -> dict[str, Any]:
    """Compare the exported student with its teachers on held-out clips; saved as `evaluation.json` beside it."""
    watch.stage("evaluate")
    measured = evaluation.evaluate(run, student or training.student_folder(run))
    files.put(files.join(run.output, "evaluation.json"), json.dumps(measured, indent=1).encode())
    return measured


def run_all(run: Run, watch: Watcher) -> tuple[LabelReport | None, TrainReport, dict[str, Any] | None]:
    """Label, distill (at once, unless labels are `stored`) and, when clips are held out, evaluate: each does only what is left to do."""
    claim.claim_output(run)  # an output of another run is told now, not after hours of labelling
    with cluster.session(run.compute) if run.compute.student.max_workers else nullcontext():  # else Ray ends with the labels
        labelled = label(run, watch) if run.labels.mode == "stored" else None
        trained = distill(run, watch)
        held_out = any(Plan.of(run).rows(VAL))
        return labelled or trained.labels, trained, evaluate(run, watch) if held_out else None


def build_manifest(run: Run, watch: Watcher) -> None:
    """Make or grow the manifest of `data.source`, when the run names one, and of copies: videos that it knows cost a listing."""
    data = run.data
    if data.source is None:
        return
    source, label_from = data.source, data.label_from
    if data.copies is not None:
        watch.stage("copies")
        source, label_from = copying.make(data, data.copies, watch.copied), None  # the table has the labels
    watch.stage("manifest")
    options = BuildOptions(label_from=label_from, hash=data.hash, chunk_size=data.chunk_size, allow=data.access.allow or ())
    manifest.build(source, data.manifest, options, watch.probed)
