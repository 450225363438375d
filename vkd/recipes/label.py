"""Labels only: teachers label, and nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from vkd.errors import ConfigError
from vkd.models import ModelSpec
from vkd.recipes.base import Distiller, Emits, Recipe


class Label(Recipe):
    """Teachers by alias, whose labels other runs read, or that something is fitted on."""

    name: Literal["label"]
    models: Mapping[str, ModelSpec] = Field(min_length=1)
    student: ModelSpec = ModelSpec(name="none")
    trains: ClassVar[bool] = False

    @property
    def teachers(self) -> Mapping[str, ModelSpec]:
        return self.models

    def distiller(self, emits: Emits, num_classes: int) -> Distiller:
        raise ConfigError("this recipe trains nothing", where="recipe.name", action="vkd label RUN, or choose a recipe with a student")
