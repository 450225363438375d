"""Whether a teacher is used: the arithmetic against oracles, and the limits of what is called wrong."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vkd.metrics.teacher_use import (
    DEAD_SHARE,
    MAX_MARGIN,
    MIN_GRADIENT_SHARE,
    ROWS_OF_COLUMN,
    ROWS_OF_DIMENSION,
    Control,
    Spans,
    changed,
    derangement,
    drowned_losses,
    gradient_shares,
    ignored_labels,
    leaking_losses,
    margin,
    unused_labels,
    wrong_columns,
)

ROWS = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 20)).astype(np.float32))


def spans_of(*parts: torch.Tensor) -> Spans:
    spans = Spans()
    for part in parts:
        spans.add(part)
    return spans


def kinds_of(rows: torch.Tensor) -> list[str]:
    return [finding.kind for finding in wrong_columns({"teacher.x": spans_of(rows)})]


@given(st.integers(0, 60), st.integers(0, 2**32))
def test_a_derangement_moves_every_row(num_rows: int, seed: int) -> None:
    order = derangement(num_rows, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(num_rows))
    assert num_rows == 1 or not (order == np.arange(num_rows)).any()
    assert order.tolist() == derangement(num_rows, np.random.default_rng(seed)).tolist()


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_a_margin_is_the_t_statistic(differences: list[float]) -> None:
    found = margin(differences)
    assert abs(found) <= MAX_MARGIN
    if np.std(differences) > 1e-3:
        assert found == pytest.approx(stats.ttest_1samp(differences, 0).statistic, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("differences", "expected"), [([0.0] * 4, 0.0), ([2.0] * 4, MAX_MARGIN), ([-2.0] * 4, -MAX_MARGIN)])
def test_a_margin_without_spread(differences: list[float], expected: float) -> None:
    assert margin(differences) == expected


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1e9), min_size=1))
def test_shares_sum_to_one(norms: dict[str, float]) -> None:
    shares = gradient_shares(norms)
    assert shares == {} if sum(norms.values()) == 0 else sum(shares.values()) == pytest.approx(1)
    assert gradient_shares({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert gradient_shares({"a": math.nan, "b": 1.0}) == gradient_shares({"a": math.inf}) == {}


@pytest.mark.parametrize(
    ("loss", "other", "expected"),
    [(1.0, 1.0, False), (1.0, 1.000001, False), (1e-8, 1.1e-8, True), (1.0, math.nan, True), (0.0, 0.0, False)],
)
def test_a_loss_that_changed(loss: float, other: float, expected: bool) -> None:
    assert changed(loss, other) is expected


@given(st.lists(st.integers(0, 256), max_size=5), st.sampled_from([(20,), (4, 5), ()]))
def test_rows_may_come_in_parts(cuts: list[int], shape: tuple[int, ...]) -> None:
    rows = ROWS.reshape(256, *shape) if shape else ROWS[:, 0]
    width = shape[-1] if shape else 1
    rows = torch.where(torch.arange(width) == 0, 0.5, rows) if shape else rows
    bounds = [0, *sorted(cuts), 256]
    spans = spans_of(*(rows[start:end] for start, end in pairwise(bounds)))
    values = rows.reshape(-1, width)
    assert spans.constant.tolist() == [len(set(column.tolist())) == 1 for column in values.T]
    assert spans.figures() == {"rows": 256, "not_finite": 0, "constant": pytest.approx(bool(shape) / width), "zero": 0}


def test_constant_is_relative_to_size() -> None:
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([1000 + 1e-4 * noise, 1e-6 * noise, -3 * torch.ones(100, 1), torch.zeros(100, 1), 1 + 1e-3 * noise], dim=1)
    spans = spans_of(rows)
    assert spans.constant.tolist() == [True, False, True, True, False]
    assert spans.figures()["zero"] == pytest.approx(0.2)


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    rows = ROWS.clone()
    rows[3, 4], rows[5, 0] = math.nan, math.inf
    spans = spans_of(rows)
    assert (spans.figures()["not_finite"], spans.constant.any().item()) == (2, False)
    assert kinds_of(rows) == ["not_finite"]
    (finding,) = wrong_columns({"teacher.x": spans})
    assert "2 of 256 clips" in str(finding)
    assert kinds_of(rows[3:4]) == ["not_finite"]


def test_an_empty_column_says_nothing_wrong() -> None:
    assert spans_of().figures() == {"rows": 0, "not_finite": 0, "constant": 0, "zero": 0}
    assert kinds_of(ROWS[:0]) == []


@pytest.mark.parametrize(("num_rows", "found"), [(ROWS_OF_COLUMN - 1, []), (ROWS_OF_COLUMN, ["constant"])])
def test_a_constant_column_needs_rows(num_rows: int, found: list[str]) -> None:
    assert kinds_of(ROWS[:1].repeat(num_rows, 1)) == found


@pytest.mark.parametrize(
    ("num_rows", "share", "found"),
    [(ROWS_OF_DIMENSION - 1, 0.5, []), (ROWS_OF_DIMENSION, 0.5, ["dead"]), (256, DEAD_SHARE, ["dead"]), (256, 0.0, [])],
)
def test_dead_dimensions_need_rows_and_a_share(num_rows: int, share: float, found: list[str]) -> None:
    rows = ROWS[:num_rows].clone()
    rows[:, : round(share * 20)] = 1.5
    assert kinds_of(rows) == found
    for finding in wrong_columns({"teacher.x": spans_of(rows)}):
        assert f"{round(share * 20)} of 20 dimensions never change in {num_rows} clips (0" in str(finding)


def test_a_sparse_dimension_lives_once_it_moves() -> None:
    rows = ROWS.clone()
    rows[:, 3] = 0
    spans = spans_of(rows)
    assert list(wrong_columns({"x": spans}))
    spans.add(ROWS[:1])
    assert not list(wrong_columns({"x": spans}))


def test_drowned_losses_are_those_below_a_hundredth() -> None:
    assert [f.where for f in drowned_losses({"a": 0.9, "b": MIN_GRADIENT_SHARE, "c": 0.0099})] == ["c"]


@pytest.mark.parametrize(
    ("control", "found"),
    [
        (Control(1.0, 1.01, 0.4, True), ["unused"]),
        (Control(1.01, 1.0, -9.0, True), ["unused"]),
        (Control(0.5, 1.0, 12.0, True), []),
        (Control(1.0, 1.0, 0.0, False), []),  # cross entropy against classes
        (Control(1.0, 1.01, None, True), []),  # too few batches
    ],
)
def test_unused_labels_are_those_that_shuffling_does_not_hurt(control: Control, found: list[str]) -> None:
    assert [finding.kind for finding in unused_labels({"kl": control, "fine": Control(0.1, 1.0, 30.0, True)})] == found


def test_chance_rarely_looks_like_learning() -> None:
    """A student that knows nothing: in at most 2 % of checks of 8 batches a loss passes."""
    rng = np.random.default_rng(0)
    controls = {str(i): Control(1.0, 1.0, margin(rng.standard_normal(8).tolist()), True) for i in range(2000)}
    assert len(list(unused_labels(controls))) > 0.98 * len(controls)


def test_ignored_labels_are_asked_for_and_unseen() -> None:
    blind, sees = Control(1.0, 1.0, 0.0, False), Control(0.5, 1.0, 9.0, True)
    assert [f.where for f in ignored_labels({"a": blind}, ["teacher.x"])] == ["teacher.x"]
    assert not list(ignored_labels({"a": blind, "b": sees}, ["teacher.x"]))
    assert not list(ignored_labels({"a": blind}, []))
    assert not list(ignored_labels({}, ["teacher.x"]))


def test_leaks_are_losses_that_start_low() -> None:
    controls = {"leak": Control(0.1, 1.0, None, True), "fair": Control(0.97, 1.0, None, True), "blind": Control(0.0, 0.0, None, False)}
    assert [f.where for f in leaking_losses(controls)] == ["leak"]
