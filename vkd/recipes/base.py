"""The contract that every recipe keeps, and what a distiller gives to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from vkd.models import ModelSpec
from vkd.schema import TensorType
from vkd.students.base import Student

# "frames" uint8 [b, t, s, s, 3], "<alias>.<label>" float32, "label" and "example" int64 (-1: none), "weight" float32 [b]
Batch = dict[str, Tensor]
Losses = dict[str, tuple[Tensor, Tensor]]  # name -> (weighted sum over the rows, count of rows that it counts)
Emits = Mapping[str, Mapping[str, TensorType]]  # teacher alias -> what it emits


class Distiller(nn.Module, ABC):
    """Everything that gets a gradient: the student and what it needs only while learning."""

    student: Student

    @abstractmethod
    def forward(self, batch: Batch) -> Losses:
        """Each loss as (weighted sum, count) over this rank's rows; rows of weight 0 count nothing."""


class Recipe(BaseModel, ABC):
    """Teachers, a student and a way to learn."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    student: ModelSpec

    @property
    def needs(self) -> tuple[str, ...]:
        """Label columns, `<alias>.<label>`, that training reads."""
        return ()

    @property
    @abstractmethod
    def teachers(self) -> Mapping[str, ModelSpec]:
        """Teachers by alias."""

    @abstractmethod
    def distiller(self, emits: Emits, num_classes: int) -> Distiller:
        """The module to train, heads sized by what the teachers emit; `num_classes` is 0 without labels."""
