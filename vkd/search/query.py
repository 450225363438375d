"""Search: every video by its coarse score, those that the selector asks for by their fine one (Kordopatis-Zilos et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from vkd import schema
from vkd.search import comparison, segments
from vkd.search.index import Index
from vkd.search.networks import Codes
from vkd.search.segments import Block

SELECTOR_PAIRS = 1 << 14  # asked at once
TIE_DECIMALS = 6  # a matrix product gives equal rows values that differ by rounding

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


class Segment(NamedTuple):
    """What two videos share, in seconds of each."""

    query_start_s: float
    query_end_s: float
    start_s: float
    end_s: float


class Hit(NamedTuple):
    """A video that was found. `score`, in [0, 1], is the fine one where the selector asked for it (`is_fine`), else the coarse one.

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


def search(index: Index, query_regions: Float[np.ndarray, "t r d"], budget: float = 0.05, top: int = 20, map: Map = map) -> list[Hit]:
    """The best `top` videos. The share `budget` of the index is compared finely; `map` may do so on several machines."""
    query = index.networks.index(query_regions)
    ranking = rank(index, query, budget, map)
    best = ranking.order[:top]
    best_codes = index.fetch(best)
    fine = comparison.scores(index.networks.fine, query.fine, best_codes) / 2 + 0.5
    query_s = len(query_regions) / index.features.fps
    hits = []
    for number, codes, fine_score, row in zip(best.tolist(), best_codes, fine, index.videos.take(best).to_pylist(), strict=True):
        matches = bool(fine_score >= index.thresholds.match)
        duration_s = row[schema.DURATION_S]
        block = _block(index, query, len(query_regions), codes, duration_s) if matches else None
        segment = None if block is None else _seconds(block, index.features.fps, query_s, duration_s)
        found = float(ranking.scores[number]), bool(ranking.is_fine[number])
        hits.append(Hit(row[schema.VIDEO_ID], row[schema.URI], duration_s, *found, matches, segment))
    return hits


def rank(index: Index, query: Codes, budget: float, map: Map = map) -> Ranking:
    """All videos of an index: int(budget * N) by their fine score mapped to [0, 1], the others by the coarse one as it is."""
    scores = index.coarse @ query.coarse
    chosen = select(index, query, scores, budget)
    is_fine = np.zeros(len(index), np.bool_)
    is_fine[chosen] = True
    scores[chosen] = fine_scores(index, query, chosen, map) / 2 + 0.5
    return Ranking(scores, is_fine, _descending(index, scores))


@torch.inference_mode()
def select(index: Index, query: Codes, coarse: Float[np.ndarray, " n"], budget: float) -> Int[np.ndarray, " k"]:
    """The int(budget * N) videos that most need the fine score; of equal ones by id."""
    theirs, similarity = torch.from_numpy(index.selector), torch.from_numpy(coarse)
    parts = zip(*(torch.split(x, SELECTOR_PAIRS) for x in (theirs, similarity)), strict=True)
    need = torch.cat([index.networks.selector(torch.full_like(e, query.selector), e, s) for e, s in parts])
    return _descending(index, need.numpy())[: int(budget * len(index))]


def fine_scores(index: Index, query: Codes, videos: Int[np.ndarray, " k"], map: Map = map) -> Float[np.ndarray, " k"]:
    """Fine scores in [-1, 1] of these videos, a shard at a time."""
    shards = index.shard_of[videos]
    places = [np.flatnonzero(shards == shard) for shard in np.unique(shards)]
    found = np.empty(len(videos), np.float32)
    for place, scores in zip(places, map(partial(_fetched_scores, index, query), [videos[place] for place in places]), strict=True):
        found[place] = scores
    return found


def _descending(index: Index, values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.lexsort((index.id_rank, -values.round(TIE_DECIMALS)))


def _fetched_scores(index: Index, query: Codes, videos: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    return comparison.scores(index.networks.fine, query.fine, index.fetch(videos))


def _block(index: Index, query: Codes, query_frames: int, codes: np.ndarray, duration_s: float | None) -> Block | None:
    """Among frames that are real: short videos are repeated."""
    frames = len(codes) if duration_s is None else max(1, math.ceil(duration_s * index.features.fps))
    similarity = comparison.frames(index.networks.fine, query.fine, codes)[:query_frames, :frames]
    return segments.best_block(similarity.numpy(), index.thresholds.cell)


def _seconds(block: Block, fps: float, query_s: float, duration_s: float | None) -> Segment:
    """A block in seconds: no later than the videos end, which may be within a frame's time."""
    end_s = block.target_end / fps if duration_s is None else min(block.target_end / fps, duration_s)
    query_start_s, query_end_s = (min(frame / fps, query_s) for frame in (block.query_start, block.query_end))
    return Segment(query_start_s, query_end_s, min(block.target_start / fps, end_s), end_s)
