"""Tiny teachers that take no time, for runs of tests: `fakes:TinyTeacher` and what can be wrong with one."""

from __future__ import annotations

import os
import signal
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vkd import models
from vkd.clips import Sampling
from vkd.descriptors import NUM_ROWS, Descriptor
from vkd.losses import distillation
from vkd.models import ModelSpec
from vkd.recipes.base import Batch, Distiller, Emits, Losses, Recipe
from vkd.schema import FRAMES, WEIGHT, Columns, TensorType
from vkd.schema import digest as digest_of
from vkd.stage_maps import replaced, stage_maps
from vkd.students import STUDENTS
from vkd.students.base import Student
from vkd.teachers.base import Teacher

NUM_CLASSES, NUM_DIMS, GRID = 5, 8, 4


class TinyTeacher(Teacher):
    """A fixed random linear map of a clip's coarse colours; `weights` names a file that decides which one."""

    version = 1

    def __init__(self, num_frames: int = 2, size_px: int = 16, weights: str | None = None, seed: int = 0) -> None:
        self.sampling = Sampling(num_frames=num_frames, size_px=size_px)
        self.weights, self.seed = weights, seed
        rng = np.random.default_rng(seed)
        self.matrix = rng.standard_normal((num_frames * GRID * GRID * 3, NUM_CLASSES + NUM_DIMS)).astype(np.float32) / 10

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"logits": TensorType("float32", (NUM_CLASSES,)), "embedding": TensorType("float32", (NUM_DIMS,))}

    def identity(self) -> dict[str, Any]:
        files = {} if self.weights is None else {"weights": digest_of(Path(self.weights).read_text())}
        return {"name": type(self).__name__, "version": self.version, "seed": self.seed} | files

    def load(self, device: str) -> None:
        self.loaded_on = torch.device(device)

    @property
    def module(self) -> nn.Module:
        return nn.Linear(*self.matrix.shape)

    def __call__(self, batch: Columns) -> Columns:
        return batch | self.labels(batch[FRAMES])

    def labels(self, frames: np.ndarray) -> Columns:
        num_rows, num_frames, size_px = frames.shape[:3]
        cells = frames.reshape(num_rows, num_frames, GRID, size_px // GRID, GRID, size_px // GRID, 3).mean(axis=(3, 5))
        answers = (cells.reshape(num_rows, -1).astype(np.float32) / 64 - 2) @ self.matrix
        return {"logits": answers[:, :NUM_CLASSES], "embedding": answers[:, NUM_CLASSES:]}


class TinyMaps(TinyTeacher):
    """Has two random stages too, a chain with logits of its own."""

    stage_names = ("stage1", "stage2")

    def load(self, device: str) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, NUM_CLASSES))
            stages = {"stage1": nn.Conv3d(3, 3, 1, (1, 2, 2)), "stage2": nn.Conv3d(3, 4, 3, (1, 2, 2), 1), "head": head}
        self.network = nn.Sequential(OrderedDict(stages)).to(device)

    @property
    def module(self) -> nn.Module:
        return self.network

    def maps(self, frames: Tensor, names: Sequence[str] | None = None) -> list[Tensor]:
        return stage_maps(self.network, names or self.stage_names, lambda: self.logits_from(frames, {}))[0]

    def logits_from(self, frames: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        with replaced(self.network, outputs):
            logits: Tensor = self.network(frames.permute(0, 4, 1, 2, 3).float() / 64 - 2)
        return logits


class Staged(TinyTeacher):
    """Knows some classes, and emits descriptors of stages of so many channels: fixed random maps of the clip's coarse colours."""

    def __init__(self, num_classes: int = 2, stages: Sequence[int] = (5, 7)) -> None:
        super().__init__()
        self.num_classes, self.stages = num_classes, tuple(stages)

    @property
    def emits(self) -> Mapping[str, TensorType]:
        described = {f"stage{k}": TensorType("float32", (NUM_ROWS, d)) for k, d in enumerate(self.stages, 1)}
        return {"logits": TensorType("float32", (self.num_classes,))} | described

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"num_classes": self.num_classes, "stages": list(self.stages)}

    def labels(self, frames: np.ndarray) -> Columns:
        num_rows, num_frames, size_px = frames.shape[:3]
        cells = frames.reshape(num_rows, num_frames, GRID, size_px // GRID, GRID, size_px // GRID, 3).mean(axis=(3, 5))
        colours = cells.astype(np.float32) / 64 - 2
        found = {"logits": colours.reshape(num_rows, -1) @ self.matrix[:, : self.num_classes]}
        for k, d in enumerate(self.stages, 1):
            mixed = np.maximum(colours @ np.random.default_rng(k).standard_normal((3, d)).astype(np.float32), 0)
            found[f"stage{k}"] = Descriptor(d)(torch.from_numpy(mixed).permute(0, 4, 1, 2, 3)).numpy()
        return found


class TinyRegions(TinyTeacher):
    """Emits nine features of each frame: fixed random maps of its coarse colours, whitened if one says so."""

    def __init__(self, whitening: str | None = None) -> None:
        super().__init__()
        self.whitening = whitening

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"regions": TensorType("float32", (None, 9, NUM_DIMS))}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"whitening": self.whitening}

    def labels(self, frames: np.ndarray) -> Columns:
        num_rows, num_frames, size_px = frames.shape[:3]
        cells = frames.reshape(num_rows, num_frames, GRID, size_px // GRID, GRID, size_px // GRID, 3).mean(axis=(3, 5))
        regions = np.tanh(cells[:, :, :3, :3].reshape(num_rows, num_frames, 9, 3).astype(np.float32) / 64 @ self.matrix[:3, :NUM_DIMS])
        ragged = np.empty(num_rows, object)
        for row in range(num_rows):
            ragged[row] = regions[row]
        return {"regions": ragged}


class Words(TinyTeacher):
    """Reads no frames: says how long each word of the column `others` is, and NaN of a `?`."""

    def __init__(self) -> None:
        super().__init__()
        self.sampling = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("others",)

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"scores": TensorType("float32", (None,))}

    def __call__(self, batch: Columns) -> dict[str, Any]:
        texts = batch["others"].tolist()
        return batch | {"scores": [np.array([np.nan if w == "?" else len(w) for w in text.split()], np.float32) for text in texts]}


class NotFinite(TinyTeacher):
    """Answers its probe, and NaN for every clip but the first of a batch."""

    def labels(self, frames: np.ndarray) -> Columns:
        answers = super().labels(frames)
        answers["logits"][1:, 0] = np.nan
        return answers


class WrongOnClips(TinyTeacher):
    """Answers its probe as it says, and clips with one logit less."""

    def labels(self, frames: np.ndarray) -> Columns:
        answers = super().labels(frames)
        return answers if len(frames) == 1 else answers | {"logits": answers["logits"][:, 1:]}


class WrongShape(TinyTeacher):
    """Emits embeddings of another size than it says."""

    def labels(self, frames: np.ndarray) -> Columns:
        answers = super().labels(frames)
        return answers | {"embedding": answers["embedding"][:, 1:]}


class Silent(TinyTeacher):
    """Does not give the logits that it says it emits."""

    def labels(self, frames: np.ndarray) -> Columns:
        return {"embedding": super().labels(frames)["embedding"]}


class Counts(TinyTeacher):
    """Emits whole numbers."""

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"counts": TensorType("int32", (NUM_CLASSES,))}

    def labels(self, frames: np.ndarray) -> Columns:
        return {"counts": super().labels(frames)["logits"].astype(np.int32)}


class RaisesAtBlack(TinyTeacher):
    """Raises when there is a black clip among those it is asked about."""

    def labels(self, frames: np.ndarray) -> Columns:
        if not frames.any(axis=(1, 2, 3, 4)).all():
            raise ZeroDivisionError("no light")
        return super().labels(frames)


class RaisesAtBatches(TinyTeacher):
    """Takes one clip at a time only."""

    def labels(self, frames: np.ndarray) -> Columns:
        if len(frames) > 1:
            raise RuntimeError("too many")
        return super().labels(frames)


class RaisesAtClips(TinyTeacher):
    """Answers its probe only."""

    def labels(self, frames: np.ndarray) -> Columns:
        if not np.array_equal(frames, self.probe_batch()[FRAMES]):
            raise KeyError("no such layer")
        return super().labels(frames)


class Constant(TinyTeacher):
    """Says of every clip what it says of its probe."""

    def labels(self, frames: np.ndarray) -> Columns:
        return super().labels(np.repeat(self.probe_batch()[FRAMES], len(frames), axis=0))


class Collapsed(TinyTeacher):
    """Its embedding hardly depends on the clip; its logits do."""

    def labels(self, frames: np.ndarray) -> Columns:
        answers = super().labels(frames)
        return answers | {"embedding": 1 + 1e-6 * answers["embedding"]}


class Dies(TinyTeacher):
    """Ends its process when it is asked about clips, as often as `times` says, counted by files in `folder`."""

    def __init__(self, folder: str, times: int) -> None:
        super().__init__()
        self.folder, self.times = Path(folder), times

    def labels(self, frames: np.ndarray) -> Columns:
        deaths = len(list(self.folder.iterdir()))
        if deaths < self.times and not np.array_equal(frames, self.probe_batch()[FRAMES]):
            (self.folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().labels(frames)


class TwoTeachers(Recipe):
    """A student that learns the embeddings of two teachers; it has a head for the first one's."""

    name: Literal["fakes:TwoTeachers"]
    first: ModelSpec
    second: ModelSpec

    @property
    def teachers(self) -> Mapping[str, ModelSpec]:
        return {"first": self.first, "second": self.second}

    def distiller(self, emits: Emits, num_classes: int) -> Distiller:
        heads = {"embedding": emits["first"]["embedding"].num_values}
        return TwoTeachersDistiller(models.build(self.student, STUDENTS, "student", heads=heads))


class TwoTeachersDistiller(Distiller):
    """The mean square of what the student says less what both teachers say together."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: Batch) -> Losses:
        taught = batch["first.embedding"] + batch["second.embedding"]
        return {"both": distillation.mse(self.student(batch[FRAMES])["embedding"], taught, batch[WEIGHT])}
