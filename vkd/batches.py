"""Rows of chunks that are in memory -> a batch of tensors; clips bring their frames, from the store or from the videos."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from vkd import schema
from vkd.clips import Sampling, ViewPolicy
from vkd.planning import FRAMES_ALIAS
from vkd.recipes.base import Batch
from vkd.schema import TensorType
from vkd.stages import clip_of, decode_or_reject
from vkd.store.encodings import decode
from vkd.store.labelset import Reject
from vkd.transfer import pinned
from vkd.video.settings import Settings

if TYPE_CHECKING:
    from vkd.run import Views


@dataclass(frozen=True)
class Loaded:
    """One chunk in memory: each label set's table, which rows every set has labelled, their classes and numbers."""

    tables: Mapping[str, pa.Table]
    usable: np.ndarray
    classes: np.ndarray
    numbers: np.ndarray
    examples: pa.Table


Part = tuple[Loaded, np.ndarray]  # a chunk, and which of its rows


class FrameBatches:
    """Batches of clips: frames, every label, class and number. `unreadable` counts clips that were labelled once and no longer decode."""

    def __init__(self, tensors: Mapping[tuple[str, str], TensorType], views: Views, sampling: Sampling, decoding: Settings) -> None:
        self.tensors = {key: tensor for key, tensor in tensors.items() if key[0] != FRAMES_ALIAS}
        self.views, self.sampling, self.decoding, self.unreadable = views, sampling, decoding, 0
        self._lock = threading.Lock()

    def __call__(self, parts: Sequence[Part], epoch: int) -> Batch:
        """Tensors of all rows; one masked row of weight 0 when there are none, so that every rank runs every step."""
        made = [self._columns(chunk, rows, epoch % self.views.count) for chunk, rows in parts]
        made = [part for part in made if len(part[schema.WEIGHT])] or [self._masked_row()]
        return {name: pinned(torch.from_numpy(np.concatenate([part[name] for part in made]))) for name in made[0]}

    def _columns(self, chunk: Loaded, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        if FRAMES_ALIAS in chunk.tables:
            frames = np.asarray(decode(chunk.tables[FRAMES_ALIAS], FRAMES_ALIAS, rows))
        else:
            rows, frames = self._decode_videos(chunk.examples, rows, self.views, view)
        columns = {schema.FRAMES: frames, schema.LABEL: chunk.classes[rows], schema.EXAMPLE: chunk.numbers[rows]}
        columns[schema.WEIGHT] = np.ones(len(rows), np.float32)
        for alias, name in self.tensors:
            columns[f"{alias}.{name}"] = np.array(decode(chunk.tables[alias], name, rows))
        return columns

    def _decode_videos(self, examples: pa.Table, rows: np.ndarray, views: ViewPolicy, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames decoded now; a video that no longer decodes is counted and left out."""
        found, frames = [], []
        clips = [clip_of(example, views, view) for example in examples.take(rows).to_pylist()]
        for row, decoded in zip(rows.tolist(), decode_or_reject(clips, self.decoding), strict=True):
            if isinstance(decoded, Reject):
                with self._lock:  # several threads make batches
                    self.unreadable += 1
                continue
            frames += decoded
            found.append(row)
        return np.array(found, np.int64), np.stack(frames) if frames else self._no_frames(0)

    def _masked_row(self) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {schema.FRAMES: self._no_frames(1), schema.WEIGHT: np.zeros(1, np.float32)}
        columns |= {name: np.full(1, -1) for name in (schema.LABEL, schema.EXAMPLE)}
        for (alias, name), tensor in self.tensors.items():
            columns[f"{alias}.{name}"] = np.zeros((1, *tensor.row_shape), np.float32)
        return columns

    def _no_frames(self, num_rows: int) -> np.ndarray:
        side_px = self.sampling.size_px
        return np.zeros((num_rows, self.sampling.num_frames, side_px, side_px, 3), np.uint8)
