"""The contract that every student keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vkd.clips import Sampling

FEATURES = "features"


class Student(nn.Module, ABC):
    """A backbone that pools a clip to one feature vector, and one linear head per label that it answers.

    `heads` maps a label name to its size, taken from what the teacher emits: {"logits": 1000, "embedding": 1280}. So a
    trained student answers exactly what its teacher answered, and can stand in for it.
    """

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


def normalise(frames: UInt8[Tensor, "b t s s 3"]) -> Float[Tensor, "b t 3 s s"]:
    """uint8 frames to floats in [-2, 2], channels before space."""
    return (frames.permute(0, 1, 4, 2, 3).to(torch.float32) - 127.5) / 63.75
