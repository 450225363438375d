"""Statistics of labels: against numpy on all rows at once, and on the cases that they are made for."""

from __future__ import annotations

import numpy as np
import pytest

from vkd.metrics.label_statistics import Spread, label_statistics, pooled

ROWS = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32) * np.linspace(1, 9, 40, dtype=np.float32)[:, None]
INPUTS = [str(i).encode() for i in range(40)]


def test_parts_pooled_are_the_whole() -> None:
    whole = label_statistics(ROWS, INPUTS, logits=True)
    parts = [label_statistics(ROWS[rows], INPUTS[rows], logits=True) for rows in (slice(0, 3), slice(3, 30), slice(30, 40))]
    assert pooled(pooled(parts[0], parts[1]), parts[2]) == pytest.approx(whole)
    norms = np.linalg.norm(ROWS.astype(np.float64), axis=1)
    assert (whole["norm_mean"], whole["norm_std"]) == pytest.approx((norms.mean(), norms.std()))


@pytest.mark.parametrize(("logits", "entropy_nats"), [(np.zeros((3, 8)), np.log(8)), (np.eye(8)[:3] * 1e4, 0.0)])
def test_entropy_is_that_of_the_probs(logits: np.ndarray, entropy_nats: float) -> None:
    assert label_statistics(logits, INPUTS[:3], logits=True)["entropy_nats"] == pytest.approx(entropy_nats, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "inputs", "duplicates"),
    [
        ([[1.0], [1.0], [2.0], [3.0]], [b"a", b"b", b"c", b"d"], 0.25),
        ([[1.0], [1.0], [2.0], [3.0]], [b"a", b"a", b"c", b"d"], 0.0),
        ([[1.0], [1.0], [1.0], [1.0]], [b"a", b"b", b"c", b"d"], 0.75),
        ([[1.0]], [b"a"], 0.0),
    ],
)
def test_duplicates_are_equal_labels_of_different_inputs(rows: list[list[float]], inputs: list[bytes], duplicates: float) -> None:
    assert label_statistics(np.array(rows), inputs, logits=False)["duplicates"] == duplicates


def test_spread_is_the_relative_deviation_from_the_mean() -> None:
    spread = Spread()
    spread.add(ROWS[:7])
    spread.add(ROWS[7:])
    rows = ROWS.astype(np.float64)
    expected = np.sqrt(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).mean() / (rows**2).sum(axis=1).mean())
    assert spread.relative == pytest.approx(expected)
    assert spread.rms == pytest.approx(np.sqrt(rows.var(axis=0).mean()))


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 0.0), (1e-7, 1e-7)])
def test_spread_is_exact_where_rows_hardly_differ(noise: float, expected: float) -> None:
    spread = Spread()
    spread.add(1.0 + noise * np.random.default_rng(0).standard_normal((2000, 5)))
    assert spread.relative == pytest.approx(expected, rel=0.05)


def test_zeros_have_no_spread() -> None:
    spread = Spread()
    spread.add(np.zeros((3, 4)))
    assert spread.relative == 0.0
