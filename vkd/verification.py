"""Checks of a run's labels: every planned clip is labelled or rejected, files are whole, a live teacher agrees, the student used it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vkd import planning, schema, stages, teacher_use, worklist
from vkd.errors import StorageError
from vkd.manifest import Manifest
from vkd.metrics.teacher_use import Finding
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.run import Run
from vkd.store import files
from vkd.store.encodings import cosine, decode
from vkd.store.housekeeping import drop_superseded, label_sets, verify_files
from vkd.store.labelset import LabelSet, Reject
from vkd.teachers.base import Teacher

MIN_COSINE = 0.99
STRAY_AGE_S = 3600.0  # a younger temporary file may be a write in progress


@dataclass(frozen=True)
class SetCheck:
    """One view of one label set: counts of clips, and of chunks that lack or are damaged."""

    name: str
    view: int
    planned: int
    labelled: int
    rejected: int
    missing: int
    damaged: list[str]

    def cells(self) -> Sequence[str]:
        damaged = "; ".join(self.damaged) or "0"
        return self.name, str(self.view), str(self.planned), str(self.labelled), str(self.rejected), str(self.missing), damaged


@dataclass(frozen=True)
class Verification:
    """All checks; `agreement` is the lowest cosine of labels made again, by teacher label; `unused` what training found wrong."""

    sets: list[SetCheck]
    agreement: dict[str, float]
    unused: list[Finding]

    @property
    def ok(self) -> bool:
        return self.labels_ok and not self.unused

    @property
    def labels_ok(self) -> bool:
        whole = all(check.planned == check.labelled + check.rejected and not check.missing and not check.damaged for check in self.sets)
        return whole and all(value >= MIN_COSINE for value in self.agreement.values())

    @property
    def action(self) -> str:
        """What mends the first thing that is wrong."""
        if any(check.damaged for check in self.sets):
            return "delete the damaged files, then vkd label RUN"
        return "vkd label RUN" if any(check.missing for check in self.sets) else "vkd label RUN with another labels.store"


@dataclass(frozen=True)
class Rejected:
    """One rejected clip of a view, or a video that the manifest rejected: it has no clip, view, attempts or decoder."""

    clip: str
    stage: str
    kind: str
    message: str
    permanent: bool
    label_set: str = ""
    view: int | None = None
    start_s: float | None = None
    attempts: int | None = None
    decoder: str = ""

    def __str__(self) -> str:
        where = "" if self.view is None else f" from {self.start_s:g} s, view {self.view} of {self.label_set}"
        tried = "" if self.attempts is None else f", attempts {self.attempts}" + (f", {self.decoder}" if self.decoder else "")
        again = "permanent" if self.permanent else "transient"
        return f"{self.clip}{where}: {self.stage} {self.kind} ({again}{tried}): {self.message}"


@dataclass(frozen=True)
class Cleaned:
    """How many files a cleaning deleted."""

    temporaries: int
    superseded: int

    def __str__(self) -> str:
        return f"{self.temporaries} files of interrupted writes, {self.superseded} superseded files"


def verify(run: Run, num_sampled: int) -> Verification:
    """Check all label sets of a run (of a `live` one what is held out), and label `num_sampled` clips again in this process."""
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    sets = {alias: LabelSet.open(run.store, spec) for alias, spec in planning.label_specs(run, teachers).items()}
    planned: dict[int, dict[Chunk, int]] = {}
    for view, chunk in worklist.wanted(run, plan, (run.train.epochs, 0)):
        planned.setdefault(view, {})[chunk] = plan.examples(chunk).num_rows
    checks = []
    for label_set in sets.values():
        for view in planned:
            found = verify_files(label_set, view, planned[view])
            counts = found.num_planned, found.num_labelled, found.num_rejected, len(found.lacking)
            checks.append(SetCheck(label_set.spec.name, view, *counts, found.corrupt))
    agreement: dict[str, float] = {}
    for alias, teacher in teachers.items():
        if num_sampled and sets[alias].missing(run.held_out_view, plan.chunks) != plan.chunks:
            agreement |= _label_again(run, plan, teacher, sets[alias], num_sampled)
    trained = teacher_use.load(run.output) or {"findings": []}
    return Verification(checks, agreement, [Finding(**found) for found in trained["findings"]])


def clean(run: Run) -> Cleaned:
    """Delete what interrupted writes left in the run's folders, and files of its store of which nothing counts any more."""
    places, now_s = (run.store, run.data.manifest, run.output), time.time()
    strays = {uri for place in places for uri, time_s in files.temporaries(place) if now_s - time_s > STRAY_AGE_S}
    for uri in strays:
        files.delete(uri)
    return Cleaned(len(strays), sum(drop_superseded(label_set) for label_set in label_sets(run.store)))


def list_rejects(run: Run) -> list[Rejected]:
    """Every video that the manifest rejected, and every rejected clip of the teachers' sets, view by view."""
    plan, rejects = Plan.of(run), Manifest.load(run.data.manifest).rejects().to_pylist()
    found = [Rejected(row[schema.URI], "manifest", row["kind"], row["message"], row["permanent"]) for row in rejects]
    for alias, spec in planning.label_specs(run, planning.build_teachers(run.recipe.teachers)).items():
        if alias == FRAMES_ALIAS:
            continue
        label_set = LabelSet.open(run.store, spec)
        for view in label_set.views():
            for chunk in sorted(label_set.committed(view).keys() & set(plan.chunks)):
                found += _rejects_of(plan, label_set, view, chunk)
    return found


def _rejects_of(plan: Plan, label_set: LabelSet, view: int, chunk: Chunk) -> list[Rejected]:
    planned = plan.examples(chunk)
    named = schema.URI if schema.URI in planned.column_names else schema.VIDEO_ID  # rows that are no videos have no uri
    examples = planned.select([named, schema.START_S]).to_pylist()
    reasons = (schema.REJECT_STAGE, schema.REJECT_KIND, schema.REJECT_MESSAGE, schema.REJECT_PERMANENT)
    rows = label_set.read(view, chunk).select([schema.STATUS, *reasons, schema.ATTEMPTS, schema.REJECT_DECODER]).to_pylist()
    return [
        Rejected(
            example[named],
            row[schema.REJECT_STAGE],
            row[schema.REJECT_KIND],
            row[schema.REJECT_MESSAGE],
            row[schema.REJECT_PERMANENT],
            label_set.spec.name,
            view,
            example[schema.START_S],
            row[schema.ATTEMPTS],
            row[schema.REJECT_DECODER],
        )
        for example, row in zip(examples, rows, strict=True)
        if row[schema.STATUS] == schema.REJECTED
    ]


def _label_again(run: Run, plan: Plan, teacher: Teacher, label_set: LabelSet, num_sampled: int) -> dict[str, float]:
    """Lowest cosine between stored labels and those that this process makes of a seeded sample of view 0; empty without a usable clip."""
    teacher.load(stages.device())
    rng = np.random.default_rng(0)
    lowest: dict[str, float] = {}
    columns = planning.columns_for([teacher])
    chunks = sorted(label_set.committed(run.held_out_view).keys() & set(plan.chunks))
    for chunk in (chunks[i] for i in rng.integers(len(chunks), size=num_sampled).tolist()):
        try:
            table, planned = label_set.read(run.held_out_view, chunk, verify=True), plan.examples(chunk)
        except StorageError:
            continue  # `verify_files` tells of it
        row = int(rng.integers(table.num_rows))
        if table[schema.STATUS][row].as_py() == schema.REJECTED:
            continue
        (example,) = planned.slice(row, 1).to_pylist()
        given = planning.text_columns(planned.slice(row, 1), columns)
        if teacher.sampling is not None:
            (frames,) = stages.decode_or_reject([stages.clip_of(example, run.data.views, 0)], planning.decoding(run, [teacher.sampling]))
            if isinstance(frames, Reject):
                continue
            given[schema.FRAMES] = frames[0][None]
        answered = teacher(given)
        for name in teacher.emits:
            stored = np.asarray(decode(table, name, np.array([row]))[0])
            agreement = cosine(_comparable(answered[name][0], label_set, name), stored.ravel())
            lowest[name] = min(lowest.get(name, agreement), agreement)
    return {f"{label_set.spec.alias}.{name}": value for name, value in lowest.items()}


def _comparable(made: np.ndarray, label_set: LabelSet, name: str) -> np.ndarray:
    """A fresh label in the form that the store gives it back (top-k gives log-probabilities)."""
    if not label_set.spec.encodings[name].startswith("topk"):
        return made.ravel()
    shifted = made - made.max()
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return log_probs.ravel()
