"""A small video transformer over tubelets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vkd.clips import Sampling
from vkd.layers import EncoderBlock, check_clips
from vkd.stage_maps import no_map
from vkd.students.base import Student

TUBELET_FRAMES, TUBELET_PX = 2, 8
NUM_BLOCKS = 4


class Size(NamedTuple):
    """Width of the tokens, and attention heads."""

    dim: int
    num_heads: int


SIZES = {"small": Size(128, 4), "medium": Size(192, 6)}


class TinyViT(Student):
    """A transformer of 4 blocks over 2x8x8 tubelets with learned positions; features are the mean of the tokens.

    Parameters without the heads, for 8 frames of 64 px: small 0.88 M (128 features), medium 1.90 M (192).
    """

    def __init__(
        self,
        heads: Mapping[str, int],
        size: Literal["small", "medium"] = "small",
        num_frames: int = 8,
        size_px: int = 64,
    ) -> None:
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
        if num_frames % TUBELET_FRAMES or size_px % TUBELET_PX:
            raise ValueError(f"num_frames {num_frames} must be a multiple of {TUBELET_FRAMES} and size_px {size_px} of {TUBELET_PX}")
        dim, num_heads = SIZES[size]
        super().__init__(Sampling(num_frames=num_frames, size_px=size_px), dim, heads)
        num_tokens = num_frames // TUBELET_FRAMES * (size_px // TUBELET_PX) ** 2
        self.embed = nn.Linear(TUBELET_FRAMES * 3 * TUBELET_PX**2, dim)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens, dim), std=0.02))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, num_heads) for _ in range(NUM_BLOCKS)))
        self.norm = nn.LayerNorm(dim)
        self.substages = (*(f"blocks.{i}" for i in range(NUM_BLOCKS - 1)), "norm")

    def features(self, clips: Float[Tensor, "b t 3 s s"]) -> Float[Tensor, "b d"]:
        """Pooled features of normalised clips. Raises ValueError when they are not of the sampling's length and size."""
        check_clips(clips, self.sampling)
        tokens: Tensor = self.norm(self.blocks(self.embed(tubelets(clips)) + self.positions))
        return tokens.mean(dim=1)

    def as_map(self, output: Tensor, num_clips: int) -> Float[Tensor, "b c t h w"]:
        """The grid of tokens [b n c]. Raises ConfigError when the output is no such grid."""
        num_rows = self.sampling.size_px // TUBELET_PX
        grid = (self.sampling.num_frames // TUBELET_FRAMES, num_rows, num_rows)
        if output.ndim != 3 or output.shape[1] != math.prod(grid):
            raise no_map(output)
        return output.transpose(1, 2).reshape(len(output), output.shape[2], *grid)


def tubelets(clips: Float[Tensor, "b t 3 s s"]) -> Float[Tensor, "b n p"]:
    """Non-overlapping 2x8x8 blocks of a clip, flattened; in order of time, row, column."""
    b, t, channels, size_px, _ = clips.shape
    num_times, num_rows = t // TUBELET_FRAMES, size_px // TUBELET_PX
    blocks = clips.reshape(b, num_times, TUBELET_FRAMES, channels, num_rows, TUBELET_PX, num_rows, TUBELET_PX)
    return blocks.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)
