"""A probe answers each row by the classifier that never saw its group, and files that hold no probe are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from small import exported_student
from test_contract import a_probe, fitted_probe

from vkd.errors import ConfigError, TeacherError
from vkd.models import ModelSpec, build
from vkd.schema import FRAMES
from vkd.teachers import TEACHERS
from vkd.teachers.probe import ABOUT, Probe, ProbeTeacher


def random_probe(num_groups: int, num_classes: int = 3, num_dims: int = 5) -> Probe:
    rng, e = np.random.default_rng(0), 1 + num_groups
    weight, bias, mean = (rng.normal(size=s).astype(np.float32) for s in ((e, num_classes, num_dims), (e, num_classes), (e, num_dims)))
    scale = rng.uniform(0.5, 2, (e, num_dims)).astype(np.float32)
    groups = [f"g{i}" for i in range(num_groups)]
    return Probe(weight, bias, mean, scale, [f"c{i}" for i in range(num_classes)], "group" if groups else None, groups)


@given(st.integers(0, 3), st.lists(st.sampled_from(["g0", "g1", "g2", "other", ""]), max_size=8))
def test_each_row_is_answered_by_its_own_entry(num_groups: int, groups: list[str]) -> None:
    """Against a loop over rows and classes."""
    probe = random_probe(num_groups)
    x = np.random.default_rng(1).normal(size=(len(groups), 5)).astype(np.float32)
    answers = probe.logits(x, probe.entries(groups))
    assert answers.dtype == np.float32
    assert answers.shape == (len(groups), 3)
    for i, group in enumerate(groups):
        e = 1 + list(probe.groups).index(group) if group in probe.groups else 0
        for c in range(3):
            standardised = (x[i].astype(np.float64) - probe.mean[e]) / probe.scale[e]
            assert answers[i, c] == pytest.approx(float(standardised @ probe.weight[e, c]) + probe.bias[e, c], abs=1e-5)


@pytest.mark.parametrize("num_groups", [0, 3])
def test_a_file_gives_back_the_probe(num_groups: int) -> None:
    probe = random_probe(num_groups)
    again = Probe.from_bytes(probe.to_bytes())
    for mine, theirs in zip(probe, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert probe.to_bytes() == again.to_bytes()


def test_passes_on_what_the_wrapped_teacher_emits(tmp_path: Path) -> None:
    options = a_probe(tmp_path)
    teacher, inner = ProbeTeacher(**options), build(ModelSpec.model_validate(options["of"]), TEACHERS, "teacher")
    for each in (teacher, inner):
        each.load("cpu")
    assert teacher.needs == (FRAMES, "person")
    assert teacher.sampling == inner.sampling
    assert set(teacher.emits) == set(inner.emits) - {"embedding"}  # its logits stand for it
    assert teacher.emits["logits"].shape == (4,)
    frames = np.repeat(teacher.probe_batch()[FRAMES], 4, axis=0)
    answered, expected = teacher({FRAMES: frames, "person": np.array(["p1", "", "p0", "new"], object)}), inner({FRAMES: frames})
    assert "embedding" not in answered
    probe = Probe.from_bytes(Path(options["path"]).read_bytes())
    np.testing.assert_array_equal(answered["logits"], probe.logits(expected["embedding"], np.array([2, 0, 1, 0])))
    assert np.ptp(answered["logits"], axis=0).max() > 0.1  # one clip, answered by three classifiers


def test_without_groups_it_needs_frames_only(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    path.write_bytes(random_probe(0, num_dims=16).to_bytes())
    teacher = ProbeTeacher(str(path), {"name": "student", "path": exported_student(tmp_path / "student")})
    teacher.load("cpu")
    assert teacher.needs == (FRAMES,)
    assert teacher(teacher.probe_batch())["logits"].shape == (1, 3)


@pytest.mark.parametrize(
    "damage", ["absent", "empty", "cut", "no probe", "version", "classes", "groups", "twice", "by", "scale", "nan", "dtype"]
)
def test_a_file_that_holds_no_probe_is_refused(tmp_path: Path, damage: str) -> None:
    options = a_probe(tmp_path)
    path = Path(options["path"])
    data = path.read_bytes()
    tensors = safetensors.numpy.load(data)
    changes: dict[str, dict[str, Any]] = {
        "version": {"format_version": 2},
        "classes": {"classes": ["a"]},
        "groups": {"groups": ["p0"]},
        "twice": {"groups": ["p0", "p0"]},
        "by": {"by": None},
        "scale": {"scale": 0 * tensors["scale"]},
        "nan": {"bias": np.nan * tensors["bias"]},
        "dtype": {"mean": tensors["mean"].astype(np.float64)},
    }
    whole = {"format_version": 1, "classes": ["a", "b", "c", "d"], "by": "person", "groups": ["p0", "p1"], **tensors}
    spoilt_parts = whole | changes.get(damage, {})
    about = {name: part for name, part in spoilt_parts.items() if name not in tensors}
    tensors = {name: spoilt_parts[name] for name in tensors}
    spoilt = safetensors.numpy.save(tensors, {ABOUT: json.dumps(about)})
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "no probe": safetensors.numpy.save(tensors)}.get(damage, spoilt))
    if damage == "absent":
        path.unlink()
    teacher = ProbeTeacher(**options)
    for use in (lambda: teacher.emits, lambda: teacher.needs, lambda: teacher.load("cpu")):
        with pytest.raises(
            TeacherError, match=r"probe\.safetensors: the probe cannot be loaded: .* -> name the file that `vkd probe` wrote"
        ):
            use()


@pytest.mark.parametrize(
    ("head", "says"), [({"embedding": 8}, r"an 'embedding' of 16 values; .* one of shape \[8\]"), ({"other": 16}, "emits none")]
)
def test_a_probe_of_another_teacher_is_refused(tmp_path: Path, head: dict[str, int], says: str) -> None:
    of = {"name": "student", "path": exported_student(tmp_path / "student", heads=head)}
    teacher = ProbeTeacher(fitted_probe(tmp_path / "probe.safetensors"), of)
    for use in (lambda: teacher.emits, lambda: teacher.load("cpu")):
        with pytest.raises(TeacherError, match=says):
            use()


@pytest.mark.parametrize("of", ["nobody", {"size": 3}, {"name": "student", "path": "x", "colour": 1}])
def test_a_wrapped_teacher_that_is_none_is_refused(tmp_path: Path, of: object) -> None:
    spec = ModelSpec(name="probe", options={"path": fitted_probe(tmp_path / "probe.safetensors"), "of": of})
    with pytest.raises(ConfigError):
        build(spec, TEACHERS, "teacher")
