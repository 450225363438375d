"""Distill-and-Select (Kordopatis-Zilos et al. 2022): students that learn how alike two videos are, and a selector between two of them.

An example is an anchor with its candidates. What is trained follows from the student and the teachers that there are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from vkd import models, planning
from vkd.checkpoint import WEIGHTS
from vkd.errors import ConfigError
from vkd.models import ModelSpec
from vkd.planning import Plan
from vkd.recipes.base import Batch, Distiller, Emits, Recipe
from vkd.recipes.dns.batches import ANCHOR, COARSE, FEATURES, LENGTH, OTHERS, POOLS, TEACHER, Draw, TripletBatches
from vkd.recipes.dns.distiller import SelectorDistiller, SimilarityDistiller, TripletDistiller
from vkd.region_store import RegionStore
from vkd.store import files
from vkd.students import STUDENTS
from vkd.students.base import SimilarityStudent
from vkd.students.selector import Selector
from vkd.teachers import TEACHERS

__all__ = ["DnS"]


class _Kind(NamedTuple):
    """What a combination of teachers trains."""

    student: type[nn.Module]
    draw: Draw
    distiller: Callable[[Any, DnS], SimilarityDistiller | SelectorDistiller]


KINDS = {
    (): _Kind(SimilarityStudent, "copies", TripletDistiller),
    (TEACHER,): _Kind(SimilarityStudent, "scores", SimilarityDistiller),
    (TEACHER, COARSE): _Kind(Selector, "selection", SelectorDistiller),
}


class DnS(Recipe):
    """Each epoch draws one positive and one negative candidate of each anchor.

    Without teachers a network learns that copies of a source are alike (a triplet loss with `margin`, for a teacher without outside
    weights). With a `teacher` the student learns its scores. With `coarse` too a selector learns for which pairs the two differ by
    more than `threshold` on [0, 1]. `excess` is the weight of cells outside [-1, 1], summed over a pair (the paper: 0.001 on the sum
    over 64 pairs). A teacher's score of `min_positive` on, on [-1, 1], makes a candidate positive; an anchor whose candidates are all
    on one side of it is left out. `augment` is temporal.
    """

    length: ClassVar[str | None] = LENGTH
    name: Literal["dns"]
    teacher: ModelSpec | None = None
    coarse: ModelSpec | None = None
    augment: bool = True
    excess: float = Field(default=0.064, ge=0, allow_inf_nan=False)
    min_positive: float = Field(default=0.0, ge=-1, le=1)
    margin: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    threshold: float = Field(default=0.2, gt=0, lt=1)
    cache_bytes: int = Field(default=1 << 30, ge=0)  # of region features in memory

    @property
    def teachers(self) -> Mapping[str, ModelSpec]:
        return {name: spec for name, spec in ((TEACHER, self.teacher), (COARSE, self.coarse)) if spec is not None}

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(f"{alias}.scores" for alias in self.teachers)

    def batches(self, plan: Plan, store: str, seed: int, *, learning: bool) -> TripletBatches:
        regions = RegionStore(files.join(store, _features(plan)), self.cache_bytes)
        self._require_dims(regions)
        return TripletBatches(self, self._kind.draw, regions, seed, augment=learning and self.augment and self._kind.draw != "selection")

    def distiller(self, emits: Emits, num_classes: int) -> Distiller:
        """What trains the student. Raises ConfigError when it does not fit the teachers, or these lie on each other's scale."""
        self._require_scales()
        student, kind = models.build(self.student, STUDENTS, "student"), self._kind
        if not isinstance(student, kind.student):
            teachers = " and ".join(self.teachers) or "no teacher"
            what = f"with {teachers} the recipe trains a {kind.student.__name__}, and {self.student.name!r} is none"
            raise ConfigError(what, where="recipe.student", action="choose visil, fine or coarse, or selector with teacher and coarse")
        return kind.distiller(student, self)

    def evaluate(self, student: nn.Module, held_out: Iterable[Batch]) -> Mapping[str, float]:
        """Mean of each loss, and how often it ranks a positive candidate first (a selector: is right), on held-out anchors.

        Nothing when no held-out anchor has candidates to tell it by.
        """
        distiller = self._kind.distiller(student, self).eval()
        sums: dict[str, torch.Tensor] = {}
        for batch in held_out:
            for name, (total, count) in (distiller(batch) | {"accuracy": distiller.right(batch)}).items():
                sums[name] = sums.get(name, torch.zeros(2)) + torch.stack([total.detach(), count])
        return {f"held-out {name}": float(total / count) for name, (total, count) in sums.items() if count}

    def provenance(self, plan: Plan) -> Mapping[str, str]:
        """The set of region features, and of each teacher the weights that scored."""
        teachers = planning.build_teachers(self.teachers)
        weights = {alias: teacher.identity().get("sha256", {}).get(WEIGHTS) for alias, teacher in teachers.items()}
        return {FEATURES: _features(plan)} | {f"{alias}_{WEIGHTS}": digest for alias, digest in weights.items() if digest}

    def _require_scales(self) -> None:
        """Fine scores are mapped to [0, 1] where they meet coarse ones, and these never are: exchanged, both would be wrong."""
        for alias, spec in self.teachers.items():
            unit = getattr(models.build(spec, TEACHERS, "teacher"), "unit", None)
            if unit not in (None, alias == COARSE):
                what = f"its scores are those of a {'coarse' if unit else 'fine'} student"
                raise ConfigError(what, where=f"recipe.{alias}", action="name a fine student as teacher, a coarse one as coarse")

    def _require_dims(self, regions: RegionStore) -> None:
        option = inspect.signature(models.find(self.student, STUDENTS, "student")).parameters.get("num_dims")
        if option is not None and (asked := self.student.options.get("num_dims", option.default)) != regions.num_dims:
            what = f"the student is for features of {asked} dimensions, {regions.name} has {regions.num_dims}"
            raise ConfigError(what, where="recipe.student.num_dims", action=f"set it to {regions.num_dims}")

    @property
    def _kind(self) -> _Kind:
        try:
            return KINDS[tuple(self.teachers)]
        except KeyError:
            what = "coarse scores alone teach nothing"
            raise ConfigError(what, where="recipe.teacher", action="name the teacher of fine scores beside recipe.coarse") from None


def _features(plan: Plan) -> str:
    """The name of the label set that pairs are of. Raises ConfigError for a manifest that is not one of pairs."""
    planning.require_columns(plan, (ANCHOR, OTHERS, POOLS, FEATURES, LENGTH), "data.manifest")
    name: str = plan.examples(plan.chunks[0])[FEATURES][0].as_py()
    return name
