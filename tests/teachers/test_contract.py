"""The contract of teachers/base.py, kept by every registered teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import exported_student

from vkd import models
from vkd.errors import ConfigError, TeacherError
from vkd.models import ModelSpec
from vkd.schema import DURATION_S, END_S, FRAMES, START_S, Columns
from vkd.teachers import TEACHERS
from vkd.teachers.base import Teacher
from vkd.teachers.probe import Probe
from vkd.whitening import Whitening

Options = dict[str, Any]


def fitted_probe(path: Path, seed: int = 0) -> str:
    """The file of a random probe on embeddings of 16 values, cross-fitted by `person`."""
    rng = np.random.default_rng(seed)
    weight, bias, mean = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 4, 16), (3, 4), (3, 16)))
    probe = Probe(weight, bias, mean, np.full((3, 16), 0.1, np.float32), ["a", "b", "c", "d"], "person", ["p0", "p1"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(probe.to_bytes())
    return str(path)


def a_whitening(path: Path, seed: int = 0) -> str:
    """The file of a random whitening to 4 dims of region features of EfficientNet-Lite0."""
    mean, vectors = np.zeros(1752, np.float32), np.random.default_rng(seed).normal(size=(1752, 4)).astype(np.float32)
    path.write_bytes(Whitening(mean, np.ones(4, np.float32), vectors, 0).to_bytes())
    return str(path)


def a_probe(folder: Path) -> Options:
    of = {"name": "student", "path": exported_student(folder / "student")}
    return {"path": fitted_probe(folder / "probe.safetensors"), "of": of}


# for each teacher, and once more with descriptors or whitened: the options to test it with, and others that must change its identity
CASES: dict[str, tuple[Callable[[Path], Options], list[Callable[[Path], Options]]]] = {
    "efficientnet_lite": (
        lambda tmp: {"num_frames": 2},
        [lambda tmp: {"pool": "max"}, lambda tmp: {"precision": "bf16"}, lambda tmp: {"variant": 1}],
    ),
    "student": (
        lambda tmp: {"path": exported_student(tmp / "a")},
        [lambda tmp: {"path": exported_student(tmp / "b", seed=1)}, lambda tmp: {"precision": "bf16"}, lambda tmp: {"substages": True}],
    ),
    "efficientnet_lite with descriptors": (
        lambda tmp: {"num_frames": 1, "substages": True},
        [lambda tmp: {"descriptors": "full"}, lambda tmp: {"substages": ["_blocks.3", "_blocks.5"]}, lambda tmp: {"substages": False}],
    ),
    "student with descriptors": (
        lambda tmp: {"path": exported_student(tmp / "a", name="tiny_r3d"), "substages": ["layer2", "layer4"], "descriptors": "full"},
        [lambda tmp: {"descriptors": "proj128"}, lambda tmp: {"substages": True}],
    ),
    "probe": (
        a_probe,
        [
            lambda tmp: {"path": fitted_probe(tmp / "b.safetensors", seed=1)},
            lambda tmp: {"of": {"name": "student", "path": exported_student(tmp / "b", seed=1)}},
        ],
    ),
    "regions": (
        lambda tmp: {"max_frames": 2},
        [lambda tmp: {"precision": "bf16"}, lambda tmp: {"whitening": a_whitening(tmp / "w.safetensors")}],
    ),
    "regions whitened": (
        lambda tmp: {"max_frames": 1, "whitening": a_whitening(tmp / "a.safetensors")},
        [lambda tmp: {"whitening": a_whitening(tmp / "b.safetensors", seed=1)}, lambda tmp: {"dims": 3}],
    ),
}
ELSEWHERE = {"pair_scores"}  # look at no frames, and keep the contract in a test of their own
SECOND = {"EfficientNetLite": "_blocks.4", "ShiftCNN": "blocks.1", "TinyR3D": "layer4"}  # the second part that `maps` gives


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Options, Path]:
    folder = tmp_path_factory.mktemp("case")
    return request.param, CASES[request.param][0](folder), folder


@pytest.fixture(scope="module")
def teacher(case: tuple[str, Options, Path]) -> Teacher:
    name, options, _ = case
    teacher = build(name, options)
    teacher.load("cpu")
    return teacher


def build(name: str, options: Options) -> Teacher:
    built: Teacher = models.build(ModelSpec(name=name.partition(" ")[0], options=options), TEACHERS, "teacher")
    return built


def clips(teacher: Teacher, num_clips: int) -> Columns:
    """Noise of growing contrast, read-only as Ray's batches are, and text in the other columns that the teacher needs.

    Nothing is told of when a clip starts and ends, so a teacher of each frame answers for all of them.
    """
    s = teacher.sampling
    rng = np.random.default_rng(0)
    frames = np.stack([rng.integers(0, 20 * (i + 1), (s.num_frames, s.size_px, s.size_px, 3), np.uint8) for i in range(num_clips)])
    frames.flags.writeable = False
    texts = np.array([f"p{i}" for i in range(num_clips)])
    given = {FRAMES: frames} | dict.fromkeys((START_S, END_S, DURATION_S), np.full(num_clips, ""))
    return {name: given.get(name, texts) for name in teacher.needs}


def some(batch: Columns, rows: slice) -> Columns:
    return {name: column[rows] for name, column in batch.items()}


def of_batch_size(options: Options, batch_size: int) -> Options:
    """The same teacher, which takes so many clips at once; a probe leaves that to the teacher that it wraps."""
    return options | ({"of": options["of"] | {"batch_size": batch_size}} if "of" in options else {"batch_size": batch_size})


def test_every_registered_teacher_is_tested() -> None:
    assert {name.partition(" ")[0] for name in CASES} | ELSEWHERE == set(TEACHERS)


def test_output_is_what_emits_says(teacher: Teacher) -> None:
    batch = clips(teacher, 2)
    out = teacher(batch)
    assert set(out) == {*teacher.emits, *batch}
    assert out[FRAMES] is batch[FRAMES]
    for name, tensor in teacher.emits.items():
        assert len(out[name]) == 2
        for row in out[name]:
            assert row.dtype == tensor.dtype
            assert row.shape == ((teacher.sampling.num_frames,) if tensor.ragged else ()) + tensor.row_shape
            assert np.isfinite(row).all()
        assert not np.allclose(out[name][0], out[name][1], atol=1e-4)


def test_input_is_left_alone(teacher: Teacher) -> None:
    batch = clips(teacher, 1) | {"other": np.arange(1)}
    before = batch[FRAMES].copy()
    out = teacher(batch)
    assert set(batch) == {*teacher.needs, "other"}
    np.testing.assert_array_equal(batch[FRAMES], before)
    np.testing.assert_array_equal(out["other"], batch["other"])


def test_empty_batch(teacher: Teacher) -> None:
    out = teacher(some(clips(teacher, 1), slice(0)))
    for name, tensor in teacher.emits.items():
        assert out[name].shape == ((0,) if tensor.ragged else (0, *tensor.shape))


def test_probe_is_deterministic(case: tuple[str, Options, Path], teacher: Teacher) -> None:
    name, options, _ = case
    again = build(name, options)
    again.load("cpu")
    first, second, other = teacher(teacher.probe_batch()), teacher(teacher.probe_batch()), again(again.probe_batch())
    for label in teacher.emits:
        np.testing.assert_array_equal(first[label][0], second[label][0])
        np.testing.assert_array_equal(first[label][0], other[label][0])


def test_rows_do_not_depend_on_their_batch(teacher: Teacher) -> None:
    batch = clips(teacher, 5)
    together = teacher(batch)
    for i in range(5):
        alone = teacher(some(batch, slice(i, i + 1)))
        for name in teacher.emits:
            np.testing.assert_allclose(alone[name][0], together[name][i], atol=1e-4)


def test_identity_is_stable_and_names_what_decides(case: tuple[str, Options, Path]) -> None:
    name, options, folder = case
    identity = build(name, options).identity()
    assert json.loads(json.dumps(identity)) == identity == build(name, options).identity()
    assert identity["name"] == name.partition(" ")[0]
    assert identity["version"] == build(name, options).version
    assert identity == build(name, of_batch_size(options, 3)).identity()
    assert str(folder) not in json.dumps(identity)
    for change in CASES[name][1]:
        assert build(name, options | change(folder)).identity() != identity


def test_nothing_of_a_loaded_teacher_learns(teacher: Teacher) -> None:
    modules = [value for value in vars(teacher).values() if isinstance(value, torch.nn.Module)]
    for module in [*modules, teacher.module]:
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_probe_batch_has_what_it_needs(teacher: Teacher) -> None:
    batch = teacher.probe_batch()
    assert set(batch) == set(teacher.needs)
    assert FRAMES in batch
    assert all(batch[name].tolist() == [""] for name in teacher.needs if name != FRAMES)


def test_use_before_load_is_refused(case: tuple[str, Options, Path]) -> None:
    name, options, _ = case
    fresh = build(name, options)
    with pytest.raises(TeacherError, match="not loaded"):
        fresh(fresh.probe_batch())


def test_maps_are_those_that_are_described(teacher: Teacher) -> None:
    frames = torch.tensor(clips(teacher, 2)[FRAMES])
    if not teacher.stage_names:
        with pytest.raises(ConfigError, match="gives no maps"):
            teacher.maps(frames)
        return
    maps = teacher.maps(frames)
    assert not any(x.requires_grad or x.is_inference() for x in maps)  # what learns from them may save them
    assert all(x.ndim == 5 and len(x) == 2 for x in maps)
    torch.testing.assert_close(teacher.maps(frames, [SECOND[type(teacher.module).__name__]])[0], maps[1])


def test_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="it takes variant"):
        build("efficientnet_lite", {"varient": 1})
    with pytest.raises(ConfigError, match="variant is 7"):
        build("efficientnet_lite", {"variant": 7})
