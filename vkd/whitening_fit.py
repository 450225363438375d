"""Fitting a PCA whitening on stored region features; the teacher `regions` then gives whitened ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from vkd import planning, schema
from vkd.errors import ConfigError
from vkd.planning import Plan
from vkd.region_store import REGIONS
from vkd.run import Run
from vkd.store import files
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.whitening import Covariance, network_of

RECORD = ".json"  # beside the file: what it was fitted on


@dataclass(frozen=True)
class WhiteningReport:
    """What a whitening was fitted on, and the share of the variance that its dims have."""

    path: str
    alias: str  # of the run's teacher whose regions it is of
    clips: int
    vectors: int
    num_channels: int
    dims: int
    variance: float


def fit(run: Run, out: str, dims: int) -> WhiteningReport:
    """Fit a whitening on the regions that the store holds of the run's first teacher and train split, and write it to a file.

    Done once: labels name the file by its digest, and another machine would fit the last digits differently. One chunk's
    labels are in memory at a time. Raises ConfigError when the regions are whitened already or span fewer dims, or when the file
    is there and was fitted on something else, and LabelsMissing when some are not labelled.
    """
    if run.labels.mode == "live":
        raise ConfigError("mode live keeps no labels", where="labels.mode", action="set it to tee, then vkd label RUN")
    plan, (alias, network, label_set) = Plan.of(run), _regions(run)
    planning.require_labels(run, plan, label_set)
    fitted_on = schema.digest(label_set.spec.name, plan.manifest_digest, run.data.split.model_dump_json(), label_set.views(), dims)
    if (report := _fitted_before(out, fitted_on)) is not None:
        return report
    if files.exists(out):
        what = "this file was fitted on something else, and labels may name it"
        raise ConfigError(what, where=out, action="name another file, or delete this one to fit it anew")
    covariance, num_clips = _covariance(plan, label_set)
    whitening = covariance.whitening(dims)._replace(network=network)
    variance = float(whitening.eigenvalues.sum(dtype=np.float64) * covariance.count / np.trace(covariance.scatter))
    report = WhiteningReport(out, alias, num_clips, covariance.count, len(covariance.mean), dims, variance)
    record = json.dumps({"fitted_on": fitted_on, "report": asdict(report)})
    files.put(out + RECORD, record.encode())  # first: without the file it says nothing
    files.put(out, whitening.to_bytes())
    return report


def _fitted_before(out: str, fitted_on: str) -> WhiteningReport | None:
    """What was told of the file when it was fitted; None when there is none, or it was fitted on something else."""
    try:
        told = files.read_json(out + RECORD, ("fitted_on", "report"))
    except FileNotFoundError:
        return None
    known = told["fitted_on"] == fitted_on and files.exists(out)
    return WhiteningReport(**told["report"] | {"path": out}) if known else None


def _regions(run: Run) -> tuple[str, str, LabelSet]:
    """Alias, network and label set of the run's first teacher. Raises ConfigError when it emits no regions, or whitened ones."""
    alias, teacher = planning.first_teacher(run)
    found = teacher.emits.get(REGIONS)
    if found is None or not found.ragged:
        action = "name the teacher regions"
        raise ConfigError(f"it emits no {REGIONS!r} of frames, but {', '.join(teacher.emits)}", where=f"recipe.{alias}", action=action)
    identity = teacher.identity()
    if identity.get("whitening") is not None:
        action = "leave the teacher's whitening out, and label that"
        raise ConfigError("its regions are whitened already", where=f"recipe.{alias}.whitening", action=action)
    return alias, network_of(identity), LabelSet.open(run.store, planning.teacher_spec(run, alias, teacher))


def _covariance(plan: Plan, label_set: LabelSet) -> tuple[Covariance, int]:
    """Over all stored views of the train split's labelled rows, and the number of these clips."""
    covariance, seen = Covariance(label_set.spec.tensors[REGIONS].row_shape[-1]), set[str]()
    committed = {view: label_set.committed(view) for view in label_set.views()}
    for chunk, train in zip(plan.chunks, plan.rows(schema.TRAIN), strict=True):
        for view in (view for view, there in committed.items() if train and chunk in there):
            table = label_set.read(view, chunk, [REGIONS], attempt=committed[view][chunk]).combine_chunks()
            status, ids = table[schema.STATUS].to_pylist(), table[schema.EXAMPLE_ID].to_pylist()
            for row in (row for row in train if status[row] == schema.LABELLED):
                regions = decode(table, REGIONS, np.array([row]))[0]  # one at a time: double precision takes four times the bytes
                covariance.add(regions.reshape(-1, regions.shape[-1]))
                seen.add(ids[row])
    return covariance, len(seen)
