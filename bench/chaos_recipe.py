"""The recipe of chaos_train.py: `kd` whose distiller counts, in a buffer that checkpoints keep, how often it saw each example."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from vkd import gather
from vkd.recipes.base import Batch, Distiller, Emits, Losses
from vkd.recipes.kd import KD
from vkd.schema import EXAMPLE


class CountedKD(KD):
    """`num_examples` is how many the plan has."""

    name: Literal["chaos_recipe:CountedKD"]  # type: ignore[assignment]
    num_examples: int

    def distiller(self, emits: Emits, num_classes: int) -> Distiller:  # type: ignore[override]
        return CountedDistiller(super().distiller(emits, num_classes), self.num_examples)


class CountedDistiller(Distiller):
    """`seen[i]` is how often example i was trained on in the history of these weights, over all ranks."""

    seen: torch.Tensor

    def __init__(self, distiller: nn.Module, num_examples: int) -> None:
        super().__init__()
        self.distiller = distiller
        self.register_buffer("seen", torch.zeros(num_examples, dtype=torch.int64))

    @property
    def student(self) -> nn.Module:  # type: ignore[override]
        student: nn.Module = self.distiller.get_submodule("student")
        return student

    def forward(self, batch: Batch) -> Losses:
        examples = batch[EXAMPLE]
        here = torch.bincount(examples[examples >= 0], minlength=len(self.seen))
        if self.training:
            self.seen += gather.sum_over_ranks(here)
        losses: Losses = self.distiller(batch)
        return losses
