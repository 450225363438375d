"""Checks of a run's labels: every planned clip is labelled or rejected, every file is whole, a live teacher still agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vkd import planning, schema, stages
from vkd.errors import StorageError
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.run import Run
from vkd.store.encodings import cosine, decode
from vkd.store.housekeeping import verify_files
from vkd.store.labelset import LabelSet, Reject
from vkd.teachers.base import Teacher

MIN_COSINE = 0.99


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
    """All checks; `agreement` is the lowest cosine of labels made again, by teacher label."""

    sets: list[SetCheck]
    agreement: dict[str, float]

    @property
    def ok(self) -> bool:
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
    """One rejected clip."""

    clip: str
    stage: str
    kind: str
    message: str

    def cells(self) -> Sequence[str]:
        return self.clip, self.stage, self.kind, self.message


def verify(run: Run, num_sampled: int) -> Verification:
    """Check all label sets of a run, and label `num_sampled` clips again in this process."""
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    sets = {alias: LabelSet.open(run.labels.store, spec) for alias, spec in planning.label_specs(run, teachers).items()}
    planned = {chunk: plan.examples(chunk).num_rows for chunk in plan.chunks}
    checks = []
    for label_set in sets.values():
        for view in range(run.data.views.count):
            found = verify_files(label_set, view, planned)
            counts = found.num_planned, found.num_labelled, found.num_rejected, len(found.lacking)
            checks.append(SetCheck(label_set.spec.name, view, *counts, found.corrupt))
    agreement: dict[str, float] = {}
    for alias, teacher in teachers.items():
        if num_sampled and sets[alias].missing(0, plan.chunks) != plan.chunks:
            agreement |= _label_again(run, plan, teacher, sets[alias], num_sampled)
    return Verification(checks, agreement)


def list_rejects(run: Run) -> list[Rejected]:
    """Every rejected clip of the teachers' sets, view by view."""
    plan, found = Plan.of(run), []
    for alias, spec in planning.label_specs(run, planning.build_teachers(run.recipe.teachers)).items():
        if alias == FRAMES_ALIAS:
            continue
        label_set = LabelSet.open(run.labels.store, spec)
        for view in range(run.data.views.count):
            for chunk in sorted(label_set.committed(view).keys() & set(plan.chunks)):
                found += _rejects_of(plan, label_set, view, chunk)
    return found


def _rejects_of(plan: Plan, label_set: LabelSet, view: int, chunk: Chunk) -> list[Rejected]:
    table, uris = label_set.read(view, chunk), plan.examples(chunk)[schema.URI].to_pylist()
    columns = (schema.STATUS, schema.REJECT_STAGE, schema.REJECT_KIND, schema.REJECT_MESSAGE)
    rows = table.select(columns).to_pylist()
    return [
        Rejected(uri, row[schema.REJECT_STAGE], row[schema.REJECT_KIND], row[schema.REJECT_MESSAGE])
        for uri, row in zip(uris, rows, strict=True)
        if row[schema.STATUS] == schema.REJECTED
    ]


def _label_again(run: Run, plan: Plan, teacher: Teacher, label_set: LabelSet, num_sampled: int) -> dict[str, float]:
    """Lowest cosine between stored labels and those that this process makes of a seeded sample of view 0; empty without a usable clip."""
    teacher.load(stages.device())
    rng = np.random.default_rng(0)
    lowest: dict[str, float] = {}
    chunks = sorted(label_set.committed(0).keys() & set(plan.chunks))
    for chunk in (chunks[i] for i in rng.integers(len(chunks), size=num_sampled).tolist()):
        try:
            table, examples = label_set.read(0, chunk, verify=True), plan.examples(chunk).to_pylist()
        except StorageError:
            continue  # `verify_files` tells of it
        row = int(rng.integers(table.num_rows))
        (frames,) = stages.decode_or_reject([stages.clip_of(examples[row], run.data.views, 0)], planning.decoding(run, [teacher.sampling]))
        if isinstance(frames, Reject) or table[schema.STATUS][row].as_py() == schema.REJECTED:
            continue
        answered = teacher({schema.FRAMES: frames[0][None]})
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
