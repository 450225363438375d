"""Thresholds from scores of unrelated pairs."""

from __future__ import annotations

import numpy as np
import pytest

from vkd.search.calibration import calibrate, known_pairs, random_pairs


def test_an_exponential_tail_is_continued_where_scores_end() -> None:
    scores = np.random.default_rng(0).exponential(0.02, 20_000).astype(np.float32) + np.float32(0.4)
    share = 0.01 / 1000  # of pairs: beyond what 20,000 tell
    assert calibrate(scores, 1000) == pytest.approx(0.4 - 0.02 * np.log(share), rel=0.02)


def test_many_allowed_matches_are_a_quantile_and_nothing_exceeds_one() -> None:
    scores = np.linspace(0, 1, 101).astype(np.float32)
    assert calibrate(scores, 10, max_false_matches=5.0) == pytest.approx(0.5)
    assert calibrate(scores, 10_000) == 1.0


def test_scores_that_are_all_one_tell_nothing() -> None:
    assert calibrate(np.full(1000, 0.5, np.float32), 10_000) is None
    assert calibrate(np.full(1000, 1.0, np.float32), 10_000) is None


def test_a_few_copies_among_the_pairs_move_it_little() -> None:
    scores = np.random.default_rng(0).normal(0.45, 0.02, 1000).astype(np.float32)
    mixed = np.concatenate([scores, np.full(20, 0.95, np.float32)])
    assert calibrate(mixed, 1000) < 0.7


def test_pairs_are_of_different_videos_and_sources_and_always_the_same() -> None:
    shown = [["a"], ["a", "c"], [], [], ["b"]]
    pairs = random_pairs(shown)
    assert 0 < len(pairs) <= 30 and np.array_equal(pairs, random_pairs(shown))
    assert {tuple(sorted(pair)) for pair in pairs.tolist()} == {(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)}
    assert random_pairs([["a"], ["b", "a"]]).shape == (0, 2) and random_pairs([[]]).shape == (0, 2)


def test_pairs_that_show_the_same_are_drawn_of_each_name() -> None:
    pairs = known_pairs([["a"], ["a", "c"], [], ["c"], ["b"]])
    assert {tuple(sorted(pair)) for pair in pairs.tolist()} == {(0, 1), (1, 3)} and len(pairs) == 200
    assert known_pairs([["a"], ["b"]]).shape == (0, 2)
