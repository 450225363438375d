"""A trained student as a teacher: so rounds of students and cascades are runs like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from torch import nn

from vkd.checkpoint import load_student
from vkd.clips import Sampling
from vkd.errors import ConfigError, TeacherError
from vkd.schema import FRAMES, Columns, TensorType
from vkd.store import files
from vkd.students.base import FEATURES, Student
from vkd.teachers.base import HalvingBatches, Teacher

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_UNREADABLE = (FileNotFoundError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError, ConfigError)


class StudentTeacher(Teacher):
    """An exported student, frozen: the output of every head that it was trained with, and its features.

    `path` is the export folder (config.json and model.safetensors); `batch_size` counts clips and halves by itself when the
    device is out of memory.
    """

    version = 1

    def __init__(self, path: str, batch_size: int = 32) -> None:
        self.path = path
        try:
            self.sampling = Sampling.model_validate(json.loads(self._read(CONFIG))["sampling"])
        except _UNREADABLE as error:
            raise self._broken(CONFIG, error) from error
        self._batches = HalvingBatches(batch_size)
        self._device: torch.device | None = None

    @property
    def emits(self) -> Mapping[str, TensorType]:
        sizes = {FEATURES: self._student.num_features} | {
            name: cast(nn.Linear, head).out_features for name, head in self._student.heads.items()
        }
        return {name: TensorType("float32", (size,)) for name, size in sizes.items()}

    def identity(self) -> dict[str, Any]:
        digests = {name: hashlib.sha256(self._read(name)).hexdigest() for name in (CONFIG, WEIGHTS)}
        return {"name": "student", "version": self.version, "sha256": digests}

    def load(self, device: str) -> None:
        self._device = torch.device(device)
        self._student.to(self._device)

    @property
    def module(self) -> nn.Module:
        return self._student

    def __call__(self, batch: Columns) -> Columns:
        return batch | self._batches.run(self._labels, batch[FRAMES])

    @torch.inference_mode()
    def _labels(self, clips: UInt8[np.ndarray, "b t s s 3"]) -> Columns:
        if self._device is None:
            raise TeacherError("the student is not loaded", where=self.path, action="call load(device) first")
        frames = torch.from_numpy(np.array(clips)).to(self._device)  # a copy: Ray's arrays are read-only, which torch warns of
        return {name: output.float().cpu().numpy() for name, output in self._student(frames).items()}

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
