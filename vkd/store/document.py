"""labelset.json: what a label set is, for people and for comparison."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vkd.errors import LabelsMismatch
from vkd.store import files
from vkd.store.chunkfile import LabelSetSpec
from vkd.store.layout import DOCUMENT

KEYS = ("alias", "fields", "tensors", "encodings", "format_version", "recorded", "fidelity", "probe")


def load(uri: str) -> dict[str, Any] | None:
    """labelset.json of a folder; None when there is none."""
    try:
        return files.read_json(files.join(uri, DOCUMENT), KEYS)
    except FileNotFoundError:
        return None


def check_fields(uri: str, document: Mapping[str, Any], spec: LabelSetSpec) -> None:
    """Raises LabelsMismatch that names the first field in which a set differs from a spec."""
    differences = spec.differences(document)
    if differences:
        action = "use another store, or restore its labelset.json"
        raise LabelsMismatch(f"the labels differ in {differences[0]}", where=uri, action=action)


def nearest(store: str, spec: LabelSetSpec) -> str:
    """What to add to `no labels` when sets of the same alias are there: the nearest one and its first difference."""
    names = [name for name in files.list_names(store) if re.fullmatch(re.escape(spec.alias) + "-[0-9a-f]{12}", name)]
    others = [(name, spec.differences(document)) for name in names if (document := load(files.join(store, name)))]
    others = sorted((pair for pair in others if pair[1]), key=lambda pair: len(pair[1]))
    return f"; the store has {others[0][0]}, which differs in {others[0][1][0]}" if others else ""


def flat(value: Any) -> np.ndarray:
    """Float32 values of a probe output; the rows of a ragged one are joined."""
    rows = list(value) if isinstance(value, list) or value.dtype == object else None
    return np.asarray(value if rows is None else np.concatenate(rows), np.float32)


def told(value: Any) -> dict[str, Any]:
    """A probe output as JSON; `array_of` gives it back."""
    array = np.ascontiguousarray(flat(value))
    return {"shape": list(array.shape), "float32_base64": base64.b64encode(array.tobytes()).decode()}


def array_of(told: Mapping[str, Any]) -> np.ndarray:
    """The probe output that `told` wrote."""
    return np.frombuffer(base64.b64decode(told["float32_base64"]), np.float32).reshape(told["shape"])


def described(spec: LabelSetSpec) -> str:
    """What a label set is, in one line."""
    teacher, sampling = spec.fields.get("teacher", {}), spec.fields.get("sampling") or {}
    maker = f"{teacher['name']} v{teacher['version']}: " if {"name", "version"} <= teacher.keys() else ""
    labels = ", ".join(f"{name} {encoding}" for name, encoding in spec.encodings.items())
    seen = f"; {sampling['num_frames']} frames of {sampling['size_px']} px" if {"num_frames", "size_px"} <= sampling.keys() else ""
    return f"{maker}{labels}{seen}"
