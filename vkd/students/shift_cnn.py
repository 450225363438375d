"""A small 2D CNN whose frames talk through temporal shifts; made to train fast on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from vkd.clips import Sampling
from vkd.layers import ShiftBlock, check_clips, group_norm
from vkd.stage_maps import frames_as_map
from vkd.students.base import Student


class Size(NamedTuple):
    """Channels and residual blocks of each stage; each stage after the first halves the resolution."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]


SIZES = {
    "small": Size((32, 64, 128), (1, 1, 1)),
    "medium": Size((40, 80, 160), (1, 2, 2)),
    "large": Size((56, 112, 224), (1, 2, 3)),
}


class ShiftCNN(Student):
    """A residual network with temporal shifts (TSM) and GroupNorm; features are the mean over time and space.

    Parameters without the heads: small 0.31 M (128 features), medium 1.06 M (160), large 2.98 M (224). Heads of together
    n outputs on d features add (d + 1) * n: 0.29 M for 1000 logits and a 1280-d embedding on small.
    """

    def __init__(
        self,
        heads: Mapping[str, int],
        size: Literal["small", "medium", "large"] = "small",
        num_frames: int = 8,
        size_px: int = 64,
    ) -> None:
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}")
        widths, depths = SIZES[size]
        super().__init__(Sampling(num_frames=num_frames, size_px=size_px), widths[-1], heads)
        # stride 4 at once: full 3x3 convolutions at low resolution beat depthwise ones at high resolution on a CPU
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 7, stride=4, padding=3, bias=False), group_norm(widths[0]), nn.ReLU())
        blocks = [ShiftBlock(widths[0], widths[0]) for _ in range(depths[0])]
        for (num_in, num_out), depth in zip(pairwise(widths), depths[1:], strict=True):
            blocks += [ShiftBlock(num_in, num_out, stride=2), *(ShiftBlock(num_out, num_out) for _ in range(depth - 1))]
        self.blocks = nn.Sequential(*blocks)
        self.substages = tuple(f"blocks.{end - 1}" for end in accumulate(depths))

    def features(self, clips: Float[Tensor, "b t 3 s s"]) -> Float[Tensor, "b d"]:
        """Pooled features of normalised clips. Raises ValueError when they are not of the sampling's length and size."""
        check_clips(clips, self.sampling)
        maps: Tensor = self.blocks(self.stem(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]))
        return maps.mean(dim=(1, 3, 4))

    def as_map(self, output: Tensor, num_clips: int) -> Float[Tensor, "b c t h w"]:
        """The output of a block [b t c h w], or of a part inside one [(b t) c h w]. Raises ConfigError when it is no map."""
        return output.transpose(1, 2) if output.ndim == 5 else frames_as_map(output, num_clips, self.sampling.num_frames)
