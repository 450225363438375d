"""What `vkd plan` checks and measures before anything is spent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vkd import checkpoint, labelling, planning, schema, trial, worklist
from vkd.checkpoint import Position
from vkd.errors import LabelsMissing, StorageError
from vkd.forecast import Forecast, Work
from vkd.label_report import LabelReport
from vkd.manifest import Manifest
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import TRAIN
from vkd.store.labelset import LabelSet, LabelSetSpec
from vkd.trial import Trial


@dataclass(frozen=True)
class PlanReport:
    """What was checked, a line each, what was measured on a sample, and what follows from it for the whole run."""

    checks: dict[str, str]
    trial: Trial
    forecast: Forecast
    network_bytes: float


def preflight(run: Run, fraction: float, progress: Callable[[LabelReport], None], before_s: float) -> PlanReport:
    """Check every part of a run, measure a sample, and say what the whole takes, `before_s` included. Raises what the run would raise."""
    plan, specs = labelling.checked(run)
    work = _work(run, plan)
    checks = {
        "manifest": f"{Manifest.load(run.data.manifest).num_videos} videos, {plan.num_examples} clips in {len(plan.chunks)} chunks",
        "labels": f"{work.to_label} to label of {plan.num_examples * run.data.views.count}; sets {_sets(run, specs)}",
    }
    if run.recipe.trains and run.labels.mode == "stored" and work.to_label and not run.labels.allow_partial:
        what = f"labels of {work.to_label} clips are missing, and labels.mode is stored"
        raise LabelsMissing(what, where=run.store, action="vkd label RUN, or set labels.mode=tee")
    measured = trial.measure(run, plan, fraction, progress)
    if run.recipe.teachers:
        checks["teachers"] = f"{', '.join(run.recipe.teachers)}: answered {measured.num_clips} clips as they should"
    if run.recipe.trains:
        checks["student"] = "trains on what they said" if run.recipe.teachers else "trains without a teacher"
    work = replace(work, label_bytes=measured.label_bytes, frame_bytes=measured.frame_bytes)
    forecast = Forecast(measured.stages, measured.student, work, measured.cores, before_s + measured.start_s)
    checks["storage"] = _storage(run, forecast)
    checks["resources"] = ", ".join(f"{stage.num_workers} x {stage.name}" for stage in forecast.workers)
    return PlanReport(checks, measured, forecast, _network_bytes(run, plan, work))


def _work(run: Run, plan: Plan) -> Work:
    """What is left to do; bytes are not known yet."""
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    found = checkpoint.newest(run.output)
    position = checkpoint.position(found) if found else Position()
    items = worklist.training_items(run, plan, specs, (position.epoch, position.round))
    to_label = sum(worklist.num_rows(plan, item) for item in items)
    if run.labels.mode == "live":  # each epoch anew
        to_label = plan.num_examples
    to_train = sum(map(len, plan.rows(TRAIN))) if run.recipe.trains else 0
    epochs = max(0.0, run.train.epochs - position.num_examples / to_train) if to_train else 0.0
    return Work(to_label, to_train, epochs, run.labels.mode, 0.0, 0.0, plan.chunk_size)


def _sets(run: Run, specs: dict[str, LabelSetSpec]) -> str:
    found = [spec.name + ("" if LabelSet.find(run.store, spec) else " (new)") for spec in specs.values()]
    return ", ".join(found)


def _storage(run: Run, forecast: Forecast) -> str:
    """How much will be stored. Raises StorageError when a local disk has less room."""
    needed = forecast.storage_bytes()
    text = f"{needed / 1e6:.1f} MB of labels and frames"
    if "://" in run.store:
        return text
    folder = run.store
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"needs {needed / 1e9:.1f} GB for labels and frames, the disk has {free / 1e9:.1f} GB left"
        raise StorageError(what, where=run.store, action="free space, name another labels.store, or set data.keep_frames: none")
    return f"{text}, {free / 1e9:.0f} GB free"


def _network_bytes(run: Run, plan: Plan, work: Work) -> float:
    """Bytes read and written: videos once a labelling, and once an epoch when frames are not kept; labels once in, and out each epoch."""
    per_clip = _video_bytes(plan) / max(plan.num_examples, 1)
    stored = work.label_bytes + work.frame_bytes
    again = 0.0 if run.kept_frames != "none" else per_clip
    total: float = work.to_label * (per_clip + stored) + work.epochs * work.to_train * (stored + again)
    return total


def _video_bytes(plan: Plan) -> float:
    tables = [plan.examples(chunk) for chunk in plan.chunks]
    sizes = [table[schema.SIZE_BYTES].to_numpy() for table in tables if schema.SIZE_BYTES in table.column_names]
    return float(sum(np.nansum(column.astype(float)) for column in sizes))
