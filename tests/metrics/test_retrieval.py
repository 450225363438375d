"""Retrieval protocols on the real ground truth of the benchmarks, against slow loops, sklearn and closed forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from vkd.metrics.retrieval import (
    CCWeb,
    Scores,
    average_precision,
    cc_web_video,
    evve,
    fivr,
    map_at_budget,
    reranked,
    selection_orders,
    svd,
    trapezoid_average_precision,
)

FIVR_LABELS = {"DSVR": "ND DS", "CSVR": "ND DS CS", "ISVR": "ND DS CS IS"}


@pytest.fixture(scope="module")
def truth_dir(corpus: Path) -> Path:
    folder = corpus / "annotations" / "retrieval"
    if not folder.is_dir():
        pytest.skip("no ground truth of retrieval in the corpus: annotations/retrieval")
    return folder


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def random_scores(queries: Sequence[str], database: Sequence[str], decimals: int = 3) -> Scores:
    """Few decimals, so that there are ties; the database in no order."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(database))
    return Scores(list(queries), [database[i] for i in order], rng.random((len(queries), len(database))).round(decimals))


def perfect(scores: Scores, relevant: Mapping[str, set[str]]) -> Scores:
    values = np.stack([scores.columns(relevant[query]) for query in scores.queries]) + scores.values / 2
    return Scores(scores.queries, scores.database, values)


def ranking(scores: Scores, row: int) -> list[str]:
    """Ids from the best to the worst; Python's sort is stable."""
    value = dict(zip(scores.database, scores.values[row].tolist(), strict=True))
    return sorted(sorted(scores.database), key=lambda video: value[video], reverse=True)


def loop_ap(ranked: Sequence[str], relevant: set[str], num_relevant: int) -> float:
    found, total = 0, 0.0
    for rank, video in enumerate(ranked, start=1):
        if video in relevant:
            found += 1
            total += found / rank
    return total / num_relevant


@given(st.integers(1, 40), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_average_precision_equals_sklearn_without_ties(n: int, seed: int) -> None:
    hits = np.random.default_rng(seed).random(n) < 0.4
    hits[seed % n] = True
    assert average_precision(hits, int(hits.sum())) == pytest.approx(average_precision_score(hits, -np.arange(n)), abs=1e-12)


def test_average_precisions_of_a_short_ranking() -> None:
    hits = np.array([True, False, True, False])
    assert average_precision(hits, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(hits, 4) == pytest.approx((1 + 2 / 3) / 4)  # two were never found
    assert trapezoid_average_precision(hits, 2) == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert trapezoid_average_precision(~hits, 2) == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)
    assert trapezoid_average_precision(np.ones(5, bool), 5) == average_precision(np.ones(5, bool), 5) == 1


def test_equal_scores_rank_by_id() -> None:
    scores = Scores(["q"], ["c", "a", "d", "b"], np.array([[0.5, 0.5, 0.9, 0.5]]))
    assert [scores.database[i] for i in scores.ranked(0)] == ["d", "a", "b", "c"]


def test_fivr(truth_dir: Path) -> None:
    truth = load(truth_dir, "fivr_5k")
    annotation, scores = truth["annotation"], random_scores(truth["queries"], truth["database"])
    found = fivr(scores, annotation)
    for task, labels in FIVR_LABELS.items():
        values = []
        for row, query in enumerate(scores.queries):
            relevant = {v for label in labels.split() for v in annotation[query].get(label, [])} & set(scores.database) - {query}
            values.append(loop_ap([v for v in ranking(scores, row) if v != query], relevant, len(relevant)))
        assert found[task] == pytest.approx(np.mean(values), abs=1e-9)


@pytest.mark.parametrize(("name", "mean_relevant"), [("fivr_5k", [21.6, 26.4, 38.9]), ("fivr_200k_labels", [74.6, 88.4, 123.6])])
def test_fivr_finds_all_that_is_relevant(truth_dir: Path, name: str, mean_relevant: list[float]) -> None:
    truth = load(truth_dir, name)
    annotation = truth["annotation"]
    database = truth.get("database") or sorted({v for sets in annotation.values() for s in sets.values() for v in s} | set(annotation))
    scores = random_scores(truth["queries"], database)
    for (task, labels), expected in zip(FIVR_LABELS.items(), mean_relevant, strict=True):
        relevant = {query: {v for label in labels.split() for v in annotation[query].get(label, [])} for query in scores.queries}
        counts = [len(videos & set(database)) for videos in relevant.values()]
        tolerance = 0.05 if "database" in truth else 0.5  # published means are within a database; that of 200K is not here
        assert np.mean(counts) == pytest.approx(expected, abs=tolerance)
        assert fivr(perfect(scores, relevant), annotation)[task] == 1


def test_fivr_leaves_out_queries_with_nothing_to_find() -> None:
    annotation = {"q": {"ND": ["a", "q"]}, "r": {"IS": ["gone"]}, "s": {"IS": ["b"]}}
    scores = Scores(["q", "r", "s"], ["a", "b", "q"], np.array([[0.5, 0.6, 1.0], [0.1, 0.2, 0.3], [0.1, 0.9, 0.3]]))
    assert fivr(scores, annotation) == {"DSVR": 0.5, "CSVR": 0.5, "ISVR": 0.75}
    with pytest.raises(ValueError, match="ids of this benchmark"):
        fivr(Scores(["q"], ["x"], np.zeros((1, 1))), annotation)


def test_cc_web_video(truth_dir: Path) -> None:
    truth = CCWeb(**load(truth_dir, "cc_web_video"))
    scores = random_scores(truth.queries, list(truth.index))
    found = cc_web_video(scores, truth)
    for name, value in found.items():
        values = []
        for place in range(len(truth.queries)):
            labels = {int(key): label for key, label in truth.ground_truth[place].items()}
            out = set(truth.excluded[place]) if "_c" in name else set()
            ranked = [truth.index[video] for video in ranking(scores, place)]
            shown = [number for number in ranked if number not in out and ("star" in name or number in labels)]
            positive = {number for number, label in labels.items() if label in "ESLMV"} - out
            values.append(loop_ap(list(map(str, shown)), set(map(str, positive)), len(positive)))
        assert value == pytest.approx(np.mean(values), abs=1e-9)
    assert found["mAP_star"] < found["mAP"]


def test_cc_web_video_counts_what_the_database_lacks() -> None:
    truth = CCWeb({"q": 0, "a": 1, "b": 2, "c": 3}, ["q"], [{"0": "E", "1": "S", "2": "X", "9": "L"}], [[1]])
    scores = Scores(["q"], ["q", "a", "b", "c", "unknown"], np.array([[1.0, 0.5, 0.7, 0.8, 0.9]]))
    assert cc_web_video(scores, truth) == pytest.approx(
        {"mAP": (1 + 2 / 3) / 3, "mAP_star": (1 + 2 / 4) / 3, "mAP_c": 1 / 2, "mAP_c_star": 1 / 2}
    )


def test_evve(truth_dir: Path) -> None:
    truth = load(truth_dir, "evve")
    scores = random_scores(truth["queries"][::4], truth["database"])
    found, by_event = evve(scores, truth["events"]), []
    rows = {query: row for row, query in enumerate(scores.queries)}
    for queries, positives, _ in truth["events"].values():
        values, relevant = [], set(positives)
        for query in rows.keys() & set(queries):
            hits, total = 0, 0.0
            for rank, video in enumerate(ranking(scores, rows[query])):
                if video in relevant:
                    total += ((hits / rank if rank else 1) + (hits + 1) / (rank + 1)) / 2
                    hits += 1
            values.append(total / len(positives))
        by_event += [values] if values else []
    assert found["mAP"] == pytest.approx(np.mean([value for values in by_event for value in values]), abs=1e-9)
    assert found["mAP_events"] == pytest.approx(np.mean([np.mean(values) for values in by_event]), abs=1e-9)
    of_query = {query: set(positives) for queries, positives, _ in truth["events"].values() for query in queries}
    assert evve(perfect(scores, of_query), truth["events"]) == pytest.approx({"mAP": 1, "mAP_events": 1})


def test_svd(truth_dir: Path) -> None:
    labels = load(truth_dir, "svd")
    labelled, unlabelled = sorted({v for targets in labels.values() for v in targets}), [f"unlabelled-{i}.mp4" for i in range(500)]
    scores, values = random_scores(list(labels), labelled + unlabelled), []
    for row, targets in enumerate(labels.values()):
        value = dict(zip(scores.database, scores.values[row], strict=True))
        truth = [*targets.values(), *[0] * len(unlabelled)]
        values.append(average_precision_score(truth, [value[video] for video in (*targets, *unlabelled)]))
    assert svd(scores, labels)["mAP"] == pytest.approx(np.mean(values), abs=1e-9)
    assert svd(perfect(scores, {q: {v for v, y in t.items() if y} for q, t in labels.items()}), labels) == {"mAP": 1}


def test_scores_must_fit() -> None:
    with pytest.raises(ValueError, match="2 queries and 2 videos"):
        Scores(["q", "r"], ["a", "b"], np.zeros((2, 3)))
    with pytest.raises(ValueError, match="nan"):
        Scores(["q"], ["a"], np.array([[np.nan]]))


COARSE = Scores(["q", "r"], ["d", "c", "b", "a"], np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]))
FINE = np.array([[1.0, 0.0, -1.0, 0.5], [-1.0, -0.5, 0.0, 1.0]])


def test_a_budget_takes_the_first_of_each_query() -> None:
    priority = np.array([[0.9, 0.1, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    at = partial(reranked, COARSE, FINE, priority)
    assert at(0.0).values.tolist() == at(0.24).values.tolist() == COARSE.values.tolist()
    assert at(1.0).values.tolist() == [[1.0, 0.5, 0.0, 0.75], [0.0, 0.25, 0.5, 1.0]]
    assert at(0.5).values.tolist() == [[1.0, 0.2, 0.3, 0.75], [0.4, 0.3, 0.5, 1.0]]  # equal priorities: by id, a before b
    assert COARSE.values[0, 0] == 0.1


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.29, 0.3, 0.5, 0.99, 1.0])
def test_a_budget_is_that_of_the_reference(budget: float) -> None:
    """A loop over the videos of each query in order of their priority, as the paper's evaluation mixes both scores."""
    coarse, rng = random_scores([f"q{i}" for i in range(4)], [f"v{i:02d}" for i in range(20)]), np.random.default_rng(1)
    fine, priority = rng.uniform(-1, 1, (4, 20)), rng.random((4, 20))
    expected = coarse.values.copy()
    for query in range(4):
        for video in sorted(range(20), key=lambda v: -priority[query, v])[: int(budget * 20)]:
            expected[query, video] = fine[query, video] / 2 + 0.5
    np.testing.assert_array_equal(reranked(coarse, fine, priority, budget).values, expected)


def test_selection_orders() -> None:
    selector = np.zeros((2, 4))
    orders = selection_orders(COARSE.values, FINE, selector, seed=1)
    assert list(orders) == ["selector", "coarse", "random", "disagreement", "threshold"]
    assert orders["selector"] is selector
    assert orders["coarse"] is COARSE.values
    np.testing.assert_allclose(orders["disagreement"], [[0.9, 0.3, 0.3, 0.35], [0.4, 0.05, 0.3, 0.9]])
    np.testing.assert_allclose(orders["threshold"][0], [-0.4, -0.3, -0.2, -0.1])
    assert np.array_equal(orders["random"], selection_orders(COARSE.values, FINE, selector, seed=1)["random"])
    assert not np.array_equal(orders["random"], selection_orders(COARSE.values, FINE, selector, seed=2)["random"])


def test_curves_have_the_shape_of_the_paper() -> None:
    """From coarse to fine, steeply where the selector sees the errors of the coarse score, slowly by chance."""
    rng = np.random.default_rng(0)
    queries, database = [f"q{i}" for i in range(20)], [f"v{i}" for i in range(300)]
    relevant = rng.random((20, 300)) < 0.05
    fine = np.where(relevant, 0.6, -0.6) + rng.normal(scale=0.25, size=(20, 300))
    coarse = Scores(queries, database, (fine / 2 + 0.5 + np.where(rng.random((20, 300)) < 0.15, rng.normal(scale=0.6, size=(20, 300)), 0)))
    annotation = {q: {"ND": [v for v, hit in zip(database, hits, strict=True) if hit]} for q, hits in zip(queries, relevant, strict=True)}
    selector = np.abs(fine / 2 + 0.5 - coarse.values) + rng.normal(scale=0.1, size=fine.shape)
    budgets = [0.0, 0.05, 0.15, 0.3, 1.0]
    protocol = partial(fivr, annotation=annotation)
    curves = {
        name: map_at_budget(coarse, fine, priority, budgets, protocol)["DSVR"]
        for name, priority in selection_orders(coarse.values, fine, selector, seed=0).items()
    }
    first, *between, last = curves["selector"]
    assert first == protocol(coarse)["DSVR"] < 0.8 * last
    assert last == protocol(Scores(queries, database, fine))["DSVR"]
    assert first < between[0] < between[1] < between[2] <= last + 1e-9
    assert all(a > b for a, b in zip(between, curves["random"][1:-1], strict=True))
    assert {(curve[0], curve[-1]) for curve in curves.values()} == {(first, last)}
