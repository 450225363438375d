"""What fine scores buy on an index whose right answers are known: retrieval quality against the share that is compared finely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from vkd import schema
from vkd.errors import ConfigError
from vkd.metrics.retrieval import Scores, map_at_budget, selection_orders
from vkd.pools import Progress
from vkd.search import query as searching
from vkd.search.index import Index
from vkd.search.networks import Codes
from vkd.search.truth import Truth

ENOUGH = 0.99  # of what fine scores of all videos give


class Report(NamedTuple):
    """Of each metric and each order, in which videos get their fine score, its value at each budget.

    `missing` queries are not in the index; `videos` are searched.
    """

    budgets: Sequence[float]
    queries: int
    missing: int
    videos: int
    curves: Mapping[str, Mapping[str, list[float]]]

    def enough(self, metric: str, order: str) -> float:
        """The least budget that gives 99 % of what the largest one does."""
        values = self.curves[metric][order]
        return next(budget for budget, value in zip(self.budgets, values, strict=True) if value >= ENOUGH * values[-1])


def measure(index: Index, truth: Truth, budgets: Sequence[float], max_queries: int, progress: Progress) -> Report:
    """Search for the queries that are in the index, at most so many of them (0: all), with each budget, in ascending order.

    All are compared finely with all, once. Raises ConfigError when no query, or nothing that answers one, is in the index.
    """
    names = _names(index, truth.named)
    number = {name: i for i, name in enumerate(names)}
    there = sorted((name for name in truth.queries if name in number), key=schema.digest)
    if not there:
        what = f"none of its {len(truth.queries)} queries is among the {len(index)} videos, which it may call by id, uri or file name"
        raise ConfigError(what, where=index.uri, action="index the queries too, or name the ground truth of these videos")
    queries = there[:max_queries] if max_queries else there
    searched = np.array([i for i, name in enumerate(names) if truth.database is None or name in truth.database], np.int64)
    rows = []
    for done, query in enumerate(queries, start=1):
        codes = _codes(index, number[query])
        coarse, needs = (index.coarse @ codes.coarse)[searched], searching.need(index, codes)[searched]
        rows.append((coarse, needs, searching.fine_scores(index, codes, searched)))
        progress(done, len(queries))
    coarse, needs, fine = (np.stack(column) for column in zip(*rows, strict=True))
    of_coarse = Scores(queries, [names[i] for i in searched.tolist()], coarse)
    curves: dict[str, dict[str, list[float]]] = {}
    for order, priority in selection_orders(coarse, fine, needs, seed=0).items():
        try:
            found = map_at_budget(of_coarse, fine, priority, budgets, truth.metrics)
        except ValueError as error:
            raise ConfigError(str(error), where=index.uri, action="name the ground truth of these videos") from error
        for metric, values in found.items():
            curves.setdefault(metric, {})[order] = values
    return Report(budgets, len(queries), len(truth.queries) - len(there), len(searched), curves)


def _codes(index: Index, number: int) -> Codes:
    """Of a video that is in the index what a query would have."""
    return Codes(index.coarse[number], float(index.selector[number]), index.fetch(np.array([number]))[0])


def _names(index: Index, known: frozenset[str]) -> list[str]:
    """Of each video the name that the ground truth has for it, else its id. The first that goes by a name has it alone."""
    found, taken = list[str](), set[str]()
    for video_id, uri in zip(*(index.videos[name].to_pylist() for name in (schema.VIDEO_ID, schema.URI)), strict=True):
        path = PurePosixPath(uri)
        ways = (video_id, uri, path.name, path.stem, f"{path.parent.name}/{path.name}", f"{path.parent.name}/{path.stem}")
        found.append(next((name for name in ways if name in known and name not in taken), video_id))
        taken.add(found[-1])
    return found
