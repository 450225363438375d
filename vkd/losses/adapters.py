"""Modules that a loss needs while training, and that no exported student keeps.

Where a layer of torch is all that a loss needs (FitNets: a 1x1x1 convolution, correlation congruence: a linear map), use that.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vkd.losses.distillation import unit
from vkd.losses.features import NUM_STATISTICS

MIN_VARIANCE = 1e-5


class DescriptorAdapter(nn.Module):
    """A student's descriptor in the teacher's channels: one linear map for mean and profile, another for the deviation."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.of_means, self.of_deviations = nn.Linear(num_in, num_out), nn.Linear(num_in, num_out)

    def forward(self, descriptor: Float[Tensor, "b 6 d"]) -> Float[Tensor, "b 6 e"]:
        mean, deviation, profile = descriptor[:, :1], descriptor[:, 1:NUM_STATISTICS], descriptor[:, NUM_STATISTICS:]
        return torch.cat([self.of_means(mean), self.of_deviations(deviation), self.of_means(profile)], dim=1)


class GaussianRegressor(nn.Module):
    """(mean, variance) of the teacher's map given the student's, the variance one learned number per channel (Ahn et al. 2019)."""

    def __init__(self, num_in: int, num_out: int, initial_variance: float = 5.0) -> None:
        super().__init__()
        widths = (num_in, num_out, num_out, num_out)
        first, second, third = (nn.Conv3d(a, b, 1, bias=False) for a, b in pairwise(widths))
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.raw_variance = nn.Parameter(torch.full((num_out,), math.log(math.expm1(initial_variance - MIN_VARIANCE))))

    def forward(self, x: Float[Tensor, "b c t h w"]) -> tuple[Float[Tensor, "b d t h w"], Float[Tensor, " d"]]:
        return self.mean(x), F.softplus(self.raw_variance) + MIN_VARIANCE


class StageAttention(nn.Module):
    """How much each stage of the teacher has to say to each of the student, clip by clip (Chen et al. 2021, SemCKD).

    It learns from `relation.similarity_profiles` of the stages; its rows add up to 1.
    """

    def __init__(self, num_students: int, num_teachers: int, num_bins: int, dim: int = 32) -> None:
        super().__init__()
        self.queries = nn.ModuleList(_embedding(num_bins, dim) for _ in range(num_students))
        self.keys = nn.ModuleList(_embedding(num_bins, dim) for _ in range(num_teachers))

    def forward(self, students: Float[Tensor, "b ks bins"], teachers: Float[Tensor, "b kt bins"]) -> Float[Tensor, "b ks kt"]:
        query, key = (
            unit(torch.stack([embed(x) for embed, x in zip(embeddings, profiles.unbind(dim=1), strict=True)], dim=1))
            for embeddings, profiles in ((self.queries, students), (self.keys, teachers))
        )
        return (query @ key.transpose(1, 2)).softmax(dim=2)


def _embedding(num_bins: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_bins, dim), nn.ReLU(), nn.Linear(dim, dim))
