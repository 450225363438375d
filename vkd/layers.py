"""Blocks that models share."""

from __future__ import annotations

import math

import torch
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


def group_norm(num_channels: int, max_groups: int = 8) -> nn.GroupNorm:
    """GroupNorm of as many groups as divide both numbers: each example is normalised by itself."""
    return nn.GroupNorm(math.gcd(num_channels, max_groups), num_channels)


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
