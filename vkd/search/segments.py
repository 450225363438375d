"""Where in two videos the same thing is shown: the best path through their frame-to-frame similarity. Pure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Block(NamedTuple):
    """Frames [start, end) of the query and of the target, and the sum of what similarity exceeds the threshold by on the path."""

    query_start: int
    query_end: int
    target_start: int
    target_end: int
    score: float


def best_block(similarity: Float[np.ndarray, "n m"], threshold: float) -> Block | None:
    """The best local alignment (Smith & Waterman 1981): forwards in both videos, at most twice as fast in one as in the other.

    Cells count by what they exceed the threshold by, so a path crosses a few bad frames when what follows makes up for them.
    None when no cell exceeds it.
    """
    gains = np.asarray(similarity, np.float64) - threshold
    n, m = gains.shape
    best = np.zeros((n + 2, m + 2))  # cell (i, j) at [i + 2, j + 2]: two rows and columns of nothing before the first
    begins = np.zeros((n + 2, m + 2, 2), np.int64)
    for i in range(n):
        # one frame of each, two of the target, two of the query; or begin here. Of equal ones the first
        came = np.stack([best[i + 1, 1:-1], best[i + 1, :-2], best[i, 1:-1], np.zeros(m)])
        froms = np.stack([begins[i + 1, 1:-1], begins[i + 1, :-2], begins[i, 1:-1], np.stack([np.full(m, i), np.arange(m)], 1)])
        came[:3][came[:3] <= 0] = -np.inf
        chosen = came.argmax(0)
        best[i + 2, 2:] = np.maximum(came.max(0) + gains[i], 0)
        begins[i + 2, 2:] = froms[chosen, np.arange(m)]
    i, j = (int(place) for place in np.unravel_index(best.argmax(), best.shape))
    if best[i, j] <= 0:
        return None
    query_start, target_start = begins[i, j].tolist()
    return Block(query_start, i - 1, target_start, j - 1, float(best[i, j]))
