"""Logit and feature distillation from one teacher: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vkd.descriptors import chosen
from vkd.errors import ConfigError
from vkd.live_teacher import LiveTeacher, refuse_offline
from vkd.models import ModelSpec, build
from vkd.recipes.base import Emits, Recipe
from vkd.recipes.kd.distiller import LEARNS_FROM, TEACHER, KDDistiller
from vkd.recipes.kd.hints import HINTS
from vkd.schema import LABEL, TensorType
from vkd.students import STUDENTS
from vkd.students.base import Student

__all__ = ["KD", "KDDistiller", "KDWeights"]


class KDWeights(BaseModel):
    """What each loss counts; one of weight 0 is not computed.

    On embeddings: `similarity` (Tung & Mori 2019), `cc` (Peng et al. 2019), `pkt` (Passalis & Tefas 2018), and `rkd`, distances
    plus twice angles (Park et al. 2019, whose weight is 25). On maps of the stages, with a live teacher only: see `hints`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kl: float = Field(default=1.0, ge=0)
    cosine: float = Field(default=1.0, ge=0)
    mse: float = Field(default=0.0, ge=0)
    similarity: float = Field(default=0.0, ge=0)
    cross_entropy: float = Field(default=0.0, ge=0)
    cc: float = Field(default=0.0, ge=0)
    rkd: float = Field(default=0.0, ge=0)
    pkt: float = Field(default=0.0, ge=0)
    fitnet: float = Field(default=0.0, ge=0)
    at: float = Field(default=0.0, ge=0)
    nst: float = Field(default=0.0, ge=0)
    vid: float = Field(default=0.0, ge=0)
    stagewise: float = Field(default=0.0, ge=0)
    semckd: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _any(self) -> KDWeights:
        if not self.positive():
            raise ValueError("all weights are 0: nothing would be learned; set one of them above 0")
        return self

    def positive(self) -> dict[str, float]:
        """The weights above 0, by the name of the loss."""
        return {name: weight for name, weight in self.model_dump().items() if weight > 0}


class KD(Recipe):
    """The student answers what the teacher answers: softened logits (Hinton et al. 2015) and embedding.

    `live`: the teacher is also asked while the student learns, for its maps. `substages`: the parts of the student that they
    are compared with; None: its own.
    """

    name: Literal["kd"]
    teacher: ModelSpec
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    weights: KDWeights = KDWeights()
    live: bool = False
    substages: tuple[str, ...] | None = Field(default=None, min_length=1)

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns of the labels that losses of weight > 0 learn from."""
        labels = {LEARNS_FROM[name] for name in self.weights.positive() if name in LEARNS_FROM}
        return tuple(f"{TEACHER}.{label}" for label in sorted(labels))

    @property
    def teachers(self) -> Mapping[str, ModelSpec]:
        return {TEACHER: self.teacher}

    def distiller(self, emits: Emits, num_classes: int) -> KDDistiller:
        """A student with a head for every label that a loss learns from. Raises ConfigError when one is not there."""
        types = emits[TEACHER]
        flat = {label: kind.num_values for label, kind in types.items() if len(kind.shape) == 1 and not kind.ragged}
        self._check(types, flat, num_classes)
        self._check_maps()
        heads = {label: size for label, size in flat.items() if f"{TEACHER}.{label}" in self.needs}
        student: Student = build(self.student, STUDENTS, "student", heads=heads)
        weights = self.weights.positive()
        if weights.keys().isdisjoint(HINTS):
            return KDDistiller(student, weights, self.temperature, num_classes)
        names = chosen(self.substages or True, student.substages)
        return KDDistiller(student, weights, self.temperature, num_classes, LiveTeacher(self.teacher, student), names)

    def _check(self, types: Mapping[str, TensorType], flat: Mapping[str, int], num_classes: int) -> None:
        for name in self.weights.positive():
            if name in LEARNS_FROM and LEARNS_FROM[name] not in flat:
                emitted = ", ".join(f"{label} {list(kind.shape)}" for label, kind in types.items()) or "nothing"
                raise ConfigError(
                    f"weights.{name} learns from a 1-D {LEARNS_FROM[name]!r}; teacher {self.teacher.name!r} emits {emitted}",
                    where=f"recipe.weights.{name}",
                    action=f"set weights.{name} to 0, or choose a teacher that emits it",
                )
        if self.weights.cross_entropy > 0 and num_classes == 0:
            raise ConfigError(
                "weights.cross_entropy needs labels, and the manifest has none",
                where="recipe.weights.cross_entropy",
                action=f"build the manifest from a table that has the column {LABEL!r}, or set weights.cross_entropy to 0",
            )

    def _check_maps(self) -> None:
        wanted = [name for name in self.weights.positive() if name in HINTS]
        for name in wanted:
            refuse_offline(f"weights.{name}", self.live)
        if wanted == [*self.weights.positive()]:  # and what follows the last map would get no gradient, which ranks wait for
            action = "set kl, cosine or another weight on answers above 0"
            raise ConfigError("maps alone teach the student no answer", where="recipe.weights", action=action)
