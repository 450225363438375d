"""What a student kept of its teacher on held-out clips: fidelity, probes on labels, and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vkd import checkpoint, planning, schema
from vkd.errors import ConfigError
from vkd.feeding import Feeder, open_sets
from vkd.metrics import cost, fidelity, probes
from vkd.planning import Plan
from vkd.run import Run
from vkd.stages import device
from vkd.students.base import FEATURES, Student

BATCH_SIZE = 32
EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True)
class Answers:
    """What student and teachers said of the clips of one split, row by row; `classes` is -1 where there is no label."""

    student: Mapping[str, np.ndarray]
    teacher: Mapping[str, np.ndarray]
    classes: np.ndarray


def evaluate(run: Run, folder: str) -> dict[str, Any]:
    """Fidelity, probes, cost and retention of an exported student, as one JSON-able tree. Raises ConfigError when nothing is held out."""
    if planning.student_sampling(run) is None:
        return _without_frames(run, folder)
    student = checkpoint.load_student(folder).to(device())
    plan, sets = open_sets(run, Plan.of(run))
    feeders = {split: Feeder(run, plan, sets, split) for split in (schema.TRAIN, schema.VAL)}
    if not sum(feeders[schema.VAL].sizes):
        raise ConfigError("nothing is held out to evaluate on", where="data.split", action="set data.split.by to time, group or column")
    answers = {split: _answers(feeder, student) for split, feeder in feeders.items()}
    if not len(answers[schema.VAL].classes):
        action = "vkd verify RUN --rejects lists them; hold out others"
        raise ConfigError("every held-out clip is rejected", where="data.split", action=action)
    measured = {"num_clips": len(answers[schema.VAL].classes), "fidelity": _fidelity(answers[schema.VAL])}
    measured["probes"] = _probes(answers[schema.TRAIN], answers[schema.VAL])
    measured["cost"] = _cost(run, student)
    return measured


def _without_frames(run: Run, folder: str) -> dict[str, Any]:
    """What the recipe measures of a student that reads no frames."""
    student = checkpoint.load_similarity(folder)
    plan, sets = open_sets(run, Plan.of(run))
    feeder = Feeder(run, plan, sets, schema.VAL)
    if not sum(feeder.sizes):
        raise ConfigError("nothing is held out to evaluate on", where="data.split", action="set data.split.by to time, group or column")
    with torch.inference_mode():
        held_out = feeder.stream(feeder.one_pass(run.held_out_view), run.train.batch_size, seed=0)
        found = run.recipe.evaluate(student, (fed.batch for fed in held_out))
    measured = {"num_clips": sum(feeder.sizes) - feeder.left_out, "fidelity": dict(found), "probes": {}}
    return measured | {"cost": {"student": {"parameters": cost.num_parameters(student)}}}


def _answers(feeder: Feeder, student: Student) -> Answers:
    """The student's outputs and the teachers' labels over one pass of view 0."""
    said: dict[str, list[np.ndarray]] = {}
    taught: dict[str, list[np.ndarray]] = {}
    classes: list[np.ndarray] = []
    with torch.inference_mode():
        for fed in feeder.stream(feeder.one_pass(feeder.run.held_out_view), BATCH_SIZE, seed=0):
            real = fed.batch[schema.WEIGHT].numpy() > 0
            for name, tensor in student(fed.batch[schema.FRAMES].to(device())).items():
                said.setdefault(name, []).append(tensor.float().cpu().numpy()[real])
            for name in fed.batch.keys() - {schema.FRAMES, schema.LABEL, schema.EXAMPLE, schema.WEIGHT}:
                taught.setdefault(name, []).append(fed.batch[name].numpy()[real])
            classes.append(fed.batch[schema.LABEL].numpy()[real])
    return Answers(_joined(said), _joined(taught), np.concatenate(classes) if classes else np.zeros(0, np.int64))


def _joined(parts: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _fidelity(answers: Answers) -> dict[str, float]:
    """Agreement of each of the student's outputs with the teacher label of the same name."""
    found = {}
    for column, taught in answers.teacher.items():
        said = answers.student.get(column.partition(".")[2])
        if said is None or said.shape != taught.shape:
            continue
        if column.endswith(f".{LOGITS}"):
            found[f"{column}.top1_agreement"] = fidelity.top1_agreement(said, taught)
            found[f"{column}.kl_nats"] = fidelity.mean_kl(said, taught)
        else:
            found[f"{column}.cosine"] = fidelity.mean_cosine(said, taught)
    return found


def _probes(train: Answers, val: Answers) -> dict[str, dict[str, float]]:
    """k-NN and linear-probe accuracy of student and teacher features; empty without at least two labelled classes."""
    seen, held = train.classes >= 0, val.classes >= 0
    if not held.any() or len(set(train.classes[seen].tolist())) < 2:
        return {}
    found: dict[str, dict[str, float]] = {}
    for name, probe in (("knn", probes.knn_accuracy), ("linear probe", _linear)):
        of_student = probe(train.student[FEATURES][seen], train.classes[seen], val.student[FEATURES][held], val.classes[held])
        found[name] = {"student": of_student}
        for column in (c for c in train.teacher if c.endswith(f".{EMBEDDING}")):
            of_teacher = probe(train.teacher[column][seen], train.classes[seen], val.teacher[column][held], val.classes[held])
            found[name] |= {column: of_teacher} | ({"retention": of_student / of_teacher} if of_teacher else {})
    found["counts"] = {"train": int(seen.sum()), "held_out": int(held.sum()), "classes": len(set(train.classes[seen].tolist()))}
    return found


def _linear(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    return probes.linear_probe(train_x, train_y, test_x, test_y).accuracy


def _cost(run: Run, student: Student) -> dict[str, dict[str, float]]:
    """Parameters, FLOPs and latency of one clip, for the student and each teacher, on this device."""
    shape = (1, student.sampling.num_frames, student.sampling.size_px, student.sampling.size_px, 3)
    frames = torch.zeros(shape, dtype=torch.uint8, device=device())
    found = {"student": _measure(student, lambda: student(frames)["features"].cpu())}
    for alias, teacher in planning.build_teachers(run.recipe.teachers).items():
        teacher.load(device())
        probe = teacher.probe_batch()
        found[alias] = _measure(teacher.module, lambda teacher=teacher, probe=probe: teacher(probe))  # type: ignore[misc]
    return found


def _measure(module: nn.Module, call: Callable[[], object]) -> dict[str, float]:
    with torch.inference_mode():
        latency = cost.latency_s(call)
        return {
            "parameters": cost.num_parameters(module),
            "flops": cost.flops(call),
            "latency_s": latency.median_s,
            "latency_iqr_s": latency.spread_s,
        }


def retention_rows(measured: Mapping[str, Any]) -> Sequence[tuple[str, str, str, str]]:
    """(what, student, teacher, student / teacher) for a table, from `evaluate`'s tree."""
    rows = [
        (f"{name} accuracy, {column}", *_compared(values["student"], value, "{:.3f}"))
        for name, values in measured["probes"].items()
        for column, value in values.items()
        if column.endswith(f".{EMBEDDING}")
    ]
    rows += [(name.replace("_", " "), f"{value:.3f}", "", "") for name, value in sorted(measured["fidelity"].items())]
    student = measured["cost"]["student"]
    for alias, teacher in measured["cost"].items():
        if alias != "student":
            rows.append(("parameters, millions", *_compared(student["parameters"] / 1e6, teacher["parameters"] / 1e6, "{:.2f}")))
            rows.append(("GFLOPs a clip", *_compared(student["flops"] / 1e9, teacher["flops"] / 1e9, "{:.2f}")))
            rows.append(("ms a clip, batch of 1", *_compared(student["latency_s"] * 1e3, teacher["latency_s"] * 1e3, "{:.1f}")))
    return rows


def _compared(student: float, teacher: float, form: str) -> tuple[str, str, str]:
    return form.format(student), form.format(teacher), f"{student / teacher:.3f}" if teacher else "-"
