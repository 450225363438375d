"""A student as a teacher answers exactly what the exported student answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_contract import exported_student

from vkd.checkpoint import load_student
from vkd.errors import StorageError, TeacherError
from vkd.teachers.base import FRAMES
from vkd.teachers.student import StudentTeacher


def test_answers_what_the_student_answers(tmp_path: Path) -> None:
    path = exported_student(tmp_path / "student")
    teacher, student = StudentTeacher(path), load_student(path).eval()
    teacher.load("cpu")
    assert set(teacher.emits) == {"features", "logits", "embedding"}
    assert teacher.emits["logits"].shape == (10,)
    assert teacher.sampling == student.sampling
    batch = teacher.probe_batch()
    with torch.inference_mode():
        expected = student(torch.tensor(batch[FRAMES]))
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(teacher(batch)[name]), value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["absent", "empty", "cut"])
def test_broken_export_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    file = Path(exported_student(tmp_path / "student")) / name
    data = file.read_bytes()
    file.unlink()
    if damage != "absent":
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises((TeacherError, StorageError), match=name):
        StudentTeacher(str(file.parent)).load("cpu")


def test_config_without_sampling_is_refused(tmp_path: Path) -> None:
    file = Path(exported_student(tmp_path / "student")) / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "sampling"}))
    with pytest.raises(TeacherError, match="sampling"):
        StudentTeacher(str(file.parent))


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    path = exported_student(tmp_path / "student")
    full, low = StudentTeacher(path), StudentTeacher(path, precision="bf16")
    for teacher in (full, low):
        teacher.load("cpu")
    a, b = (torch.tensor(teacher(teacher.probe_batch())["logits"]) for teacher in (full, low))
    assert a.dtype == b.dtype == torch.float32
    assert 0.99 < float(torch.cosine_similarity(a, b)) < 1 - 1e-7
    assert "precision" not in full.identity()
    with pytest.raises(ValueError, match="precision is 'auto'"):
        StudentTeacher(path, precision="auto")
