"""Logit and feature distillation from one teacher: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from vkd import gather
from vkd.errors import ConfigError
from vkd.losses import distillation
from vkd.losses.distillation import SumAndCount
from vkd.models import ModelSpec, build
from vkd.recipes.base import Batch, Distiller, Emits, Losses, Recipe
from vkd.schema import LABEL, WEIGHT, TensorType
from vkd.students import STUDENTS
from vkd.students.base import FEATURES, Student

TEACHER = "teacher"
LOGITS, EMBEDDING = "logits", "embedding"
CROSS_ENTROPY = "cross_entropy"
LEARNS_FROM = {"kl": LOGITS, "cosine": EMBEDDING, "mse": EMBEDDING, "similarity": EMBEDDING}  # loss -> the teacher's label


class KDWeights(BaseModel):
    """What each loss counts; one of weight 0 is not computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    kl: float = Field(default=1.0, ge=0)
    cosine: float = Field(default=1.0, ge=0)
    mse: float = Field(default=0.0, ge=0)
    similarity: float = Field(default=0.0, ge=0)
    cross_entropy: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _any(self) -> KDWeights:
        if not self.positive():
            raise ValueError("all weights are 0: nothing would be learned; set one of them above 0")
        return self

    def positive(self) -> dict[str, float]:
        """The weights above 0, by the name of the loss."""
        return {name: weight for name, weight in self.model_dump().items() if weight > 0}


class KD(Recipe):
    """The student answers what the teacher answers: softened logits (Hinton et al. 2015) and embedding."""

    name: Literal["kd"]
    teacher: ModelSpec
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    weights: KDWeights = KDWeights()

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
        heads = {label: size for label, size in flat.items() if f"{TEACHER}.{label}" in self.needs}
        student: Student = build(self.student, STUDENTS, "student", heads=heads)
        return KDDistiller(student, self.weights, self.temperature, num_classes)

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


class KDDistiller(Distiller):
    """The student, and a linear classifier on its features when it also learns from labels."""

    def __init__(self, student: Student, weights: KDWeights, temperature: float, num_classes: int) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.weights = weights.positive()
        if CROSS_ENTROPY in self.weights:
            self.classifier = nn.Linear(student.num_features, num_classes)

    def forward(self, batch: Batch) -> Losses:
        """The losses of weight > 0, each times its weight."""
        outputs = self.student(batch["frames"])
        losses: Losses = {}
        for name, scale in self.weights.items():
            total, count = self._loss(name, outputs, batch)
            losses[name] = (scale * total, count)
        return losses

    def _loss(self, name: str, outputs: Batch, batch: Batch) -> SumAndCount:
        weight = batch[WEIGHT]
        if name == CROSS_ENTROPY:
            return distillation.cross_entropy(self.classifier(outputs[FEATURES]), batch[LABEL], weight)
        student, teacher = outputs[LEARNS_FROM[name]], batch[f"{TEACHER}.{LEARNS_FROM[name]}"]
        if name == "kl":
            return distillation.kl(student, teacher, self.temperature, weight)
        if name == "similarity":
            return distillation.similarity_preserving(student, teacher, weight, gather.rows_over_ranks)
        loss = {"cosine": distillation.cosine, "mse": distillation.mse}[name]
        return loss(student, teacher, weight)
