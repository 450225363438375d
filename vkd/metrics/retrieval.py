"""Mean average precision of video retrieval, by the protocols of its benchmarks, and what a budget of fine scores buys.

Ground truth is given as the JSON of each benchmark says it. Queries of which nothing relevant is in the database count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score

from vkd.losses.similarity import to_unit

FIVR_TASKS = {"DSVR": ("ND", "DS"), "CSVR": ("ND", "DS", "CS"), "ISVR": ("ND", "DS", "CS", "IS")}
CC_WEB_POSITIVE = "ESLMV"


@dataclass(frozen=True)
class Scores:
    """Every query against every video of a database; higher is more similar. Ids are unique; missing videos are left out of `database`."""

    queries: Sequence[str]
    database: Sequence[str]
    values: Float[np.ndarray, "q d"]

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.queries), len(self.database)):
            raise ValueError(f"{list(self.values.shape)} scores of {len(self.queries)} queries and {len(self.database)} videos")
        if np.isnan(self.values).any():
            raise ValueError("some scores are nan: they have no rank")

    @cached_property
    def column(self) -> Mapping[str, int]:
        """Where a video stands in the database."""
        return {video: i for i, video in enumerate(self.database)}

    @cached_property
    def by_id(self) -> Int[np.ndarray, " d"]:
        """Columns in order of their ids."""
        return np.array(sorted(range(len(self.database)), key=lambda i: self.database[i]), np.int64)

    def columns(self, videos: Sequence[str] | set[str]) -> Bool[np.ndarray, " d"]:
        """True for those of the videos that are in the database."""
        found = np.zeros(len(self.database), bool)
        found[[self.column[video] for video in videos if video in self.column]] = True
        return found

    def ranked(self, row: int) -> Int[np.ndarray, " d"]:
        """Columns from the best score of a query to the worst; equal ones by id."""
        return _descending(self.values[row], self.by_id)


@dataclass(frozen=True)
class CCWeb:
    """CC_WEB_VIDEO: a number for each video id, and for each query the labels of numbers and the wrongly labelled numbers."""

    index: Mapping[str, int]
    queries: Sequence[str]
    ground_truth: Sequence[Mapping[str, str]]
    excluded: Sequence[Sequence[int]]


def average_precision(hits: Bool[np.ndarray, " n"], num_relevant: int) -> float:
    """Sum of the precision at each hit of a ranking, over the number of relevant videos, found or not."""
    ranks = np.flatnonzero(hits)
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).sum() / num_relevant)


def trapezoid_average_precision(hits: Bool[np.ndarray, " n"], num_relevant: int) -> float:
    """The same with the mean of the precisions just before and at each hit; before the first video it is 1."""
    ranks = np.flatnonzero(hits)
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(((before + (found + 1) / (ranks + 1)) / 2).sum() / num_relevant)


def fivr(scores: Scores, annotation: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, float]:
    """FIVR (Kordopatis-Zilos et al. 2019): DSVR, CSVR, ISVR. A query is not searched for itself."""
    found: dict[str, list[float]] = {task: [] for task in FIVR_TASKS}
    for row, query in enumerate(scores.queries):
        ranked = scores.ranked(row)
        ranked = ranked[ranked != scores.column.get(query, -1)]
        for task, labels in FIVR_TASKS.items():
            hits = scores.columns({video for label in labels for video in annotation[query].get(label, ())})[ranked]
            found[task] += [average_precision(hits, int(hits.sum()))] if hits.any() else []
    return {task: _mean(values) for task, values in found.items()}


def cc_web_video(scores: Scores, truth: CCWeb) -> dict[str, float]:
    """CC_WEB_VIDEO (Wu et al. 2007): `mAP` ranks only videos of the query's set, `mAP_star` all; `_c` without the wrongly labelled.

    What is missing from the database still counts as relevant. The query is among the videos.
    """
    number = np.array([truth.index.get(video, -1) for video in scores.database])
    found: dict[str, list[float]] = {name: [] for name in ("mAP", "mAP_star", "mAP_c", "mAP_c_star")}
    for row, query in enumerate(scores.queries):
        place = truth.queries.index(query)
        labels = {int(key): label for key, label in truth.ground_truth[place].items()}
        positive = {key for key, label in labels.items() if label in CC_WEB_POSITIVE}
        ranked = number[scores.ranked(row)]
        ranked = ranked[ranked >= 0]
        for name, values in found.items():
            out = truth.excluded[place] if "_c" in name else ()
            shown = ranked[~np.isin(ranked, out)]
            shown = shown if "star" in name else shown[np.isin(shown, list(labels))]
            values.append(average_precision(np.isin(shown, list(positive)), len(positive.difference(out))))
    return {name: _mean(values) for name, values in found.items()}


def evve(scores: Scores, events: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, float]:
    """EVVE (Revaud et al. 2013): `mAP` is the mean over queries, `mAP_events` over events. An event is (queries, positives, ...)."""
    by_event: list[list[float]] = []
    rows = {query: row for row, query in enumerate(scores.queries)}
    for queries, positives, *_ in events.values():
        relevant = scores.columns(positives)
        if relevant.any():
            hits = [relevant[scores.ranked(rows[query])] for query in queries if query in rows]
            by_event.append([trapezoid_average_precision(hit, int(relevant.sum())) for hit in hits])
    by_event = [values for values in by_event if values]
    return {"mAP": _mean([value for values in by_event for value in values]), "mAP_events": _mean([_mean(values) for values in by_event])}


def svd(scores: Scores, labels: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """SVD (Jiang et al. 2019): `mAP` of a query's own labelled videos among those that no query labels, which count as negatives."""
    unlabelled = ~scores.columns({video for targets in labels.values() for video in targets} | set(labels))
    values = []
    for row, query in enumerate(scores.queries):
        positive = scores.columns({video for video, label in labels[query].items() if label == 1})
        shown = unlabelled | scores.columns(list(labels[query]))
        if positive.any():
            values.append(float(average_precision_score(positive[shown], scores.values[row, shown])))
    return {"mAP": _mean(values)}


def reranked(coarse: Scores, fine: Float[np.ndarray, "q d"], priority: Float[np.ndarray, "q d"], budget: float) -> Scores:
    """The coarse scores, with the fine ones, in [-1, 1], on their scale in their place for each query's `budget` of all videos.

    Those of the highest priority are taken, a share rounded down; equal ones by id. 0 is the coarse search, 1 the fine one.
    """
    values, unit = coarse.values.copy(), to_unit(fine)
    for row in range(len(values)):
        chosen = _descending(priority[row], coarse.by_id)[: int(budget * len(coarse.database))]
        values[row, chosen] = unit[row, chosen]
    return Scores(coarse.queries, coarse.database, values)


def selection_orders(
    coarse: Float[np.ndarray, "q d"], fine: Float[np.ndarray, "q d"], selector: Float[np.ndarray, "q d"], seed: int
) -> dict[str, Float[np.ndarray, "q d"]]:
    """Priorities to compare: the selector's, the best coarse scores first, chance, those of a selector that knew the fine scores, and

    `threshold`: the coarse scores that are nearest to 1/2, and so say least, first.
    """
    chance = np.random.default_rng(seed).random(coarse.shape)
    found = {"selector": selector, "coarse": coarse, "random": chance, "disagreement": np.abs(to_unit(fine) - coarse)}
    return found | {"threshold": -np.abs(coarse - 0.5)}


def map_at_budget(
    coarse: Scores,
    fine: Float[np.ndarray, "q d"],
    priority: Float[np.ndarray, "q d"],
    budgets: Sequence[float],
    protocol: Callable[[Scores], dict[str, float]],
) -> dict[str, list[float]]:
    """Each metric of a protocol at each budget: one curve of retrieval quality against cost."""
    points = [protocol(reranked(coarse, fine, priority, budget)) for budget in budgets]
    return {name: [point[name] for point in points] for name in points[0]}


def _descending(values: Float[np.ndarray, " d"], order: Int[np.ndarray, " d"]) -> Int[np.ndarray, " d"]:
    """Positions from the highest value to the lowest; equal ones as in `order`."""
    ranked: Int[np.ndarray, " d"] = order[np.argsort(-values[order], kind="stable")]
    return ranked


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("no query has a relevant video in the database: are these the ids of this benchmark?")
    return float(np.mean(values))
