"""A student as a teacher answers exactly what the exported student answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import exported_student

from vkd.checkpoint import load_student
from vkd.descriptors import VERSION, Descriptor, Form
from vkd.errors import ConfigError, StorageError, TeacherError
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


@pytest.mark.parametrize("name", ["shift_cnn", "tiny_vit", "tiny_r3d"])
@pytest.mark.parametrize("form", ["proj128", "full"])
def test_describes_what_the_student_sees(tmp_path: Path, name: str, form: Form) -> None:
    path = exported_student(tmp_path / "student", name=name)
    teacher, student = StudentTeacher(path, substages=True, descriptors=form), load_student(path).eval()
    emitted = teacher.emits
    teacher.load("cpu")
    frames = teacher.probe_batch()[FRAMES]
    with torch.inference_mode():
        maps, outputs = student.stages(torch.tensor(frames))
    labels = teacher({FRAMES: frames})
    assert set(labels) - {FRAMES} == {*outputs, *(f"stage{k + 1}" for k in range(len(maps)))}
    for stage, x in enumerate(maps):
        assert emitted[f"stage{stage + 1}"].shape == (6, 128 if form == "proj128" else x.shape[1])
        torch.testing.assert_close(torch.tensor(labels[f"stage{stage + 1}"]), Descriptor(x.shape[1], stage, form)(x))
    plain = StudentTeacher(path)
    plain.load("cpu")
    for label in outputs:
        np.testing.assert_array_equal(plain({FRAMES: frames})[label], labels[label])


def test_identity_changes_only_with_the_options(tmp_path: Path) -> None:
    path = exported_student(tmp_path / "student")
    plain, described = StudentTeacher(path).identity(), StudentTeacher(path, substages=True).identity()
    assert set(plain) == {"name", "version", "sha256"}
    own = ["blocks.0", "blocks.1", "blocks.2"]
    assert described == plain | {"substages": own, "descriptors": "proj128", "descriptors_version": VERSION}
    assert described == StudentTeacher(path, substages=own).identity()


def test_a_substage_that_is_not_there_is_refused_before_loading(tmp_path: Path) -> None:
    path = exported_student(tmp_path / "student")
    with pytest.raises(ConfigError, match=r"substages: ShiftCNN has no part 'blocks.7' -> did you mean blocks"):
        _ = StudentTeacher(path, substages=["blocks.7"]).emits
