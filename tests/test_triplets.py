"""Draws of triplets and of the selector's pairs: who can be drawn, that each is as likely, and what draws depend on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.triplets import Triplet, draw_selector_pairs, draw_triplet, rng_of

POOLS = st.lists(st.sampled_from(["same", "near", "random"]), max_size=12)


@given(POOLS, st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_by_pool(pools: list[str], seed: int) -> None:
    drawn = draw_triplet(pools, None, np.random.default_rng(seed))
    if "same" in pools and set(pools) != {"same"}:
        assert drawn is not None
        assert (pools[drawn.positive], pools[drawn.negative] in ("near", "random")) == ("same", True)
    else:
        assert drawn is None


@given(st.lists(st.floats(-1, 1, width=32), max_size=12), st.floats(-1, 1, width=32), st.integers(0, 999))
@settings(deadline=None, max_examples=30)
def test_by_score(scores: list[float], tau_pos: float, seed: int) -> None:
    drawn = draw_triplet(["near"] * len(scores), np.array(scores, np.float32), np.random.default_rng(seed), tau_pos)
    if any(s >= tau_pos for s in scores) and any(s < tau_pos for s in scores):
        assert drawn is not None
        assert scores[drawn.positive] >= tau_pos > scores[drawn.negative]
    else:
        assert drawn is None


def test_the_threshold_itself_is_positive() -> None:
    rng = np.random.default_rng(0)
    assert draw_triplet(["random"] * 2, np.array([-1e-6, 0.0], np.float32), rng) == Triplet(1, 0)
    with pytest.raises(ValueError, match="3 scores of 2 candidates"):
        draw_triplet(["random"] * 2, np.zeros(3, np.float32), rng)


def test_each_is_as_likely() -> None:
    scores = np.array([0.9, 0.1, 0.0, -0.1, -0.9], np.float32)
    drawn = Counter(draw_triplet(["near"] * 5, scores, rng_of(0, epoch, "a")) for epoch in range(3000))
    assert {(t.positive, t.negative) for t in drawn if t} == {(p, n) for p in range(3) for n in (3, 4)}
    assert all(400 < count < 600 for count in drawn.values())


def test_draws_depend_on_seed_epoch_and_example() -> None:
    """Values, so that a run that goes on elsewhere goes on with the same triplets."""
    drawn = [rng_of(*of).integers(1 << 30) for of in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]
    assert len(set(drawn)) == 4
    assert drawn[0] == rng_of(0, 0, "a").integers(1 << 30) == np.random.default_rng([0, 0, 0xCA978112CA1BBDCA]).integers(1 << 30)


def test_pairs_of_the_selector() -> None:
    fine, coarse = np.array([1.0, 1.0, 0.0, 0.0, -1.0]), np.array([1.0, 0.7, 0.75, 0.25, 0.1])
    drawn = {draw_selector_pairs(fine, coarse, np.random.default_rng(seed)) for seed in range(200)}
    assert drawn == {(needs, fits) for needs in (1, 2, 3) for fits in (0, 4)}
    assert {draw_selector_pairs(fine, coarse, np.random.default_rng(seed), threshold=0.25)[0] for seed in range(50)} == {1}
    assert draw_selector_pairs(fine, fine / 2 + 0.5, np.random.default_rng(0))[0] is None
    assert draw_selector_pairs(fine[:0], coarse[:0], np.random.default_rng(0)) == (None, None)
