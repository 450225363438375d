"""Fine scores of stored codes, many videos at a time: what `FineStudent.exact` gives, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vkd.search import packed
from vkd.students.visil import CHUNK_FRAMES, FineStudent

BATCH_CELLS = 1 << 15  # of frame-to-frame maps compared at once: more would not stay in a core's cache
Codes = Shaped[np.ndarray, "_ r w"]  # of one video


@torch.inference_mode()
def scores(fine: FineStudent, query: Codes, targets: Sequence[Codes]) -> Float[np.ndarray, " k"]:
    """How well a query is found in each target, in [-1, 1]. Targets of one length share a batch: no padding, which would change scores."""
    found = np.empty(len(targets), np.float32)
    lengths = np.array([len(target) for target in targets], np.int64)
    for length in np.unique(lengths).tolist():
        places = np.flatnonzero(lengths == length)
        if length > CHUNK_FRAMES:  # the mean over parts
            found[places] = [float(fine.exact(_floats(query), _floats(targets[place]))) for place in places.tolist()]
            continue
        size = max(1, BATCH_CELLS // (len(query) * length))
        for batch in np.split(places, range(size, len(places), size)):
            maps = torch.stack([frames(fine, query, targets[place]) for place in batch.tolist()])
            found[batch] = fine.compare(maps).similarity.numpy()
    return found


@torch.inference_mode()
def frames(fine: FineStudent, query: Codes, target: Codes) -> Float[Tensor, "n m"]:
    """Frame-to-frame similarity of two videos' codes."""
    if query.dtype == np.uint8:
        return packed.frame_similarity(query, target)
    return fine.frames(_floats(query)[None], _floats(target)[None])[0]


def _floats(codes: Codes) -> Float[Tensor, "t r k"]:
    return packed.unpack(codes) if codes.dtype == np.uint8 else torch.from_numpy(codes.astype(np.float32))
