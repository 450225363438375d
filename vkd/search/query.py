"""Search: every video by its coarse score, those that the selector asks for by their fine one (Kordopatis-Zilos et al. 2022).

Or those whose coarse scores are best: `Order`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped

from vkd import schema
from vkd.search import comparison, segments
from vkd.search.index import Index
from vkd.search.networks import Codes
from vkd.search.segments import Block

SELECTOR_PAIRS = 1 << 14  # asked at once
FETCHED_VIDEOS = 256  # at once
TIE_DECIMALS = 6  # a matrix product gives equal rows values that differ by rounding


Order = Literal["selector", "coarse"]
ORDERS: tuple[Order, ...] = get_args(Order)


class Segment(NamedTuple):
    """What two videos share, in seconds of each."""

    query_start_s: float
    query_end_s: float
    start_s: float
    end_s: float


class Hit(NamedTuple):
    """A video that was found. `score`, in [0, 1], is the fine one where it was in the budget (`is_fine`), else the coarse one.

    `matches`: its fine score reaches the index's threshold, so it is a copy rather than the next best video; only then has it a segment.
    """

    video_id: str
    uri: str
    duration_s: float | None
    score: float
    is_fine: bool
    matches: bool
    segment: Segment | None


class Ranking(NamedTuple):
    """Of all videos of an index the score, whether it is the fine one, and their numbers, best first; of equal ones by id."""

    scores: Float[np.ndarray, " n"]
    is_fine: Bool[np.ndarray, " n"]
    order: Int[np.ndarray, " n"]


def search(
    index: Index, query_regions: Float[np.ndarray, "t r d"], budget: float = 0.05, top: int = 20, order: Order = "selector"
) -> list[Hit]:
    """The best `top` videos. The share `budget` of the index is compared finely."""
    query = index.networks.index(query_regions)
    return hits(index, query, len(query_regions), rank(index, query, budget, order), top)


def rank(index: Index, query: Codes, budget: float, order: Order = "selector") -> Ranking:
    """All videos of an index: int(budget * N) by their fine score mapped to [0, 1], the others by the coarse one as it is."""
    needs = need(index, query, order)
    return ranking(index, query, best_first(needs, index.id_rank)[: int(budget * len(index))])


@torch.inference_mode()
def need(index: Index, query: Codes, order: Order = "selector") -> Float[np.ndarray, " n"]:
    """How much each video needs the fine score: by the selector, or by its coarse score."""
    scores: Float[np.ndarray, " n"] = index.coarse @ query.coarse
    if order == "coarse":
        return scores
    theirs, coarse = torch.from_numpy(index.selector), torch.from_numpy(scores)
    parts = zip(*(torch.split(x, SELECTOR_PAIRS) for x in (theirs, coarse)), strict=True)
    return torch.cat([index.networks.selector(torch.full_like(e, query.selector), e, s) for e, s in parts]).numpy()


def ranking(index: Index, query: Codes, chosen: Int[np.ndarray, " k"]) -> Ranking:
    """All videos, those that are `chosen` by their fine score."""
    scores = index.coarse @ query.coarse
    is_fine = np.zeros(len(index), np.bool_)
    is_fine[chosen] = True
    scores[chosen] = fine_scores(index, query, chosen) / 2 + 0.5
    return Ranking(scores, is_fine, best_first(scores, index.id_rank))


def fine_scores(index: Index, query: Codes, videos: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Fine scores in [-1, 1] of these videos; codes are fetched for some of them at a time, so that they need not all lie in memory."""
    found = np.empty(len(videos), np.float32)
    order = np.argsort(index.shard_of[videos], kind="stable")
    for part in np.split(order, range(FETCHED_VIDEOS, len(order), FETCHED_VIDEOS)):
        found[part] = comparison.scores(index.networks.fine, query.fine, index.fetch(videos[part]))
    return found


def hits(index: Index, query: Codes, query_frames: int, found: Ranking, top: int) -> list[Hit]:
    """What is told of the best `top` of a ranking; all of them are compared finely, to tell matches and segments."""
    best, match = found.order[:top], index.thresholds.match
    fine = fine_scores(index, query, best) / 2 + 0.5
    query_s = query_frames / index.features.fps
    told = []
    for number, fine_score, row in zip(best.tolist(), fine, index.videos.take(best).to_pylist(), strict=True):
        matches = match is not None and bool(fine_score >= match)
        duration_s = row[schema.DURATION_S]
        block = _block(index, query, query_frames, number, duration_s) if matches else None
        segment = None if block is None else _seconds(block, index.features.fps, query_s, duration_s)
        score, is_fine = float(found.scores[number]), bool(found.is_fine[number])
        told.append(Hit(row[schema.VIDEO_ID], row[schema.URI], duration_s, score, is_fine, matches, segment))
    return told


def best_first(values: Float[np.ndarray, " n"], ids: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Positions from the highest value down; of values that only rounding tells apart, by id."""
    return np.lexsort((ids, -values.round(TIE_DECIMALS)))


def _block(index: Index, query: Codes, query_frames: int, number: int, duration_s: float | None) -> Block | None:
    """Among frames that are real: short videos are repeated."""
    (codes,) = index.fetch(np.array([number]))
    frames = len(codes) if duration_s is None else max(1, math.ceil(duration_s * index.features.fps))
    similarity = comparison.frames(index.networks.fine, query.fine, codes)[:query_frames, :frames]
    return segments.best_block(similarity.numpy(), index.thresholds.cell)


def _seconds(block: Block, fps: float, query_s: float, duration_s: float | None) -> Segment:
    """A block in seconds: no later than the videos end, which may be within a frame's time."""
    end_s = block.target_end / fps if duration_s is None else min(block.target_end / fps, duration_s)
    query_start_s, query_end_s = (min(frame / fps, query_s) for frame in (block.query_start, block.query_end))
    return Segment(query_start_s, query_end_s, min(block.target_start / fps, end_s), end_s)
