"""Staged distillation with weak labels, after Wang & Tang, "The Staged Knowledge Distillation in Video Classification", 2023.

The paper's equations are not public: this is a reconstruction of the ingredients that its abstract names, and none of its
numbers are claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vkd.errors import ConfigError
from vkd.live_teacher import refuse_offline
from vkd.models import ModelSpec, build
from vkd.recipes.base import Emits, Recipe
from vkd.recipes.substage.distiller import LOGITS, TEACHER, SubstageDistiller
from vkd.recipes.substage.live import LiveSubstageDistiller
from vkd.refinement import Refinement
from vkd.schema import LABEL, TensorType
from vkd.students import STUDENTS
from vkd.students.base import Student

Ends = tuple[float, float]  # of the first and of the last substage; linear in between


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Combos(_Part):
    """Which combinations of substages are supervised: exits after each (`prefix`), neighbours (`pair`), all exits at once (`fused`).

    `stitch`: the student's first substages with the teacher's later ones, which must be live.
    """

    prefix: bool = True
    pair: bool = True
    fused: bool = True
    stitch: bool = False


class Response(_Part):
    """The share of the teacher's answer in a response loss, and its temperature."""

    rho: Ends = (0.9, 0.5)
    tau: Ends = (8.0, 4.0)

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if not all(0 <= rho <= 1 for rho in self.rho) or min(self.tau) <= 0:
            raise ValueError("rho lies in [0, 1], and tau above 0")
        return self


class FeatureDistribution(_Part):
    """Weights of the feature-distribution losses: moments, maximum mean discrepancy, temporal profile; all 0: off.

    `full`: of the maps of a live teacher instead of descriptors, all positions for the profile, and `channel`: where each lies.
    Unless it `teaches`, only the adapters learn from it, and it says which substage lags, for `harmonise`.
    """

    form: Literal["descriptor", "full"] = "descriptor"
    teaches: bool = True
    moments: float = Field(default=1.0, ge=0)
    mmd: float = Field(default=0.5, ge=0)
    temporal: float = Field(default=0.5, ge=0)
    channel: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _of_descriptors(self) -> Self:
        if self.full and not self.teaches:
            raise ValueError("form full looks at maps to learn from them: set teaches to true, or form to descriptor")
        return self

    @property
    def on(self) -> bool:
        return max(self.moments, self.mmd, self.temporal, self.channel if self.full else 0) > 0

    @property
    def full(self) -> bool:
        return self.form == "full"


class Relation(_Part):
    """Weights of the relation losses: similarity of samples, correlation of substages, statistics of neighbours; all 0: off.

    `correspondence` soft: the features of a substage follow all of the teacher's, weighted by how alike they are.
    """

    sp: float = Field(default=1.0, ge=0)
    corr: float = Field(default=1.0, ge=0)
    pair: float = Field(default=0.1, ge=0)
    correspondence: Literal["hard", "soft"] = "hard"

    @property
    def on(self) -> bool:
        return max(self.sp, self.corr, self.pair) > 0


class Cascade(_Part):
    """Epochs of the phases: warm-up, one phase a substage, then all at once; and how substages of earlier phases go on learning."""

    warmup: int = Field(default=2, ge=0)
    per_stage: int = Field(default=12, ge=0)
    joint: int = Field(default=40, ge=0)
    lower_lr: float = Field(default=0.1, gt=0, le=1)
    freeze: bool = False
    assistant_beta: float = Field(default=0.3, ge=0, lt=1)


class Harmonise(_Part):
    """How the losses of substages are weighed against each other while all of them learn."""

    form: Literal["fd_ratio", "uniform", "uncertainty"] = "fd_ratio"
    tau: float = Field(default=1.0, gt=0)
    clip: Ends = (0.25, 2.5)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not 0 < self.clip[0] <= self.clip[1]:
            raise ValueError("clip is the lowest and the highest weight, both above 0")
        return self


class Substage(Recipe):
    """The student learns one substage after the other, from labels that are refined meanwhile.

    `substages`: names of submodules, one a substage; None: the student's own. The teacher must answer the classes of the labels.
    `live`: it is also asked while the student learns, for what is in no label.
    """

    name: Literal["substage"]
    teacher: ModelSpec
    substages: tuple[str, ...] | None = Field(default=None, min_length=1)
    live: bool = False
    combos: Combos = Combos()
    resp: Response = Response()
    fd: FeatureDistribution = FeatureDistribution()
    rel: Relation = Relation()
    cascade: Cascade = Cascade()
    refine: Refinement = Refinement()
    harmonise: Harmonise = Harmonise()

    @model_validator(mode="after")
    def _phases(self) -> Self:
        if self.refine.start_epoch:
            raise ValueError("refine.start_epoch follows from cascade: leave it out")
        if self.num_substages == 0:
            raise ValueError("the student names no substages of its own: list the names of its parts in substages")
        if self.num_epochs == 0:
            raise ValueError("cascade has no epoch: set warmup, per_stage or joint above 0")
        return self

    @property
    def num_substages(self) -> int:
        """Of the student."""
        if self.substages is not None:
            return len(self.substages)
        student: Student = build(self.student, STUDENTS, "student", heads={})
        return len(student.substages)

    @property
    def num_epochs(self) -> int:
        cascade = self.cascade
        return cascade.warmup + (cascade.per_stage * self.num_substages if cascade.per_stage else 0) + cascade.joint

    @property
    def uses_features(self) -> bool:
        """Whether the teacher's stages are looked at."""
        return self.fd.on or self.rel.on

    @property
    def asks_live(self) -> bool:
        """Whether something learns from what is in no label. Raises ConfigError when the teacher is not live."""
        full = self.fd.full and self.fd.on
        for key, asks in (("fd.form", full), ("combos.stitch", self.combos.stitch)):
            if asks:
                refuse_offline(key, self.live)
        return full or self.combos.stitch

    @property
    def refinement(self) -> Refinement:
        """How labels are refined: from the end of the first substage's phase on."""
        first = self.cascade.warmup + max(self.cascade.per_stage, 1) - 1
        return self.refine.model_copy(update={"start_epoch": 0 if self.refine.form == "argmax" else first})

    @property
    def teachers(self) -> Mapping[str, ModelSpec]:
        return {TEACHER: self.teacher}

    def distiller(self, emits: Emits, num_classes: int) -> SubstageDistiller:
        """The student with an exit a substage. Raises ConfigError when labels, or the teacher's answers to them, are not there."""
        types = emits[TEACHER]
        self._check(types, num_classes)
        stages = stage_types(types) if self.uses_features else []
        student: Student = build(self.student, STUDENTS, "student", heads={LOGITS: num_classes})
        return LiveSubstageDistiller(student, self, stages) if self.asks_live else SubstageDistiller(student, self, stages)

    def _check(self, types: Mapping[str, TensorType], num_classes: int) -> None:
        if num_classes < 2:
            action = f"build the manifest from a table that has the column {LABEL!r}: classes, or nothing where they are unknown"
            raise ConfigError(
                f"the labels name {num_classes} classes; substage learns to tell classes apart", where="recipe", action=action
            )
        answers = types[LOGITS].shape if LOGITS in types else None
        if answers != (num_classes,):
            what = f"the teacher's logits have shape {list(answers)}" if answers else f"the teacher emits no {LOGITS!r}"
            action = "vkd probe RUN fits a classifier of these classes on a teacher's embedding; or use an exported student that knows them"
            raise ConfigError(f"{what}; the labels have {num_classes} classes", where="recipe.teacher", action=action)
        if self.uses_features and not stage_types(types):
            action = "give the teacher the option substages, or set the weights of recipe.fd and recipe.rel to 0"
            raise ConfigError("the teacher emits no stage descriptors", where="recipe.teacher.substages", action=action)


def stage_types(types: Mapping[str, TensorType]) -> Sequence[TensorType]:
    """Of the labels stage1, stage2, ... in order."""
    found: list[TensorType] = []
    while (name := f"stage{len(found) + 1}") in types:
        found.append(types[name])
    return found
