"""Region features: against slow loops, with networks of random and of published weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vkd import resnet
from vkd.clips import Sampling
from vkd.efficientnet import VARIANTS, EfficientNetLite, packaged_weights
from vkd.efficientnet import preprocess as scaled
from vkd.errors import TeacherError
from vkd.region_features import BACKBONES, NUM_REGIONS, RegionNetwork, pool_regions
from vkd.resnet import ResNet50
from vkd.stage_maps import stage_maps
from vkd.teachers.base import probe_frames
from vkd.weights import load_weights

State = dict[str, Tensor]


def unit(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def loops(maps: list[Tensor], kernels: tuple[int, ...]) -> np.ndarray:
    """[n, r, c]: every region of every map by itself, in float64."""
    side = (maps[-1].shape[2] - kernels[-1]) // -(-kernels[-1] // 2) + 1
    parts = []
    for x, kernel in zip(maps, kernels, strict=True):
        step, values = -(-kernel // 2), x.double().numpy()
        windows = (values.shape[2] - kernel) // step + 1
        pooled = np.zeros((len(values), windows, windows, values.shape[1]))
        for row in range(windows):
            for column in range(windows):
                window = values[:, :, row * step : row * step + kernel, column * step : column * step + kernel]
                pooled[:, row, column] = window.max(axis=(2, 3))
        pooled = unit(pooled)
        adapted = np.zeros((len(values), side * side, values.shape[1]))
        for region in range(side * side):
            top, bottom = region // side * windows // side, -(-(region // side + 1) * windows // side)
            left, right = region % side * windows // side, -(-(region % side + 1) * windows // side)
            adapted[:, region] = pooled[:, top:bottom, left:right].max(axis=(1, 2))
        parts.append(unit(adapted))
    return unit(np.concatenate(parts, axis=2))


def random_resnet() -> State:
    """A state dict whose BatchNorms are no identities."""
    torch.manual_seed(0)
    network = ResNet50()
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.05, 0.2)
        elif "bn" in name and value.is_floating_point():
            value.add_(torch.randn_like(value) * 0.1)
    return dict(network.state_dict())


def maps_of_resnet(state: State, x: Tensor) -> list[Tensor]:
    """Read off the state dict one operation at a time."""

    def conv(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, scale, shift = (state[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = F.max_pool2d(F.pad(conv(x, "conv1", "bn1", 2).relu(), (1, 1, 1, 1), value=-np.inf), 3, 2)
    maps = []
    for layer, num_blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for i in range(num_blocks):
            block, stride = f"layer{layer}.{i}.", 2 if layer > 1 and i == 0 else 1
            hidden = conv(x, f"{block}conv1", f"{block}bn1").relu()
            hidden = conv(hidden, f"{block}conv2", f"{block}bn2", stride).relu()
            hidden = conv(hidden, f"{block}conv3", f"{block}bn3")
            x = (hidden + (conv(x, f"{block}downsample.0", f"{block}downsample.1", stride) if i == 0 else x)).relu()
        maps.append(x)
    return maps


@pytest.fixture(scope="module")
def state() -> State:
    return random_resnet()


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return torch.tensor(probe_frames(Sampling(num_frames=2)))


@torch.no_grad()
def test_resnet_regions_are_those_of_slow_loops(state: State, frames: Tensor, tmp_path: Path) -> None:
    save_file(state, tmp_path / "resnet50.safetensors")
    network, frames = RegionNetwork(BACKBONES["resnet50"], tmp_path / "resnet50.safetensors", None), frames[:1]
    x = (frames.double() / 255 - torch.tensor(resnet.MEAN).double()) / torch.tensor(resnet.STD).double()
    torch.testing.assert_close(resnet.preprocess(frames), x.permute(0, 3, 1, 2).float(), atol=1e-5, rtol=0)
    maps = maps_of_resnet(state, x.permute(0, 3, 1, 2).float())
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    found = network(frames).numpy()
    assert found.shape == (1, NUM_REGIONS, BACKBONES["resnet50"].num_channels)
    np.testing.assert_allclose(found, loops(maps, (28, 14, 6, 3)), atol=1e-5)
    assert len({row.tobytes() for row in found[0]}) == NUM_REGIONS
    logits = network.network(resnet.preprocess(frames))
    expected = maps[-1].mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(logits / expected.abs().max(), expected / expected.abs().max(), atol=1e-5, rtol=0)


def test_the_oldest_files_have_no_counters(state: State, tmp_path: Path) -> None:
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, tmp_path / "resnet50.pth")
    network = ResNet50()
    load_weights(network, tmp_path / "resnet50.pth")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@torch.no_grad()
def test_efficientnet_regions_are_those_of_slow_loops(frames: Tensor) -> None:
    network = RegionNetwork(BACKBONES["efficientnet_lite0"], packaged_weights(0), None)
    plain = EfficientNetLite(VARIANTS[0]).eval()
    plain.load_state_dict(torch.load(packaged_weights(0), weights_only=True))
    maps, _ = stage_maps(plain, ["_blocks.4", "_blocks.10", "_blocks.15", "_bn1"], lambda: plain(scaled(frames)))
    assert [tuple(m.shape[1:]) for m in maps] == [(40, 28, 28), (112, 14, 14), (320, 7, 7), (1280, 7, 7)]
    found = network(frames).numpy()
    assert found.shape == (2, NUM_REGIONS, 1752)
    np.testing.assert_allclose(found, loops([*maps[:3], maps[3].clamp(0, 6)], (14, 6, 3, 3)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=2), 1, atol=1e-5)


@pytest.mark.parametrize("sides", [(56, 28, 14, 7), (64, 32, 16, 8), (56, 29, 15, 8)])
def test_regions_of_other_sizes_are_those_of_slow_loops(sides: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    maps = [torch.randn(2, c, side, side) for c, side in zip((3, 4, 5, 6), sides, strict=True)]
    found = pool_regions(maps, (28, 14, 6, 3))
    assert found.shape == (2, NUM_REGIONS, 18)
    np.testing.assert_allclose(found, loops(maps, (28, 14, 6, 3)), atol=1e-6)


def test_regions_come_row_by_row() -> None:
    x = torch.zeros(1, 2, 7, 7)
    x[0, 0, 0, 6] = 1  # top right, within one window only
    x[0, 1] = 0.5
    assert pool_regions([x], (3,))[0, :, 0].gt(0).nonzero().flatten().tolist() == [2]


def test_parameters_and_keys_of_resnet50(state: State) -> None:
    network = ResNet50()
    assert sum(p.numel() for p in network.parameters()) == 25_557_032
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer4.2.bn3.bias", "fc.bias"} <= set(state)
    assert "layer1.1.downsample.0.weight" not in state and len(state) == 320


def test_a_state_dict_of_another_network_is_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.safetensors")
    with pytest.raises(TeacherError, match=r"'bn1\.weight' is missing"):
        load_weights(ResNet50(), tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-7])
    with pytest.raises(TeacherError, match="cannot be read as a state dict"):
        load_weights(ResNet50(), tmp_path / "damaged.safetensors")
