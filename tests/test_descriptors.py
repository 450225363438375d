"""Descriptors against a slow loop, their projection, and what of them a store keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd import checkpoint, models
from vkd.descriptors import Descriptor, StageLabels, check_options, chosen, projection
from vkd.errors import ConfigError
from vkd.models import ModelSpec
from vkd.schema import FRAMES, TensorType
from vkd.store.encodings import decode, encode
from vkd.students import STUDENTS
from vkd.teachers.student import StudentTeacher


def slowly(clip: np.ndarray) -> np.ndarray:
    """[6, c] of one map [c, t, h, w], value by value in fp64."""
    rows = np.zeros((6, len(clip)))
    for c, channel in enumerate(clip.astype(np.float64)):
        values = [channel[t, y, x] for t, y, x in np.ndindex(channel.shape)]
        mean = sum(values) / len(values)
        rows[0, c], rows[1, c] = mean, (sum((v - mean) ** 2 for v in values) / len(values) + 1e-5) ** 0.5
        num_times = len(channel)
        for step in range(4):
            times = range(step * num_times // 4, -(-(step + 1) * num_times // 4))
            rows[2 + step, c] = sum(channel[t].mean() for t in times) / len(times)
    return rows


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_a_descriptor_equals_a_loop(b: int, c: int, t: int, s: int, seed: int) -> None:
    x = 3 + torch.randn(b, c, t, s, s + 1, generator=torch.Generator().manual_seed(seed))
    expected = np.stack([slowly(clip) for clip in x.numpy()])
    np.testing.assert_allclose(Descriptor(c)(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Descriptor(c, 1, "proj128")(x)[:, :, :c], expected, rtol=1e-5, atol=1e-5)


def test_one_value_has_the_least_deviation() -> None:
    assert Descriptor(1)(torch.full((1, 1, 1, 1, 1), 7.0)).flatten().tolist() == pytest.approx([7, 1e-5**0.5, 7, 7, 7, 7])


def test_it_counts_in_fp32_under_autocast() -> None:
    x = torch.randn(2, 200, 4, 3, 3)
    for form in ("full", "proj128"):
        descriptor = Descriptor(200, 0, form)
        with torch.autocast("cpu", torch.bfloat16):
            found = descriptor(x)
        assert found.dtype == torch.float32
        assert torch.equal(found, descriptor(x))
    assert Descriptor(200)(x.bfloat16()).dtype == torch.float32


def test_gradients_are_finite_also_where_nothing_varies() -> None:
    x = torch.zeros(2, 3, 4, 2, 2, requires_grad=True)
    Descriptor(3)(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("num_channels", [129, 320, 1024])
def test_the_projection_is_orthonormal_fixed_and_another_for_each_stage(num_channels: int) -> None:
    matrix = projection(2, num_channels)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(128), atol=1e-5)
    np.testing.assert_array_equal(matrix, projection(2, num_channels))
    assert np.abs(matrix - projection(3, num_channels)).max() > 0.1


def test_the_projection_is_the_same_on_every_machine() -> None:
    np.testing.assert_allclose(projection(0, 320)[0, :4], [0.01604744, -0.04292563, 0.04774623, -0.09167613], atol=1e-6)


@pytest.mark.parametrize("num_channels", [1, 24, 128])
def test_few_channels_are_kept_as_they_are(num_channels: int) -> None:
    x = torch.randn(2, num_channels, 4, 2, 2)
    projected = Descriptor(num_channels, 0, "proj128")(x)
    assert projected.shape == (2, 6, 128)
    assert torch.equal(projected[:, :, :num_channels], Descriptor(num_channels)(x))
    assert not projected[:, :, num_channels:].any()


def test_nothing_of_it_is_saved_or_learns() -> None:
    descriptor = Descriptor(200, 0, "proj128")
    assert not descriptor.state_dict()
    assert not list(descriptor.parameters())


def test_labels_of_stages() -> None:
    torch.manual_seed(0)
    labels = StageLabels(["a", "b"], [200, 10], "proj128")
    maps = [torch.randn(3, 200, 4, 2, 2), torch.randn(3, 10, 2, 1, 1)]
    found = labels(maps)
    assert labels.emits == {"stage1": TensorType("float32", (6, 128)), "stage2": TensorType("float32", (6, 128))}
    assert all(torch.equal(found[f"stage{k + 1}"], Descriptor(x.shape[1], k, "proj128")(x)) for k, x in enumerate(maps))
    assert StageLabels(["a", "b"], [200, 10], "full").emits["stage2"].shape == (6, 10)
    assert labels.identity() == {"substages": ["a", "b"], "descriptors": "proj128", "descriptors_version": 1}
    nothing = StageLabels((), (), "proj128")
    assert (nothing.emits, nothing.identity(), nothing([])) == ({}, {}, {})


def test_what_the_options_ask_for() -> None:
    assert chosen(True, ("a", "b")) == ("a", "b")
    assert chosen(False, ("a", "b")) == chosen([], ("a", "b")) == ()
    assert chosen(["b"], ("a", "b")) == ("b",)
    with pytest.raises(ConfigError, match="substages: the model names no substages"):
        chosen(True, ())
    check_options(["a"], "full")
    for substages, form, message in (("layer1", "full", "'layer1'"), (True, "half", "'half'"), (False, "full", "without substages")):
        with pytest.raises(ValueError, match=message):
            check_options(substages, form)


def stored(values: np.ndarray, encoding: str, tensor: TensorType) -> pa.Table:
    columns = encode("x", values, np.ones(len(values), bool), tensor, encoding)
    return pa.table([array for _, array in columns], schema=pa.schema([field for field, _ in columns]))


def exported(folder: Path) -> str:
    """The folder of a four-stage student of 1000 classes; its last stage is wider than what is kept."""
    torch.manual_seed(0)
    spec = ModelSpec(name="tiny_r3d", options={"widths": [8, 16, 32, 160], "num_frames": 4, "size_px": 32})
    checkpoint.export(models.build(spec, STUDENTS, "student", heads={"logits": 1000}), spec, str(folder), {})
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> StudentTeacher:
    teacher = StudentTeacher(exported(tmp_path_factory.mktemp("student")), substages=True)
    teacher.load("cpu")
    return teacher


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 4, 32, 32, 3), np.uint8)


def test_bytes_of_a_compact_row(teacher: StudentTeacher, frames: np.ndarray) -> None:
    """Four stages of 6 x 128 fp16, and 20 logits of fp16 and int32 with their logsumexp."""
    labels = teacher({FRAMES: frames})
    stages = [stored(labels[f"stage{k}"], "fp16", teacher.emits[f"stage{k}"]).nbytes for k in range(1, 5)]
    assert stages == [len(frames) * 1536] * 4
    assert sum(stages) / len(frames) == 6144
    logits = stored(labels["logits"], "topk:20", teacher.emits["logits"])
    assert logits.nbytes / len(frames) == 20 * (2 + 4) + 4


@pytest.mark.parametrize(("encoding", "tolerance"), [("fp32", 1e-6), ("fp16", 5e-3)])
def test_what_the_store_gives_back_is_what_a_live_teacher_says(
    teacher: StudentTeacher, frames: np.ndarray, encoding: str, tolerance: float
) -> None:
    labels = teacher({FRAMES: frames})
    live: list[Tensor] = teacher.maps(torch.tensor(frames))
    for stage, x in enumerate(live):
        name = f"stage{stage + 1}"
        offline = torch.tensor(np.asarray(decode(stored(labels[name], encoding, teacher.emits[name]), "x")))
        online = Descriptor(x.shape[1], stage, "proj128")(x)
        torch.testing.assert_close(offline, online, rtol=tolerance, atol=tolerance * float(online.abs().max()))
        gram = [rows.flatten(1) @ rows.flatten(1).T for rows in (offline, online)]
        torch.testing.assert_close(*gram, rtol=tolerance, atol=0)
