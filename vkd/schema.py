"""Column names, tensor types and ids that every part of vkd shares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

Columns = dict[str, np.ndarray]  # one batch: column name -> array of equal first length; read-only, return batch | {...}

# manifest columns
VIDEO_ID, URI, DURATION_S, FPS, WIDTH_PX, HEIGHT_PX = "video_id", "uri", "duration_s", "fps", "width", "height"
CODEC, SIZE_BYTES, ETAG = "codec", "size_bytes", "etag"
LABEL, SPLIT, GROUP = "label", "split", "group"
# example columns
EXAMPLE_ID, START_S, END_S = "example_id", "start_s", "end_s"
# label columns
STATUS, LABELLED, REJECTED = "status", "labelled", "rejected"
REJECT_STAGE, REJECT_KIND, REJECT_MESSAGE, REJECT_PERMANENT = "reject_stage", "reject_kind", "reject_message", "reject_permanent"
ATTEMPTS, REJECT_DECODER = "attempts", "reject_decoder"
# the frames of a batch: uint8 [B, T, S, S, 3]
FRAMES = "frames"
# of a training batch: which example a row is, as its number in the plan (-1: none), and what it counts
EXAMPLE, WEIGHT = "example", "weight"
# splits
TRAIN, VAL, GAP = "train", "val", "gap"


@dataclass(frozen=True)
class TensorType:
    """dtype and shape of one row of a label; a leading `None` is a ragged axis.

    >>> TensorType("float32", (1000,)).num_values
    1000
    """

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def ragged(self) -> bool:
        return bool(self.shape) and self.shape[0] is None

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape without the ragged axis."""
        return tuple(n for n in self.shape if n is not None)

    @property
    def num_values(self) -> int:
        """Values per row (per step of the ragged axis when ragged)."""
        return int(np.prod(self.row_shape, dtype=np.int64))


def digest(*parts: object, num_chars: int = 16) -> str:
    """Hex digest of the parts' text; equal parts give equal digests on any machine."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:num_chars]
