"""Which of an anchor's candidates are learned from in an epoch: one positive and one negative, by score or by pool. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from vkd import schema
from vkd.losses.similarity import needs_fine

SAME, NEAR = "same", "near"
NEAR_SHARE = 0.8


class Triplet(NamedTuple):
    """Positions among the candidates of an anchor."""

    positive: int
    negative: int


def rng_of(seed: int, epoch: int, example_id: str) -> np.random.Generator:
    """For the draws of one anchor in one epoch, whatever its batch, its rank and its place in either."""
    return np.random.default_rng([seed, epoch, int(schema.digest(example_id), 16)])


def draw_triplet(
    pools: Sequence[str], scores: Float[np.ndarray, " n"] | None, rng: np.random.Generator, tau_pos: float = 0.0
) -> Triplet | None:
    """A positive and a negative, each uniformly among those of an anchor; None when it lacks either.

    Positives are the candidates whose teacher's score, in [-1, 1], is at least `tau_pos`, negatives the others (Kordopatis-Zilos et
    al. 2022). Without scores, when the teacher itself is trained, positives are those of the pool `same`, and four of five negatives
    those of `near`: random ones are told apart before anything is learned.
    """
    if scores is not None and len(scores) != len(pools):
        raise ValueError(f"{len(scores)} scores of {len(pools)} candidates")
    if scores is None:
        pool = np.array(pools, object)
        positive, negative = pool == SAME, pool != SAME
        if rng.random() < NEAR_SHARE and NEAR in pools:
            negative = pool == NEAR
    else:
        positive, negative = scores >= tau_pos, scores < tau_pos
    drawn = _one(positive, rng), _one(negative, rng)
    return None if drawn[0] is None or drawn[1] is None else Triplet(drawn[0], drawn[1])


def draw_selector_pairs(
    fine: Float[np.ndarray, " n"], coarse: Float[np.ndarray, " n"], rng: np.random.Generator, threshold: float = 0.2
) -> tuple[int | None, int | None]:
    """A candidate that needs the fine score, and one that does not, each uniformly among those of an anchor; None where there is none."""
    needs = needs_fine(torch.from_numpy(fine), torch.from_numpy(coarse), threshold).numpy() > 0
    return _one(needs, rng), _one(~needs, rng)


def _one(chosen: Bool[np.ndarray, " n"], rng: np.random.Generator) -> int | None:
    positions = np.flatnonzero(chosen)
    return int(rng.choice(positions)) if len(positions) else None
