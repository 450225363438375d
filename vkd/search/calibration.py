"""Thresholds of an index, from pairs of its videos that show different things; and how many of those that show the same reach them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vkd.search import comparison
from vkd.search.comparison import Codes
from vkd.students.visil import FineStudent

MAX_FALSE_MATCHES = 0.01  # of a query that has no copy in the index, on average
NUM_PAIRS = 1000
NUM_COPIES = 200  # pairs that are known to show the same
CELL_QUANTILE = 0.99  # of frame pairs of different videos
MIDDLE, HIGH = 0.5, 0.9  # quantiles: more of the pairs may show the same after all, such as one scene on two days
Fetch = Callable[[Int[np.ndarray, " k"]], list[Codes]]


@dataclass(frozen=True)
class Thresholds:
    """Of a pair of videos the fine score in [0, 1] from which they match; of a pair of frames the similarity that counts as alike.

    `recall`: the share of the pairs that are known to show the same that match, None where no such pair is known; `by_chance`: that
    of the others, drawn at random. Nothing matches where `match` is None.
    """

    match: float | None = None
    cell: float = 1.0
    recall: float | None = None
    by_chance: float | None = None


def calibrate(negatives: Float[np.ndarray, " k"], num_videos: int, max_false_matches: float = MAX_FALSE_MATCHES) -> float | None:
    """The score that so many of `num_videos` unrelated ones reach on average; at most 1.

    Beyond what the given scores tell, their tail is taken for exponential, with the slope between their median and 90th percentile.
    None when these are one: no score tells then what is unrelated.
    """
    share = max_false_matches / num_videos
    if share >= 1 - MIDDLE:
        return min(1.0, float(np.quantile(negatives, max(1 - share, 0.0))))
    middle, high = np.quantile(negatives, [MIDDLE, HIGH])
    if high == middle:
        return None
    slope = (high - middle) / math.log((1 - MIDDLE) / (1 - HIGH))
    return min(1.0, float(middle + slope * math.log((1 - MIDDLE) / share)))


def of_pairs(fine: FineStudent, apart: Int[np.ndarray, "k 2"], alike: Int[np.ndarray, "m 2"], fetch: Fetch, num_videos: int) -> Thresholds:
    """From pairs of different videos among `num_videos`, and others that show the same; nothing matches when there are none apart."""
    if not len(apart):
        return Thresholds()
    scores, cells = _compared(fine, apart, fetch)
    match = calibrate(scores, num_videos)
    if match is None:
        return Thresholds(cell=float(np.median(cells)))
    recall = float((_compared(fine, alike, fetch)[0] >= match).mean()) if len(alike) else None
    return Thresholds(match, float(np.median(cells)), recall, float((scores >= match).mean()))


def _compared(fine: FineStudent, pairs: Int[np.ndarray, "k 2"], fetch: Fetch) -> tuple[Float[np.ndarray, " k"], list[float]]:
    """Of each pair the fine score in [0, 1], and a high quantile of its frames' similarities; in no order."""
    scores, cells = [], []
    for first in np.unique(pairs[:, 0]):
        query, *targets = fetch(np.concatenate([[first], pairs[pairs[:, 0] == first, 1]]))
        scores.append(comparison.scores(fine, query, targets))
        cells += [float(np.quantile(comparison.frames(fine, query, target).numpy(), CELL_QUANTILE)) for target in targets]
    return np.concatenate(scores) / 2 + 0.5, cells


def random_pairs(akin: Sequence[Collection[str]]) -> Int[np.ndarray, "k 2"]:
    """At most 1000 pairs of different videos that have no name in common; always the same for the same names."""
    rng, n = np.random.default_rng(0), len(akin)
    drawn = rng.integers(0, n, (2 * NUM_PAIRS, 2))
    apart = dict.fromkeys((i, j) for i, j in drawn.tolist() if i != j and set(akin[i]).isdisjoint(akin[j]))
    return np.array(list(apart)[:NUM_PAIRS], np.int64).reshape(-1, 2)


def known_pairs(shown: Sequence[Collection[str]]) -> Int[np.ndarray, "k 2"]:
    """At most 200 pairs of different videos that are known to show the same; always the same for what is `shown`."""
    showing: dict[str, list[int]] = {}
    for video, names in enumerate(shown):
        for name in names:
            showing.setdefault(name, []).append(video)
    groups = [videos for _, videos in sorted(showing.items()) if len(videos) > 1]
    rng = np.random.default_rng(0)
    drawn = [rng.choice(groups[i % len(groups)], 2, replace=False) for i in range(NUM_COPIES if groups else 0)]
    return np.array(drawn, np.int64).reshape(-1, 2)
