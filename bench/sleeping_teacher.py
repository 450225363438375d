"""A teacher that costs time and no CPU: what a GPU elsewhere looks like to this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vkd.clips import Sampling
from vkd.schema import FRAMES, Columns, TensorType
from vkd.teachers.base import Teacher

NUM_VALUES = 16


class SleepingTeacher(Teacher):
    """Sleeps for `s_per_call`, a call being a chunk, and emits mean colours of a few places, which differ between clips.

    Notes each call in a file of its own process in the folder `notes`: when it began and when it ended, in seconds since 1970.
    """

    version = 1

    def __init__(self, s_per_call: float = 2.0, notes: str | None = None, num_frames: int = 2, size_px: int = 32) -> None:
        self.s_per_call, self.notes, self.sampling = s_per_call, notes, Sampling(num_frames=num_frames, size_px=size_px)

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"embedding": TensorType("float32", (NUM_VALUES,))}

    def identity(self) -> dict[str, Any]:
        return {"name": "sleeping_teacher", "version": self.version, "s_per_call": self.s_per_call}

    def load(self, device: str) -> None:
        """Nothing to load."""

    @property
    def module(self) -> nn.Module:
        return nn.Identity()

    def __call__(self, batch: Columns) -> Columns:
        frames = batch[FRAMES]
        if not np.array_equal(frames, self.probe_batch()[FRAMES]):
            began_s = time.time()
            time.sleep(self.s_per_call)
            if self.notes is not None:
                with Path(self.notes, str(os.getpid())).open("a") as file:
                    file.write(f"{began_s} {time.time()}\n")
        places = torch.from_numpy(frames.reshape(len(frames), NUM_VALUES, -1).astype(np.float32))
        return batch | {"embedding": places.mean(dim=2).numpy()}
