"""Fitting a linear probe on stored embeddings, cross-fitted by a manifest column; `teachers/probe.py` answers with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vkd import planning, schema
from vkd.errors import ConfigError
from vkd.metrics.probes import fit_linear
from vkd.planning import Plan
from vkd.run import Run
from vkd.store import files
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.teachers.probe import EMBEDDING, Probe


@dataclass(frozen=True)
class ProbeReport:
    """What a probe was fitted on, and how often it is right about rows that it never saw: None when it is not cross-fitted."""

    path: str
    alias: str  # of the run's teacher whose embedding it reads
    clips: int
    rows: int  # a clip counts once a view
    classes: list[str]
    groups: int
    accuracy: float | None


class Rows(NamedTuple):
    """Embeddings [n, d] of labelled clips in plan order, one a view, with each one's class number and group name."""

    embedding: np.ndarray
    number: np.ndarray
    group: np.ndarray
    num_clips: int


def fit(run: Run, out: str, by: str | None, label: str) -> ProbeReport:
    """Fit a probe on what the store holds of the run's first teacher, and write it to a file.

    One classifier is fitted on all rows of the train split that have a `label`, and one for each value of the column `by` on the
    rows without it; rows with nothing in `by` are left out. Raises ConfigError when that gives no answer for every class.
    """
    if run.labels.mode == "live":
        raise ConfigError("mode live keeps no labels", where="labels.mode", action="set it to tee, then vkd label RUN")
    plan, (alias, label_set) = Plan.of(run), _embeddings(run)
    planning.require_labels(run, plan, label_set)
    planning.require_columns(plan, [label, *filter(None, [by])], run.data.manifest)
    classes = _classes(plan, label)
    rows = _read(plan, label_set, classes, label, by)
    probe = cross_fit(rows, [*map(str, classes)], by)
    files.put(out, probe.to_bytes())
    accuracy = None
    if by is not None:
        accuracy = float((probe.logits(rows.embedding, probe.entries(rows.group.tolist())).argmax(axis=1) == rows.number).mean())
    return ProbeReport(out, alias, rows.num_clips, len(rows.number), [*probe.classes], len(probe.groups), accuracy)


def cross_fit(rows: Rows, classes: Sequence[str], by: str | None) -> Probe:
    """The probe of these rows. Raises ConfigError when a classifier would lack a class."""
    if len(classes) < 2:
        what = f"a probe needs two classes; there {'is one' if classes else 'are none'}"
        raise ConfigError(what, where="--label", action="name a column that tells clips apart")
    if absent := sorted(set(range(len(classes))) - set(rows.number.tolist())):
        what = f"no labelled clip of the train split is of class {classes[absent[0]]!r}{'' if by is None else f' and has a {by}'}"
        raise ConfigError(what, where="--label", action="label more clips, hold out others, or take the class out of the manifest")
    groups = [] if by is None else sorted(set(rows.group.tolist()))
    for group in groups:
        left = set(rows.number[rows.group != group].tolist())
        if alone := sorted(set(range(len(classes))) - left):
            what = f"only {by} {group!r} has clips of class {classes[alone[0]]!r}: no fit without it knows that class"
            raise ConfigError(what, where="--by", action="name another column, or leave that class unlabelled")
    embedding = rows.embedding.astype(np.float64)
    fitted = [fit_linear(embedding, rows.number)]
    for group in groups:
        others = rows.group != group
        fitted.append(fit_linear(embedding[others], rows.number[others]))
    weight, bias, mean, scale = (np.stack(parts).astype(np.float32) for parts in zip(*fitted, strict=True))
    return Probe(weight, bias, mean, scale, classes, by, groups)


def _embeddings(run: Run) -> tuple[str, LabelSet]:
    """The alias and the label set of the run's first teacher. Raises ConfigError when it emits no embedding."""
    alias, teacher = planning.first_teacher(run)
    found = teacher.emits.get(EMBEDDING)
    if found is None or len(found.shape) != 1 or found.ragged:
        action = "name a teacher that emits one vector a clip"
        raise ConfigError(f"it emits no 1-D {EMBEDDING!r}, but {', '.join(teacher.emits)}", where=f"recipe.{alias}", action=action)
    return alias, LabelSet.open(run.store, planning.teacher_spec(run, alias, teacher))


def _classes(plan: Plan, label: str) -> list[str]:
    """Sorted values of the label column in all of the plan; of `label` they are the classes that training counts."""
    return sorted({value for chunk in plan.chunks for value in plan.examples(chunk)[label].to_pylist()} - {None})


def _read(plan: Plan, label_set: LabelSet, classes: Sequence[str], label: str, by: str | None) -> Rows:
    """All stored views of the train split's rows that have a class and, with `by`, a group."""
    parts: list[tuple[np.ndarray, ...]] = []
    committed = {view: label_set.committed(view) for view in label_set.views()}
    for chunk, train in zip(plan.chunks, plan.rows(schema.TRAIN), strict=True):
        examples = plan.examples(chunk)
        numbers = planning.label_numbers(examples, classes, label)
        groups = np.full(examples.num_rows, "") if by is None else planning.text_columns(examples, [by])[by]
        usable = [row for row in train if numbers[row] >= 0 and (by is None or groups[row])]
        for view in (view for view, there in committed.items() if chunk in there):
            table = label_set.read(view, chunk, [EMBEDDING], attempt=committed[view][chunk]).combine_chunks()
            status = table[schema.STATUS].to_pylist()
            kept = np.array([row for row in usable if status[row] == schema.LABELLED], np.int64)
            ids = np.array(table[schema.EXAMPLE_ID].to_pylist(), np.str_)
            parts.append((np.asarray(decode(table, EMBEDDING, kept)), numbers[kept], groups[kept], ids[kept]))
    embedding, number, group, example_id = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Rows(embedding, number, group, len(set(example_id.tolist())))
