"""The best block of planted copies, and of noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.search.segments import Block, best_block


def noise(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.0, 0.45, (n, m))


@given(st.integers(3, 9), st.integers(0, 8), st.integers(0, 9), st.sampled_from([(1, 1), (1, 2), (2, 1)]), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_planted_copy_is_found_where_it_is(length: int, i: int, j: int, speed: tuple[int, int], seed: int) -> None:
    similarity = noise(28, 30, seed)
    for k in range(length):
        similarity[i + speed[0] * k, j + speed[1] * k] = 0.9
    found = best_block(similarity, 0.5)
    assert found is not None
    last = length - 1
    assert found[:4] == (i, i + speed[0] * last + 1, j, j + speed[1] * last + 1)
    assert found.score == pytest.approx(0.4 * length)


def test_a_path_crosses_a_bad_frame_and_takes_the_better_of_two() -> None:
    similarity = np.zeros((12, 12))
    similarity[range(3), range(9, 12)] = 1.0
    similarity[range(5, 12), range(4, 11)] = 1.0
    similarity[8, 7] = 0.2
    assert best_block(similarity, 0.5) == Block(5, 12, 4, 11, pytest.approx(0.5 * 6 - 0.3))


def test_time_runs_forwards_and_a_still_frame_is_no_copy_of_many() -> None:
    backwards = np.zeros((9, 9))
    backwards[range(9), range(8, -1, -1)] = 1.0
    found = best_block(backwards, 0.5)
    assert found is not None and found.score == 0.5
    still = np.zeros((9, 9))
    still[4] = 1.0
    found = best_block(still, 0.5)
    assert found is not None and found[:2] == (4, 5) and found[3] - found[2] == 1


def test_noise_has_no_block() -> None:
    assert best_block(noise(20, 20), 0.5) is None
