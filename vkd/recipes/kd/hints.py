"""Losses between the maps of a student's and a live teacher's stages, with the adapters that they learn."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vkd import gather
from vkd.losses import maps as map_losses
from vkd.losses import relation
from vkd.losses.adapters import GaussianRegressor, StageAttention
from vkd.losses.distillation import SumAndCount
from vkd.stage_maps import partners

HINTS = ("fitnet", "at", "nst", "vid", "stagewise", "semckd")
NUM_BINS = 16  # of the similarity profiles that SemCKD's attention sees

Maps = Sequence[Float[Tensor, "b _ _ _ _"]]


class Hints(nn.Module):
    """The losses of HINTS that `wanted` names, of stages with so many channels; a stage is compared with the one as deep.

    `fitnet` compares the middle stage alone, `semckd` each with each, the others take the mean over the stages. `stagewise`
    trains all stages at once, and adapts a stage only if the channels differ.
    """

    def __init__(self, wanted: Collection[str], students: Sequence[int], teachers: Sequence[int]) -> None:
        super().__init__()
        self.partner = partners(len(students), len(teachers))
        self.middle = (len(students) - 1) // 2
        self.adapters = nn.ModuleDict()
        pairs = [(k, self.partner[k]) for k in range(len(students))]
        if "fitnet" in wanted:
            self.adapters[f"fitnet-{self.middle}"] = nn.Conv3d(students[self.middle], teachers[self.partner[self.middle]], 1)
        for k, j in pairs:
            if "stagewise" in wanted:
                same = students[k] == teachers[j]
                self.adapters[f"stagewise-{k}"] = nn.Identity() if same else nn.Conv3d(students[k], teachers[j], 1)
            if "vid" in wanted:
                self.adapters[f"vid-{k}"] = GaussianRegressor(students[k], teachers[j])
        if "semckd" in wanted:
            self.attention = StageAttention(len(students), len(teachers), NUM_BINS)
            for k, num_in in enumerate(students):
                for j, num_out in enumerate(teachers):
                    self.adapters[f"semckd-{k}-{j}"] = nn.Conv3d(num_in, num_out, 1)

    def forward(self, name: str, students: Maps, teachers: Maps, weight: Float[Tensor, " b"]) -> SumAndCount:
        if name == "semckd":
            return self._attended(students, teachers, weight)
        stages = [self.middle] if name == "fitnet" else range(len(students))
        found = [self._stage(name, k, students[k], teachers[self.partner[k]], weight) for k in stages]
        return torch.stack([total for total, _ in found]).mean(), found[0][1]

    def _stage(self, name: str, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> SumAndCount:
        if name == "at":
            return map_losses.attention_transfer(student, teacher, weight)
        if name == "nst":
            return map_losses.nst(student, teacher, weight)
        adapter = self.adapters[f"{name}-{k}"]
        if name == "vid":
            mean, variance = adapter(student)
            return map_losses.vid(mean, variance, teacher, weight)
        return map_losses.mse(adapter(student), teacher, weight)

    def _attended(self, students: Maps, teachers: Maps, weight: Tensor) -> SumAndCount:
        rows = [
            torch.stack([map_losses.mse_of_rows(self.adapters[f"semckd-{k}-{j}"](s), t, weight) for j, t in enumerate(teachers)], dim=1)
            for k, s in enumerate(students)
        ]
        return relation.attended(torch.stack(rows, dim=1), self.attention(_profiles(students, weight), _profiles(teachers, weight)), weight)


def _profiles(stages: Maps, weight: Float[Tensor, " b"]) -> Float[Tensor, "b k bins"]:
    """How like each clip is to the others in each stage, by the mean of its map."""
    means = [x.mean(dim=(2, 3, 4)) for x in stages]
    return torch.stack([relation.similarity_profiles(x, weight, NUM_BINS, gather.rows_over_ranks) for x in means], dim=1)
