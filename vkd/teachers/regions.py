"""Region features of every frame of a video: what students of video similarity are trained on, and compare."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vkd.clips import Sampling
from vkd.efficientnet import packaged_weights
from vkd.errors import TeacherError
from vkd.region_features import BACKBONES, MAX_SIZE_PX, MIN_SIZE_PX, NUM_REGIONS, RegionNetwork
from vkd.schema import DURATION_S, END_S, FRAMES, START_S, Columns, TensorType
from vkd.store import files
from vkd.teachers.base import PRECISIONS, HalvingBatches, Teacher
from vkd.weights import named
from vkd.whitening import Whiten, Whitening, network_of

REGIONS = "regions"
LITE = "efficientnet_lite0"
CPU_BATCH_SIZE = 2  # frames: the maps of more leave the cache of a core
ROUNDING = 1e-6  # of a frame: a span of 2 s that was computed has no ninth frame at 4 a second


@dataclass(eq=False, repr=False)
class RegionsTeacher(Teacher):
    """Nine region features for each frame, `fps` a second from the start on, at most `max_frames`: vectors of unit length.

    `backbone` is `efficientnet_lite0`, whose ImageNet weights a package carries, or `resnet50`, for which `weights` must name
    torchvision's state dict (the V1 weights are those that others use). `whitening` names the file that `vkd whiten` wrote, or the
    reference's PCA file; `dims` keeps its first dims only. `batch_size` counts frames of one pass on a GPU and halves by itself when
    its memory is short.
    """

    version = 1
    places = ("weights", "whitening")

    backbone: str = LITE
    weights: str | None = None
    fps: int | float = 4.0
    max_frames: int = 64
    size_px: int = 224
    whitening: str | None = None
    dims: int | None = None
    batch_size: int = 64
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name, value, known in (("backbone", self.backbone, tuple(BACKBONES)), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(known)}")
        if not MIN_SIZE_PX <= self.size_px <= MAX_SIZE_PX:
            raise ValueError(f"size_px is {self.size_px}; there are {NUM_REGIONS} regions from {MIN_SIZE_PX} to {MAX_SIZE_PX}")
        if self.backbone != LITE and self.weights is None:
            raise ValueError(f"weights is needed: no package carries those of {self.backbone}")
        if self.dims is not None and self.whitening is None:
            raise ValueError("dims is of a whitening: name one, or leave dims out")
        self.sampling = Sampling(num_frames=self.max_frames, size_px=self.size_px, mode="fps", fps=self.fps, resize="bicubic")
        self._batches = HalvingBatches(self.batch_size)
        self._network: RegionNetwork | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return (FRAMES, START_S, END_S, DURATION_S)

    @property
    def emits(self) -> Mapping[str, TensorType]:
        given = BACKBONES[self.backbone].num_channels
        if self._whitening is None:
            return {REGIONS: TensorType("float32", (None, NUM_REGIONS, given))}
        if len(self._whitening.mean) != given:
            what = f"the whitening is of {len(self._whitening.mean)} values; {self.backbone} gives {given}"
            raise TeacherError(what, where=self.whitening or "", action="fit one on the features of this backbone: vkd whiten RUN OUT")
        return {REGIONS: TensorType("float32", (None, NUM_REGIONS, len(self._whitening.eigenvalues)))}

    def identity(self) -> dict[str, Any]:
        """Raises TeacherError when the whitening was fitted on features of another network."""
        with self._weights_path().open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        told = {"name": REGIONS, "version": self.version, "backbone": self.backbone, "precision": self.precision, "weights_sha256": digest}
        if self._whitening is not None and self._whitening.network not in ("", network_of(told)):
            what = f"the whitening was fitted on features of {self._whitening.network}, these are of {network_of(told)}"
            raise TeacherError(what, where=self.whitening or "", action="fit one on the features of this network: vkd whiten RUN OUT")
        whitened = None if self._data is None else {"sha256": hashlib.sha256(self._data).hexdigest(), "dims": self.dims}
        return told | {"whitening": whitened}

    def load(self, device: str) -> None:
        _ = self.emits  # a whitening that does not fit is told now
        whiten = None if self._whitening is None else Whiten(self._whitening)
        network = RegionNetwork(BACKBONES[self.backbone], self._weights_path(), whiten)
        self._network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        size = min(self.batch_size, CPU_BATCH_SIZE) if device == "cpu" else self.batch_size
        self._batches = HalvingBatches(size, device, self.precision)

    @property
    def module(self) -> RegionNetwork:
        if self._network is None:
            raise TeacherError("regions is not loaded", action="call load(device) first")
        return self._network

    def __call__(self, batch: Columns) -> Columns:
        """Frames that only repeat the end of a short video are left out."""
        network, spans = self.module, zip(batch[START_S], batch[END_S], batch[DURATION_S], strict=True)
        labels = np.empty(len(batch[FRAMES]), object)
        for row, (frames, span) in enumerate(zip(batch[FRAMES], spans, strict=True)):
            labels[row] = self._batches.run(lambda part: {REGIONS: network(part)}, frames[: self.num_frames(*span)])[REGIONS]
        return batch | {REGIONS: labels}

    def num_frames(self, start_s: str, end_s: str, duration_s: str) -> int:
        """How many frames of a span are its own; all when nobody knows how long it is."""
        end = end_s or duration_s
        if not end:
            return self.max_frames
        span_s = float(end) - float(start_s or 0)
        return min(max(math.ceil(span_s * self.fps - ROUNDING), 1), self.max_frames)

    def _weights_path(self) -> Path:
        """Raises TeacherError when there is no such file."""
        return packaged_weights(0) if self.weights is None else named(self.weights)

    @cached_property
    def _data(self) -> bytes | None:
        """The whitening's file."""
        if self.whitening is None:
            return None
        try:
            return files.read(self.whitening)
        except FileNotFoundError as error:
            raise self._broken(error) from error

    @cached_property
    def _whitening(self) -> Whitening | None:
        if self._data is None:
            return None
        try:
            found = Whitening.from_bytes(self._data)
        except ValueError as error:
            raise self._broken(error) from error
        return found if self.dims is None else found.first(self.dims)

    def _broken(self, error: Exception) -> TeacherError:
        what = f"the whitening cannot be loaded: {type(error).__name__}: {error}"
        return TeacherError(what, where=self.whitening or "", action="name the file that `vkd whiten` wrote")
