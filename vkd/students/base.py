"""The contract that every student keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, overload

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from vkd.clips import Sampling
from vkd.schema import FRAMES
from vkd.stage_maps import no_map, stage_maps

FEATURES = "features"


class Student(nn.Module, ABC):
    """A backbone that pools a clip to one feature vector, and one linear head per label that it answers.

    `heads` maps a label name to its size, taken from what the teacher emits: {"logits": 1000, "embedding": 1280}. So a
    trained student answers exactly what its teacher answered, and can stand in for it.

    `substages` names the parts, in order, where its stages end; the mean of the last one's map is `features`.
    """

    needs: ClassVar[tuple[str, ...]] = (FRAMES,)
    substages: tuple[str, ...] = ()

    def __init__(self, sampling: Sampling, num_features: int, heads: Mapping[str, int]) -> None:
        super().__init__()
        if FEATURES in heads:
            raise ValueError(f"a label named {FEATURES!r} would hide the student's own features; rename it")
        self.sampling, self.num_features = sampling, num_features
        self.heads = nn.ModuleDict(
            {name: nn.Linear(num_features, heads[name]) for name in sorted(heads)}
        )  # their order decides their weights

    @abstractmethod
    def features(self, clips: Float[Tensor, "b t 3 s s"]) -> Float[Tensor, "b d"]:
        """Pooled features of normalised clips (about zero mean, unit variance)."""

    def forward(self, frames: UInt8[Tensor, "b t s s 3"]) -> dict[str, Float[Tensor, "b _"]]:
        """Every head's output, and `features`, of uint8 frames."""
        features = self.features(normalise(frames))
        return {FEATURES: features} | {name: head(features) for name, head in self.heads.items()}

    @overload
    def stages(self, frames: Tensor, names: Sequence[str] | None = None) -> tuple[list[Tensor], dict[str, Tensor]]: ...
    @overload
    def stages(
        self, frames: Tensor, names: Sequence[str] | None = None, *, num_stages: int | None
    ) -> tuple[list[Tensor], dict[str, Tensor] | None]: ...
    def stages(
        self, frames: UInt8[Tensor, "b t s s 3"], names: Sequence[str] | None = None, *, num_stages: int | None = None
    ) -> tuple[list[Float[Tensor, "b _ _ _ _"]], dict[str, Float[Tensor, "b _"]] | None]:
        """The maps of the parts `names` (of `substages` when None), and what `forward` gives, in one pass.

        Only the first num_stages when that is less: then nothing runs after them, and the second is None. Raises ConfigError
        for a name that gives no map.
        """
        names = self.substages if names is None else names
        outputs, answers = stage_maps(self, names, lambda: self(frames), num_stages)
        return [self.as_map(output, len(frames)) for output in outputs], answers

    @torch.no_grad()
    def stage_channels(self, names: Sequence[str] | None = None) -> list[int]:
        """Channels of the maps that `stages` gives."""
        side_px = self.sampling.size_px
        frames = torch.zeros((1, self.sampling.num_frames, side_px, side_px, 3), dtype=torch.uint8)
        was_training = self.training
        self.eval()  # its statistics are not those of no clip
        with torch.no_grad():
            maps, _ = self.stages(frames, names)
        self.train(was_training)
        return [x.shape[1] for x in maps]

    def as_map(self, output: Tensor, num_clips: int) -> Float[Tensor, "b c t h w"]:
        """The output of a part in one layout. Raises ConfigError when it is no map."""
        if output.ndim != 5:
            raise no_map(output)
        return output


class Comparison(NamedTuple):
    """Similarity of each pair, and the comparator's map that it comes from, before it was clipped to [-1, 1], if there is one."""

    similarity: Float[Tensor, " b"]
    cells: Float[Tensor, "b i j"] | None
    mask: Bool[Tensor, "b i j"] | None


class SimilarityStudent(nn.Module, ABC):
    """Says how alike two videos are, from their region features: what `index` gives of each is all that it needs of a video.

    `unit`: its scores are on [0, 1], else on [-1, 1]. `masked`: it may be trained on padded videos.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[bool]
    masked: ClassVar[bool] = True

    @abstractmethod
    def index(self, regions: Float[Tensor, "b t r d"], mask: Bool[Tensor, "b t"] | None = None) -> Float[Tensor, "b ..."]:
        """What is stored of each video."""

    @abstractmethod
    def compare_pairs(
        self,
        queries: Float[Tensor, "#b ..."],
        targets: Float[Tensor, "b ..."],
        query_mask: Bool[Tensor, "#b n"] | None = None,
        target_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Comparison:
        """Of indexed videos, pair by pair, as it is trained: padded where masks are false. One query is compared with each target."""

    @abstractmethod
    def pair(self, query: Float[Tensor, ...], target: Float[Tensor, ...]) -> Float[Tensor, ""]:
        """The score of two indexed videos, without padding, as it is used."""


def normalise(frames: UInt8[Tensor, "b t s s 3"]) -> Float[Tensor, "b t 3 s s"]:
    """uint8 frames to floats in [-2, 2], channels before space."""
    return (frames.permute(0, 1, 4, 2, 3).to(torch.float32) - 127.5).div_(63.75)
