"""What evaluation says of a student that is its own teacher, of another one, and when there is nothing to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch

from vkd import checkpoint, evaluation, models
from vkd.errors import ConfigError
from vkd.evaluation import Answers, evaluate, retention_rows
from vkd.models import ModelSpec
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import URI, VAL
from vkd.students import STUDENTS
from vkd.students.base import FEATURES

SPEC = ModelSpec(name="shift_cnn", options={"num_frames": 2, "size_px": 32})


def exported(folder: Path, seed: int) -> str:
    """The folder of a student of random weights."""
    torch.manual_seed(seed)
    student = models.build(SPEC, STUDENTS, "student", heads={"logits": 5, "embedding": 8})
    for parameter in student.heads.parameters():
        torch.nn.init.normal_(parameter)  # so that clips differ in what is said of them
    checkpoint.export(student, SPEC, str(folder), {})
    return str(folder)


@pytest.fixture(scope="module")
def taught(labelled: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run whose teacher is an exported student, labelled; and that student's folder."""
    folder = tmp_path_factory.mktemp("taught")
    student = exported(folder / "student", seed=0)
    encodings = "{features: fp32, logits: fp32, embedding: fp32}"
    teacher = f"recipe.teacher={{name: student, path: {student}}}"
    run = small.changed(labelled, f"labels.store={folder}/labels", f"labels.encodings={encodings}", teacher, "data.keep_frames=none")
    small.label(run)
    return run, student


@pytest.fixture(scope="module")
def measured(taught: tuple[Run, str]) -> dict[str, Any]:
    return evaluate(*taught)


def test_a_student_that_is_its_teacher_agrees_with_it(measured: dict[str, Any]) -> None:
    assert measured["num_clips"] == 6
    assert measured["fidelity"] == pytest.approx(
        {
            "teacher.logits.top1_agreement": 1.0,
            "teacher.logits.kl_nats": 0.0,
            "teacher.embedding.cosine": 1.0,
            "teacher.features.cosine": 1.0,
        },
        abs=1e-5,
    )


def test_its_cost_is_its_teachers(measured: dict[str, Any]) -> None:
    student, teacher = measured["cost"]["student"], measured["cost"]["teacher"]
    assert student["parameters"] == teacher["parameters"] > 300_000
    assert student["flops"] == teacher["flops"] > 1e6
    assert student["latency_s"] > 0


def test_probes_count_what_they_saw(measured: dict[str, Any]) -> None:
    probes = measured["probes"]
    assert probes["counts"] == {"train": 15, "held_out": 6, "classes": 2}
    for name in ("knn", "linear probe"):
        assert 0 <= probes[name]["student"] <= 1
        assert probes[name]["retention"] == pytest.approx(probes[name]["student"] / probes[name]["teacher.embedding"])


def test_the_result_is_plain_json_and_a_table(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    rows = {what: rest for what, *rest in retention_rows(measured)}
    assert rows["teacher.logits.top1 agreement"] == ["1.000", "", ""]
    assert rows["parameters, millions"][2] == "1.000"
    assert {"knn accuracy, teacher.embedding", "GFLOPs a clip", "ms a clip, batch of 1"} <= set(rows)
    assert all(isinstance(cell, str) for cells in rows.values() for cell in cells)


def test_another_student_agrees_less(taught: tuple[Run, str], tmp_path: Path) -> None:
    fidelity = evaluate(taught[0], exported(tmp_path, seed=1))["fidelity"]
    assert fidelity["teacher.embedding.cosine"] < 0.9
    assert fidelity["teacher.logits.kl_nats"] > 0.01


def test_outputs_that_do_not_correspond_are_not_compared(labelled: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = models.build(SPEC, STUDENTS, "student", heads={"logits": 7})
    checkpoint.export(student, SPEC, str(tmp_path), {})
    assert evaluate(labelled, str(tmp_path))["fidelity"] == {}


def test_rejected_clips_are_not_counted(spoiled: Run, tmp_path: Path) -> None:
    measured = evaluate(spoiled, exported(tmp_path, seed=0))
    assert measured["num_clips"] == 4
    assert measured["probes"] == {}  # one class is left


def test_nothing_held_out_says_which_key(labelled: Run, tmp_path: Path) -> None:
    run = small.changed(labelled, "data.split={by: none}")
    with pytest.raises(ConfigError, match=r"data\.split: nothing is held out to evaluate on -> set data\.split\.by to time"):
        evaluate(run, exported(tmp_path, seed=0))


def test_only_rejected_clips_held_out_says_so(spoiled: Run, tmp_path: Path) -> None:
    for seed in range(100):  # hold out b_dull alone
        run = small.changed(spoiled, f"data.split={{by: group, group: uri, holdout: 0.3, seed: {seed}}}")
        plan = Plan.of(run)
        uris = {plan.examples(c)[URI][i].as_py() for c, rows in zip(plan.chunks, plan.rows(VAL), strict=True) for i in rows}
        if [Path(uri).name for uri in uris] == ["b_dull.mp4"]:
            break
    with pytest.raises(ConfigError, match=r"every held-out clip is rejected -> vkd verify RUN --rejects"):
        evaluate(run, exported(tmp_path, seed=0))


def test_no_student_says_what_makes_one(labelled: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no exported student"):
        evaluate(labelled, str(tmp_path))


def answers(classes: list[int]) -> Answers:
    points = np.eye(3, dtype=np.float32)[classes] + 0.01 * np.arange(len(classes), dtype=np.float32)[:, None]
    return Answers({FEATURES: points}, {"teacher.embedding": points}, np.array(classes))


def test_probes_of_separable_features_are_right_and_keep_all() -> None:
    found = evaluation._probes(answers([0, 1, 2, 0, 1, 2, -1]), answers([2, 1, 0, -1]))
    for name in ("knn", "linear probe"):
        assert found[name] == {"student": 1.0, "teacher.embedding": 1.0, "retention": 1.0}
    assert found["counts"] == {"train": 6, "held_out": 3, "classes": 3}


def test_nothing_is_kept_of_a_teacher_that_knows_nothing() -> None:
    wrong = answers([1, 0])
    held = Answers(wrong.student, wrong.teacher, np.array([0, 1]))
    found = evaluation._probes(answers([0, 1, 0, 1]), held)
    assert found["knn"] == {"student": 0.0, "teacher.embedding": 0.0}


@pytest.mark.parametrize(("train", "val"), [([-1, -1], [-1]), ([0, 0, -1], [0]), ([0, 1], [-1])])
def test_without_two_labelled_classes_there_are_no_probes(train: list[int], val: list[int]) -> None:
    assert evaluation._probes(answers(train), answers(val)) == {}
