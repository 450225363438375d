"""The teacher of region features: which frames it looks at, what it refuses, and its whitening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from vkd.clips import Sampling
from vkd.errors import ConfigError, TeacherError
from vkd.region_features import BACKBONES
from vkd.resnet import ResNet50
from vkd.schema import DURATION_S, END_S, FRAMES, START_S, Columns, TensorType
from vkd.teachers.base import probe_frames
from vkd.teachers.regions import RegionsTeacher
from vkd.whitening import Whiten, Whitening, network_of


@pytest.fixture(scope="module")
def teacher() -> RegionsTeacher:
    teacher = RegionsTeacher(max_frames=3)
    teacher.load("cpu")
    return teacher


def batch(spans: list[tuple[str, str, str]], num_frames: int = 3) -> Columns:
    frames = probe_frames(Sampling(num_frames=num_frames))
    columns = zip((START_S, END_S, DURATION_S), zip(*spans, strict=True), strict=True)
    return {FRAMES: np.stack([np.roll(frames, 30 * i, axis=2) for i in range(len(spans))])} | {k: np.array(v) for k, v in columns}


def test_a_short_clip_has_only_its_own_frames(teacher: RegionsTeacher) -> None:
    given = batch([("0.0", "0.5", "9.0"), ("0.0", "", ""), ("8.0", "", "8.1"), ("0.0", "9.0", "9.0")])
    labels = teacher(given)["regions"]
    assert [row.shape for row in labels] == [(t, 9, 1752) for t in (2, 3, 1, 3)]
    for row, (label, frames) in enumerate(zip(labels, given[FRAMES], strict=True)):
        expected = teacher.module(torch.tensor(frames))
        np.testing.assert_allclose(label, expected[: len(label)], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(label, axis=2), 1, atol=1e-5)
        assert label.dtype == np.float32, row


@given(st.floats(0, 100), st.floats(0.01, 40), st.sampled_from([1.0, 4.0, 7.5]))
def test_frames_that_are_kept_are_those_that_differ(start_s: float, span_s: float, fps: float) -> None:
    teacher = RegionsTeacher(fps=fps, max_frames=16)
    end_s = start_s + span_s
    times = teacher.sampling.timestamps_s(start_s, end_s, "")
    num_before_end = int((start_s + np.arange(16) / fps < end_s - 1e-5).sum())
    kept = teacher.num_frames(str(start_s), str(end_s), "")
    assert kept in (max(num_before_end, 1), int((times < np.nextafter(end_s, start_s)).sum()))
    assert teacher.num_frames(str(start_s), "", str(end_s)) == kept


def test_a_span_that_was_computed_has_no_frame_more() -> None:
    teacher = RegionsTeacher(fps=10)
    assert (0.9 - 0.6) * 10 > 3 and teacher.num_frames("0.6", "0.9", "") == 3
    assert (teacher.num_frames("", "", ""), teacher.num_frames("3.0", "3.0", "")) == (64, 1)


def test_it_whitens(teacher: RegionsTeacher, tmp_path: Path) -> None:
    given, rng = batch([("0", "9", "9"), ("0", "9", "9")]), np.random.default_rng(0)
    plain, (mean, *vectors) = teacher(given)["regions"], rng.normal(size=(21, 1752)).astype(np.float32) / 50
    fitted = Whitening(mean, np.geomspace(1, 1e-4, 20, dtype=np.float32), np.stack(vectors, axis=1), 0)
    (tmp_path / "whitening.safetensors").write_bytes(fitted.to_bytes())
    whitened = RegionsTeacher(max_frames=3, whitening=str(tmp_path / "whitening.safetensors"), dims=8)
    whitened.load("cpu")
    assert whitened.emits == {"regions": TensorType("float32", (None, 9, 8))}
    for found, label in zip(whitened(given)["regions"], plain, strict=True):
        np.testing.assert_allclose(found, Whiten(fitted.first(8))(torch.tensor(label)), atol=1e-3)
    assert sum(p.numel() for p in whitened.module.parameters()) == sum(p.numel() for p in teacher.module.parameters())


def test_resnet50_and_the_reference_pca(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(ResNet50().state_dict(), tmp_path / "resnet50.safetensors")
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(3840, 5)))[0]
    torch.save({"mean": torch.zeros(3840), "d": torch.ones(5), "V": torch.tensor(vectors)}, tmp_path / "pca.pth")
    options: dict[str, Any] = {"backbone": "resnet50", "weights": str(tmp_path / "resnet50.safetensors"), "max_frames": 1}
    teacher = RegionsTeacher(**options, whitening=str(tmp_path / "pca.pth"))
    teacher.load("cpu")
    assert teacher(teacher.probe_batch())["regions"][0].shape == (1, 9, 5)
    assert RegionsTeacher(**options).emits["regions"].row_shape == (9, BACKBONES["resnet50"].num_channels)


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "resnet18"},
        {"precision": "auto"},
        {"size_px": 192},
        {"size_px": 288},
        {"weights": None, "backbone": "resnet50"},
        {"dims": 8},
        {"batch_size": 0},
        {"fps": 0},
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RegionsTeacher(**options)


@pytest.mark.parametrize("size_px", [224, 256])
def test_there_are_nine_regions_at_both_ends_of_sizes(size_px: int) -> None:
    teacher = RegionsTeacher(size_px=size_px, max_frames=1)
    teacher.load("cpu")
    assert teacher(teacher.probe_batch())["regions"][0].shape == (1, 9, 1752)


def test_a_whitening_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(TeacherError, match=r"cannot be loaded: FileNotFoundError.*vkd whiten"):
        RegionsTeacher(whitening=str(path)).identity()
    path.write_bytes(b"no whitening")
    with pytest.raises(TeacherError, match="the whitening cannot be loaded: ValueError"):
        _ = RegionsTeacher(whitening=str(path)).emits
    path.write_bytes(Whitening(np.zeros(5, np.float32), np.ones(2, np.float32), np.ones((5, 2), np.float32), 9).to_bytes())
    with pytest.raises(TeacherError, match=r"is of 5 values; efficientnet_lite0 gives 1752"):
        RegionsTeacher(whitening=str(path)).load("cpu")
    with pytest.raises(ConfigError, match="of 2 dims cannot give 3"):
        _ = RegionsTeacher(whitening=str(path), dims=3).emits
    with pytest.raises(TeacherError, match=r"nowhere.*no such file"):
        RegionsTeacher(backbone="resnet50", weights="nowhere").identity()


def test_a_whitening_of_another_network_or_its_other_weights_is_refused(tmp_path: Path) -> None:
    """Both give as many values: nothing else would tell."""
    path, values = tmp_path / "w.safetensors", np.zeros(1752, np.float32)
    fitted = Whitening(values, np.ones(2, np.float32), np.ones((1752, 2), np.float32), 9)
    own = network_of(RegionsTeacher().identity())
    for network in ("", own):
        path.write_bytes(fitted._replace(network=network).to_bytes())
        assert RegionsTeacher(whitening=str(path)).identity()["whitening"]["sha256"]
    path.write_bytes(fitted._replace(network="efficientnet_lite0 (weights 0123)").to_bytes())
    with pytest.raises(TeacherError) as told:
        RegionsTeacher(whitening=str(path)).identity()
    assert f"fitted on features of efficientnet_lite0 (weights 0123), these are of {own}" in str(told.value)
