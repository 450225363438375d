"""A small 3D residual CNN in four stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vkd.clips import Sampling
from vkd.layers import check_clips, num_groups
from vkd.students.base import Student

NUM_STAGES = 4


class TinyR3D(Student):
    """R3D (Tran et al. 2018) with one basic block a stage and GroupNorm; features are the mean over time and space.

    `widths` are the channels of the stages, of which all but the first halve time and space; `stem_px` is the stem's kernel in space,
    `stem_stride` its stride there, or those in time and in space. Parameters without the heads: 0.36 M (355,110; 80 features) of widths
    10, 20, 40, 80, for clips of any length and size.
    """

    def __init__(
        self,
        heads: Mapping[str, int],
        widths: Sequence[int] = (10, 20, 40, 80),
        stem_stride: int | Sequence[int] = 2,
        stem_px: int = 7,
        num_frames: int = 8,
        size_px: int = 64,
    ) -> None:
        if len(widths) != NUM_STAGES or min(widths) < 1:
            raise ValueError(f"widths {list(widths)} must be {NUM_STAGES} numbers of at least 1")
        strides = [1, stem_stride] if isinstance(stem_stride, int) else [*stem_stride]
        if len(strides) != 2 or not {*strides} <= {1, 2} or stem_px not in (3, 5, 7):
            raise ValueError(f"stem_stride is {stem_stride} and stem_px {stem_px}; they can be 1, 2 (or [1 or 2, 1 or 2]) and 3, 5, 7")
        super().__init__(Sampling(num_frames=num_frames, size_px=size_px), widths[-1], heads)
        first, second, third, fourth = widths
        kernel, stride, padding = (3, stem_px, stem_px), (strides[0], strides[1], strides[1]), (1, stem_px // 2, stem_px // 2)
        self.stem = nn.Sequential(nn.Conv3d(3, first, kernel, stride, padding, bias=False), Norm(first), nn.ReLU())
        self.layer1, self.layer2 = BasicBlock(first, first), BasicBlock(first, second, stride=2)
        self.layer3, self.layer4 = BasicBlock(second, third, stride=2), BasicBlock(third, fourth, stride=2)
        self.substages = tuple(f"layer{number}" for number in range(1, NUM_STAGES + 1))

    def features(self, clips: Float[Tensor, "b t 3 s s"]) -> Float[Tensor, "b d"]:
        """Pooled features of normalised clips. Raises ValueError when they are not of the sampling's length and size."""
        check_clips(clips, self.sampling)
        # normalised frames lie channels-last in memory, and so do all maps after them: a CPU trains faster so
        maps: Tensor = self.stem(clips.transpose(1, 2))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = layer(maps)
        return maps.mean(dim=(2, 3, 4))


class Norm(nn.GroupNorm):
    """GroupNorm of at most 8 groups. Where each channel is a group, a CPU takes channels one after another, and puts them last again.

    That takes it a fraction of the time that it takes for such groups in maps whose channels lie last.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_groups(num_channels), num_channels)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """What GroupNorm gives, up to rounding."""
        if not x.is_cpu or self.num_groups < self.num_channels:
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last_3d)


class BasicBlock(nn.Module):
    """A residual block of two 3x3x3 convolutions; the stride holds in time and space."""

    def __init__(self, num_in: int, num_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.norm1 = Norm(num_out)
        self.conv2 = nn.Conv3d(num_out, num_out, 3, padding=1, bias=False)
        self.norm2 = Norm(num_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv3d(num_in, num_out, 1, stride, bias=False), Norm(num_out))

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c2 t2 h2 w2"]:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))
