"""The contract that every recipe keeps, and what a distiller gives to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from vkd.models import ModelSpec
from vkd.refinement import Refinement
from vkd.schema import TensorType

if TYPE_CHECKING:
    from vkd.batches import Part
    from vkd.planning import Plan

# "frames" uint8 [b, t, s, s, 3], "<alias>.<label>" float32, "label" and "example" int64 (-1: none), "weight" float32 [b]
Batch = dict[str, Tensor]
Losses = dict[str, tuple[Tensor, Tensor]]  # name -> (weighted sum over the rows, count of rows that it counts)
Emits = Mapping[str, Mapping[str, TensorType]]  # teacher alias -> what it emits


class Batches(Protocol):
    """Makes the batch of some rows, in several threads at once; `unreadable` counts rows whose input could not be read."""

    unreadable: int

    def __call__(self, parts: Sequence[Part], epoch: int) -> Batch:
        """Tensors of all rows, of which "weight" has one each; one masked row of weight 0 when there are none."""


@dataclass(frozen=True)
class Phase:
    """Some epochs with an optimizer and a schedule of their own.

    `rates`: parameter of the distiller -> scale of its learning rate; those that are not named are frozen. None: all learn.
    """

    name: str
    epochs: int
    rates: Mapping[str, float] | None = None
    schedule: Literal["cosine", "linear"] = "cosine"  # linear: it only rises

    def rate(self, parameter: str) -> float:
        """The scale of a parameter's learning rate; 0 when it is frozen."""
        return 1.0 if self.rates is None else self.rates.get(parameter, 0.0)


class Distiller(nn.Module, ABC):
    """Everything that gets a gradient: the student and what it needs only while learning.

    `unpaired`: losses (up to a slash in their names) that compare how clips lie, and not clip with clip: other clips' labels may do as
    well. `regularisers`: losses that may be 0. `said`: after `forward`, what the student says of each row [b, num_classes], if labels
    are refined by it.
    """

    student: nn.Module
    said: Tensor | None = None
    unpaired: Collection[str] = ()
    regularisers: Collection[str] = ()

    @abstractmethod
    def forward(self, batch: Batch) -> Losses:
        """Each loss as (weighted sum, count) over this rank's rows; rows of weight 0 count nothing."""

    def phases(self) -> Sequence[Phase]:
        """The phases of the training, in order; none: one phase of all epochs, without validation."""
        return ()

    def enter(self, phase: int) -> None:
        """Be in a phase: called before its first step, and after a restart within it."""

    def begin(self) -> None:
        """The phase that was entered begins now, with the best weights of the one before."""

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What validation wants low, as (weighted sum, count); in eval mode, without gradient."""
        raise NotImplementedError

    def metrics(self) -> Mapping[str, float]:
        """Numbers to note once a round, beside the losses."""
        return {}


class Recipe(BaseModel, ABC):
    """Teachers, a student and a way to learn."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    student: ModelSpec
    trains: ClassVar[bool] = True  # else labels are made, and that is all
    length: ClassVar[str | None] = None  # a column that says how long an example is: batches are of similar ones

    @property
    def needs(self) -> tuple[str, ...]:
        """Label columns, `<alias>.<label>`, that training reads."""
        return ()

    @property
    def num_epochs(self) -> int | None:
        """Epochs of all phases; None when the recipe has none."""
        return None

    @property
    def refinement(self) -> Refinement | None:
        """How labels are refined between epochs; None when they are not."""
        return None

    def batches(self, plan: Plan, store: str, seed: int, *, learning: bool) -> Batches:
        """What makes batches for a student that reads no frames, to learn from or to measure by; `store` has what examples name."""
        raise NotImplementedError

    def evaluate(self, student: nn.Module, held_out: Iterable[Batch]) -> Mapping[str, float]:
        """What a student that reads no frames knows of held-out examples."""
        raise NotImplementedError

    def provenance(self, plan: Plan) -> Mapping[str, str]:
        """What an exported student says of the examples that it learned from."""
        return {}

    @property
    @abstractmethod
    def teachers(self) -> Mapping[str, ModelSpec]:
        """Teachers by alias."""

    @abstractmethod
    def distiller(self, emits: Emits, num_classes: int) -> Distiller:
        """The module to train, heads sized by what the teachers emit; `num_classes` is 0 without labels."""
