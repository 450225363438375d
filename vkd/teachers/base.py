"""The contract that every teacher keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vkd.clips import Sampling
from vkd.errors import ConfigError, TeacherError
from vkd.schema import FRAMES, Columns, TensorType
from vkd.stage_maps import KEY
from vkd.transfer import ToDevice, staged, to_host

PRECISIONS = ("fp32", "bf16")


class Teacher(ABC):
    """A frozen model. Constructing one is cheap: files are named, not loaded, until `load` is called.

    `version` is raised whenever the adapter's arithmetic changes: labels made before then belong to another teacher. `places` are
    its options that name a file or a folder.
    """

    version: ClassVar[int]
    places: ClassVar[tuple[str, ...]] = ()
    sampling: Sampling | None  # None: it reads no frames, and nothing is decoded for it

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that its batches must have: `frames`, and any of the manifest's, which come as text, empty where there is nothing."""
        return (FRAMES,)

    @property
    @abstractmethod
    def emits(self) -> Mapping[str, TensorType]:
        """Label names with the type of one row."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides the output besides the input: digests of the files really loaded, options, precision. JSON-able."""

    @abstractmethod
    def load(self, device: str) -> None:
        """Load the weights. Raises TeacherError when a file is missing or does not fit."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The network, to count its parameters and operations. Only after `load`."""

    @abstractmethod
    def __call__(self, batch: Columns) -> Columns:
        """The batch with labels (float32, one row per clip) added, of a batch with what it needs. Only after `load`.

        `frames` are uint8 [B, T, S, S, 3]; a ragged label is a list, or an array of arrays.
        """

    @property
    def stage_names(self) -> Sequence[str]:
        """The parts of the network whose maps `maps` gives when none are named; empty when it gives none. Only after `load`."""
        return ()

    def maps(self, frames: UInt8[Tensor, "b t s s 3"], names: Sequence[str] | None = None) -> list[Float[Tensor, "b _ _ _ _"]]:
        """Maps of the parts `names` of the network, without a gradient, for a teacher that is asked while a student learns.

        None means `stage_names`: those of its option `substages`, or else its own. Frames are on its device. Only after `load`. Raises
        ConfigError when it gives none.
        """
        action = "train on stored descriptors, or choose a teacher that gives maps"
        raise ConfigError(f"{type(self).__name__} gives no maps of its stages", where=KEY, action=action)

    def logits_from(self, frames: UInt8[Tensor, "b t s s 3"], outputs: Mapping[str, Tensor]) -> Float[Tensor, "b c"]:
        """Its logits when these parts of the network give `outputs` instead of running, with a gradient. Only after `load`.

        Frames are on its device, outputs in the network's own layout. Raises ConfigError when it cannot.
        """
        action = "set recipe.combos.stitch: false, or choose a teacher that can"
        raise ConfigError(f"{type(self).__name__} cannot go on from the map of a student", where="recipe.teacher", action=action)

    def probe_batch(self) -> Columns:
        """The built-in synthetic clip: one row of drifting colour waves, the same bytes on every machine; other columns are empty text."""
        empty = {name: np.array([""]) for name in self.needs}
        return empty if self.sampling is None else empty | {FRAMES: probe_frames(self.sampling)[None]}


class HalvingBatches:
    """Applies a network to sub-batches; when the device is out of memory it halves `batch_size`, for good, and goes on.

    On a GPU nothing is waited for until all is asked: a sub-batch is copied while the one before it computes, and answers
    come to the host together. `precision` is `fp32`, or `bf16` for autocast.
    """

    def __init__(self, batch_size: int, device: str = "cpu", precision: str = "fp32") -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; it can be {', '.join(PRECISIONS)}")
        self.batch_size, self._to_device = batch_size, ToDevice(device)
        self.autocast = torch.autocast(self._to_device.device.type, torch.bfloat16, enabled=precision == "bf16")

    def run(self, fn: Callable[[Tensor], Mapping[str, Tensor]], rows: np.ndarray) -> Columns:
        """`fn` of all rows; it gets and gives tensors on the device. Raises TeacherError when even one row does not fit."""
        parts: list[Mapping[str, Tensor]] = []
        done = 0
        while done < len(rows) or not parts:
            part = rows[done : done + self.batch_size]
            try:
                parts.append(self._ask(fn, part))
                done += len(part)
                continue
            except torch.OutOfMemoryError as error:
                if len(part) <= 1:
                    action = "lower num_frames, choose a smaller model, or use a device with more memory"
                    raise TeacherError("one clip does not fit in the memory of the device", action=action) from error
            # after the except clause, whose traceback would keep the failed call's tensors alive
            torch.cuda.empty_cache()
            self.batch_size = len(part) // 2
        return to_host({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @torch.inference_mode()
    def _ask(self, fn: Callable[[Tensor], Mapping[str, Tensor]], rows: np.ndarray) -> Mapping[str, Tensor]:
        on_device = self._to_device({FRAMES: staged(rows)})[FRAMES]
        with self.autocast:
            return fn(on_device)


def probe_frames(sampling: Sampling) -> np.ndarray:
    """uint8 [T, S, S, 3] made by integer arithmetic only."""
    t, y, x, c = np.ogrid[: sampling.num_frames, : sampling.size_px, : sampling.size_px, :3]
    ramp = (x * (3 + c) + y * (5 - c) + t * 17 + (x * y) // 16 * (c + 1)) % 512
    frames: np.ndarray = np.where(ramp < 256, ramp, 511 - ramp).astype(np.uint8)
    return frames
