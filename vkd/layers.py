"""Blocks that models share."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vkd.clips import Sampling


def temporal_shift(x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
    """The first c // 8 channels taken from the frame before, the next c // 8 from the frame after, zeros past the ends.

    Lin et al. 2019, TSM: Temporal Shift Module for Efficient Video Understanding.
    """
    num_shifted = x.shape[2] // 8
    forward = F.pad(x[:, :, :num_shifted], (0, 0, 0, 0, 0, 0, 1, -1))
    backward = F.pad(x[:, :, num_shifted : 2 * num_shifted], (0, 0, 0, 0, 0, 0, -1, 1))
    return torch.cat([forward, backward, x[:, :, 2 * num_shifted :]], dim=2)


def num_groups(num_channels: int, max_groups: int = 8) -> int:
    """As many groups as divide both numbers."""
    return math.gcd(num_channels, max_groups)


def group_norm(num_channels: int) -> nn.GroupNorm:
    """GroupNorm of at most 8 groups: each example is normalised by itself."""
    return nn.GroupNorm(num_groups(num_channels), num_channels)


def check_clips(clips: Float[Tensor, "b t 3 h w"], sampling: Sampling) -> None:
    """Raises ValueError when clips are not of the sampling's length and size."""
    num_frames, height_px, width_px = clips.shape[1], clips.shape[3], clips.shape[4]
    if (num_frames, height_px, width_px) != (sampling.num_frames, sampling.size_px, sampling.size_px):
        raise ValueError(
            f"the clips have {num_frames} frames of {height_px}x{width_px} px, the model takes {sampling.num_frames} frames of "
            f"{sampling.size_px}x{sampling.size_px} px: decode with the model's sampling, or build it with num_frames and size_px"
        )


class ShiftBlock(nn.Module):
    """A residual block of two 3x3 convolutions per frame that sees the frames beside it through a temporal shift."""

    def __init__(self, num_in: int, num_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.norm1 = group_norm(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), group_norm(num_out))

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c2 h2 w2"]:
        shifted = temporal_shift(x).flatten(0, 1)
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(shifted)))))
        y = F.relu(residual + self.shortcut(x.flatten(0, 1)))
        return y.reshape(*x.shape[:2], *y.shape[1:])


class EncoderBlock(nn.Module):
    """A pre-norm transformer encoder block: self-attention over all tokens, then an MLP of four times the width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class BatchNorm(nn.Module):
    """Batch normalisation [b c ...] over the rows of weight > 0 of all ranks, on any backend, in float32 or float64.

    What torch's BatchNorm does with the whole batch, running statistics included; a rank may have no row. All ranks must call
    it, and differentiate what it gives, the same number of times. Of a batch without rows nothing is learned.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(num_channels)), nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Float[Tensor, "b c *size"], weight: Float[Tensor, " b"]) -> Float[Tensor, "b c *size"]:
        with torch.autocast(x.device.type, enabled=False):
            present = (weight > 0).reshape(-1, *[1] * (x.ndim - 1))
            rows = torch.where(present, x if x.dtype == torch.float64 else x.float(), 0)  # what masked rows hold may be NaN
            if not self.training:
                return F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            over, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
            own = present.sum() * math.prod(x.shape[2:])
            sums: Tensor = _SumOverRanks.apply(torch.cat([rows.sum(dim=over), own[None]]))  # type: ignore[no-untyped-call]
            count = sums[-1].detach().clamp_min(1)
            mean = sums[:-1] / count
            centred = torch.where(present, rows - mean.reshape(shape), 0)
            # a second sum: the mean of squares less the squared mean would lose digits
            variance: Tensor = _SumOverRanks.apply(centred.square().sum(dim=over)) / count  # type: ignore[no-untyped-call]
            self._follow(mean.detach(), variance.detach(), count, sums[-1].detach() > 0)
            scale = (variance + self.eps).rsqrt() * self.weight
            return centred * scale.reshape(shape) + self.bias.reshape(shape)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor, known: Tensor) -> None:
        unbiased = variance * count / (count - 1).clamp_min(1)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(torch.where(known, new, running), self.momentum)


class _SumOverRanks(torch.autograd.Function):
    """Each rank's loss depends on the sum, so the gradient is the sum of what all of them say."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduced(gradients[0])


def _all_reduced(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
