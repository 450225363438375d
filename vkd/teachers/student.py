"""A trained student as a teacher: so rounds of students and cascades are runs like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from vkd.checkpoint import load_student
from vkd.clips import Sampling
from vkd.descriptors import Form, StageLabels, Substages, check_options, chosen
from vkd.errors import ConfigError, TeacherError
from vkd.schema import FRAMES, Columns, TensorType
from vkd.stage_maps import replaced
from vkd.store import files
from vkd.students.base import FEATURES, Student
from vkd.teachers.base import HalvingBatches, Teacher

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LOGITS = "logits"
_UNREADABLE = (FileNotFoundError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError, ConfigError)


class StudentTeacher(Teacher):
    """An exported student, frozen: the output of every head that it was trained with, and its features.

    `path` is the export folder (config.json and model.safetensors); `batch_size` counts clips and halves by itself when the
    device is out of memory; `precision` is `fp32`, or `bf16` for autocast. `substages` adds descriptors of the maps of these
    parts (true: of the student's own substages).
    """

    version = 1
    places = ("path",)

    def __init__(
        self, path: str, batch_size: int = 32, precision: str = "fp32", substages: Substages = False, descriptors: Form = "proj128"
    ) -> None:
        check_options(substages, descriptors)
        self.path, self.batch_size, self.precision = path, batch_size, precision
        self.substages, self.descriptors = substages, descriptors
        try:
            self.sampling = Sampling.model_validate(json.loads(self._read(CONFIG))["sampling"])
        except _UNREADABLE as error:
            raise self._broken(CONFIG, error) from error
        self._batches, self._loaded = HalvingBatches(batch_size, precision=precision), False

    @property
    def emits(self) -> Mapping[str, TensorType]:
        sizes = {FEATURES: self._student.num_features} | {
            name: cast(nn.Linear, head).out_features for name, head in self._student.heads.items()
        }
        return {name: TensorType("float32", (size,)) for name, size in sizes.items()} | self._stages.emits

    def identity(self) -> dict[str, Any]:
        digests = {name: hashlib.sha256(self._read(name)).hexdigest() for name in (CONFIG, WEIGHTS)}
        declared = {"precision": self.precision} if self.precision != "fp32" else {}  # sets from before there was a choice stay valid
        return {"name": "student", "version": self.version, "sha256": digests} | declared | self._stages.identity()

    def load(self, device: str) -> None:
        self._stages.to(device)  # asks the student while it is still on the CPU
        self._student.to(device)
        self._batches, self._loaded = HalvingBatches(self.batch_size, device, self.precision), True

    @property
    def module(self) -> nn.Module:
        return self._student

    def __call__(self, batch: Columns) -> Columns:
        return batch | self._batches.run(self._labels, batch[FRAMES])

    def _labels(self, clips: UInt8[Tensor, "b t s s 3"]) -> dict[str, Float[Tensor, "b ..."]]:
        maps, outputs = self._ready().stages(clips, self._stages.names)
        described: dict[str, Tensor] = self._stages(maps)
        return {name: output.float() for name, output in outputs.items()} | described

    @property
    def stage_names(self) -> Sequence[str]:
        return self._stages.names or self._ready().substages

    @torch.no_grad()
    def maps(self, frames: UInt8[Tensor, "b t s s 3"], names: Sequence[str] | None = None) -> list[Float[Tensor, "b _ _ _ _"]]:
        student = self._ready()
        names = self.stage_names if names is None else names
        with self._batches.autocast:
            # '' is the student itself: it would end last, so it stops where the maps are there
            return student.stages(frames, [*names, ""], num_stages=len(names))[0]

    def logits_from(self, frames: UInt8[Tensor, "b t s s 3"], outputs: Mapping[str, Tensor]) -> Float[Tensor, "b c"]:
        student = self._ready()
        if LOGITS not in student.heads:
            action = "name a student that was taught logits"
            raise ConfigError(f"the student answers no {LOGITS!r}", where=self.path, action=action)
        with self._batches.autocast, replaced(student, outputs):
            answers: dict[str, Tensor] = student(frames)
        return answers[LOGITS].float()

    def _ready(self) -> Student:
        if not self._loaded:
            raise TeacherError("the student is not loaded", where=self.path, action="call load(device) first")
        return self._student

    @cached_property
    def _stages(self) -> StageLabels:
        if not self.substages:
            return StageLabels((), (), self.descriptors)  # its identity must not need the weights loaded
        names = chosen(self.substages, self._student.substages)
        with torch.no_grad():
            maps, _ = self._student.stages(torch.from_numpy(self.probe_batch()[FRAMES]), names)
        return StageLabels(names, [x.shape[1] for x in maps], self.descriptors)

    @cached_property
    def _student(self) -> Student:
        """On the CPU until `load`; loaded at first need, since only it knows the size of its features."""
        try:
            student: Student = load_student(self.path)
        except _UNREADABLE as error:
            raise self._broken(WEIGHTS, error) from error
        return student.eval().requires_grad_(False)

    def _read(self, name: str) -> bytes:
        try:
            return files.read(files.join(self.path, name))
        except FileNotFoundError as error:
            raise self._broken(name, error) from error

    def _broken(self, name: str, error: Exception) -> TeacherError:
        action = "name the folder that `vkd export` wrote"
        return TeacherError(
            f"the student cannot be loaded: {type(error).__name__}: {error}", where=files.join(self.path, name), action=action
        )
