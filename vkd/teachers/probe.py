"""A linear probe on another teacher's embedding: so that a teacher answers the user's own classes. `vkd probe` fits one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from vkd import models
from vkd.errors import TeacherError
from vkd.models import ModelSpec
from vkd.schema import Columns, TensorType
from vkd.store import files
from vkd.teachers import TEACHERS
from vkd.teachers.base import Teacher

EMBEDDING, LOGITS = "embedding", "logits"
ABOUT = "vkd.probe"  # the one key of the metadata: the order of several is not kept, and a file must have one digest
FORMAT_VERSION = 1
_UNREADABLE = (FileNotFoundError, KeyError, TypeError, ValueError, AttributeError, SafetensorError)


class Probe(NamedTuple):
    """Linear classifiers on standardised embeddings, float32.

    Entry 0 was fitted on everything, entry 1 + i on all but `groups[i]` of the column `by`; without `by` there are no groups.
    """

    weight: Float[np.ndarray, "e c d"]
    bias: Float[np.ndarray, "e c"]
    mean: Float[np.ndarray, "e d"]
    scale: Float[np.ndarray, "e d"]
    classes: Sequence[str]
    by: str | None = None
    groups: Sequence[str] = ()

    def entries(self, groups: Sequence[str]) -> Int[np.ndarray, " b"]:
        """For each row's group the entry that never saw it."""
        numbers = {group: i for i, group in enumerate(self.groups, 1)}
        return np.array([numbers.get(group, 0) for group in groups], np.int64)

    def logits(self, embedding: Float[np.ndarray, "b d"], entries: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b c"]:
        """float32, each row by its entry."""
        answers = np.zeros((len(embedding), len(self.classes)), np.float32)
        for entry in np.unique(entries):
            rows = entries == entry
            answers[rows] = (embedding[rows] - self.mean[entry]) / self.scale[entry] @ self.weight[entry].T + self.bias[entry]
        return answers

    def to_bytes(self) -> bytes:
        """A safetensors file; equal probes give equal bytes."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("weight", "bias", "mean", "scale")}
        about = {"format_version": FORMAT_VERSION, "classes": [*self.classes], "by": self.by, "groups": [*self.groups]}
        data: bytes = safetensors.numpy.save(tensors, {ABOUT: json.dumps(about)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Probe:
        """Raises KeyError, TypeError, ValueError, AttributeError or SafetensorError when the bytes hold no probe."""
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][ABOUT])
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format is version {about['format_version']}, not {FORMAT_VERSION}")
        classes, by, groups = [*map(str, about["classes"])], about["by"], [*map(str, about["groups"])]
        num_entries, num_classes, num_dims = tensors["weight"].shape
        shapes = {"weight": (1 + len(groups), len(classes), num_dims), "bias": (num_entries, num_classes)}
        for name, shape in (shapes | dict.fromkeys(("mean", "scale"), (num_entries, num_dims))).items():
            if tensors[name].shape != shape or tensors[name].dtype != np.float32 or not np.isfinite(tensors[name]).all():
                raise ValueError(f"{name} must be finite float32 of shape {shape}; it is {tensors[name].dtype} {tensors[name].shape}")
        if not (tensors["scale"] > 0).all():
            raise ValueError("scale must be above 0")
        if (by is None) != (not groups) or len(set(groups)) != len(groups):
            raise ValueError(f"it has {len(groups)} groups of the column {by!r}")
        return cls(tensors["weight"], tensors["bias"], tensors["mean"], tensors["scale"], classes, by, groups)


class ProbeTeacher(Teacher):
    """What the teacher `of` emits, with a probe's logits in the place of its embedding and logits: one for each class of the probe.

    `path` is the file that `vkd probe` wrote. When that is cross-fitted by a manifest column, a clip is answered by the classifier
    that never saw its group, and by the one fitted on everything when no classifier leaves its group out.
    """

    version = 1
    places = ("path",)

    def __init__(self, path: str, of: str | Mapping[str, Any]) -> None:
        self.path = path
        self.inner: Teacher = models.build(ModelSpec.model_validate(of), TEACHERS, "teacher")
        self.sampling = self.inner.sampling

    @property
    def needs(self) -> tuple[str, ...]:
        own = () if self._probe.by is None else (self._probe.by,)
        return tuple(dict.fromkeys((*self.inner.needs, *own)))

    @property
    def emits(self) -> Mapping[str, TensorType]:
        emitted = self.inner.emits
        size = self._probe.weight.shape[2]
        if (found := emitted.get(EMBEDDING)) is None or found.shape != (size,):
            shape = "none" if found is None else f"one of shape {list(found.shape)}"
            what = f"the probe was fitted on an {EMBEDDING!r} of {size} values; the teacher emits {shape}"
            raise TeacherError(what, where=self.path, action="name the teacher that it was fitted on")
        others = {name: kind for name, kind in emitted.items() if name not in (EMBEDDING, LOGITS)}
        return {LOGITS: TensorType("float32", (len(self._probe.classes),))} | others

    def identity(self) -> dict[str, Any]:
        return {"name": "probe", "version": self.version, "sha256": hashlib.sha256(self._data).hexdigest(), "of": self.inner.identity()}

    def load(self, device: str) -> None:
        _ = self.emits  # a probe that does not fit is told now
        self.inner.load(device)

    @property
    def module(self) -> nn.Module:
        """The network of the wrapped teacher: beside it the probe is nothing."""
        return self.inner.module

    @property
    def stage_names(self) -> Sequence[str]:
        return self.inner.stage_names

    def maps(self, frames: UInt8[Tensor, "b t s s 3"], names: Sequence[str] | None = None) -> list[Float[Tensor, "b _ _ _ _"]]:
        return self.inner.maps(frames, names)

    def __call__(self, batch: Columns) -> Columns:
        answered = self.inner(batch)
        by = self._probe.by
        groups = [""] * len(answered[EMBEDDING]) if by is None else batch[by].tolist()
        logits = self._probe.logits(answered[EMBEDDING], self._probe.entries(groups))
        return {name: column for name, column in answered.items() if name != EMBEDDING} | {LOGITS: logits}

    def probe_batch(self) -> Columns:
        empty = {name: np.array([""]) for name in self.needs}
        return empty | self.inner.probe_batch()

    @cached_property
    def _data(self) -> bytes:
        try:
            return files.read(self.path)
        except _UNREADABLE as error:
            raise self._broken(error) from error

    @cached_property
    def _probe(self) -> Probe:
        try:
            return Probe.from_bytes(self._data)
        except _UNREADABLE as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> TeacherError:
        what = f"the probe cannot be loaded: {type(error).__name__}: {error}"
        return TeacherError(what, where=self.path, action="name the file that `vkd probe` wrote")
