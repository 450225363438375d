"""Named models: what a run file says of one, and how it becomes an object."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from vkd.errors import ConfigError


class ModelSpec(BaseModel):
    """`{name: shift_cnn, size: small}`: a registered name or `package.module:Class`, and its keyword arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "options" not in value:
            return {"name": value.get("name"), "options": {k: v for k, v in value.items() if k != "name"}}
        return value

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


def find(spec: ModelSpec, registry: Mapping[str, str], kind: str) -> Any:
    """The class that a spec names. Registries map names to `package.module:Class`, so that nothing is imported unused."""
    target = registry.get(spec.name, spec.name)
    module_name, _, attribute = target.partition(":")
    if not attribute:
        known = ", ".join(sorted(registry))
        raise ConfigError(f"unknown {kind} {spec.name!r}", action=f"use one of {known}, or package.module:Class")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {spec.name!r} cannot be imported: {error}", action="install it, or mend its name") from error


def build(spec: ModelSpec, registry: Mapping[str, str], kind: str, **given: Any) -> Any:
    """The object that a spec describes; `given` are arguments that the caller, not the run file, decides."""
    target = find(spec, registry, kind)
    accepted = inspect.signature(target).parameters
    unknown = sorted(set(spec.options) - (set(accepted) - set(given)))
    if unknown:
        choices = ", ".join(name for name in accepted if name not in given)
        raise ConfigError(f"{kind} {spec.name!r} has no option {unknown[0]!r}", action=f"it takes {choices}")
    try:
        return target(**spec.options, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind} {spec.name!r}: {error}", action="mend its options in the run file") from error
