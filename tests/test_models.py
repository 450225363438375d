"""Named models: what a run file may write, and what it becomes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fakes
import pytest

from vkd.errors import ConfigError
from vkd.models import ModelSpec, build, find
from vkd.recipes import RECIPES
from vkd.students import STUDENTS
from vkd.students.shift_cnn import ShiftCNN
from vkd.teachers import TEACHERS


@pytest.mark.parametrize(
    ("written", "name", "options"),
    [
        ("shift_cnn", "shift_cnn", {}),
        ({"name": "shift_cnn"}, "shift_cnn", {}),
        ({"name": "shift_cnn", "size": "large", "size_px": 32}, "shift_cnn", {"size": "large", "size_px": 32}),
        ({"name": "shift_cnn", "options": {"size": "large"}}, "shift_cnn", {"size": "large"}),
    ],
)
def test_what_a_run_file_may_write(written: Any, name: str, options: dict[str, Any]) -> None:
    spec = ModelSpec.model_validate(written)
    assert (spec.name, spec.options) == (name, options)
    assert ModelSpec.model_validate(spec.model_dump()) == spec


@pytest.mark.parametrize("registry", [STUDENTS, TEACHERS, RECIPES])
def test_every_registered_name_is_there(registry: dict[str, str]) -> None:
    for name in registry:
        assert isinstance(find(ModelSpec(name=name), registry, "model"), type)


def test_a_model_from_outside_needs_no_registration() -> None:
    teacher = build(ModelSpec(name="fakes:TinyTeacher", options={"size_px": 8}), TEACHERS, "teacher")
    assert type(teacher) is fakes.TinyTeacher
    assert teacher.sampling.size_px == 8


def test_what_the_caller_decides_is_given() -> None:
    student = build(ModelSpec(name="shift_cnn"), STUDENTS, "student", heads={"logits": 3})
    assert type(student) is ShiftCNN
    assert student.heads["logits"].out_features == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "shift_cn"}, r"unknown student 'shift_cn' -> use one of coarse, fine, .*, or package\.module:Class"),
        ({"name": "gone_package.students:A"}, "cannot be imported: No module named 'gone_package'"),
        ({"name": "fakes:Gone"}, "cannot be imported: .*'Gone'"),
        ({"name": "shift_cnn", "siz": 3}, r"has no option 'siz' -> it takes size, num_frames, size_px"),
        ({"name": "shift_cnn", "heads": {}}, "has no option 'heads'"),
        ({"name": "tiny_vit", "size_px": 30}, "student 'tiny_vit': .* must be a multiple"),
    ],
)
def test_an_error_names_the_model_and_the_choices(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(ModelSpec.model_validate(spec), STUDENTS, "student", heads={})


def test_a_broken_module_is_not_taken_for_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_model.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        find(ModelSpec(name="broken_model:A"), {}, "student")
    assert "broken_model" not in sys.modules
