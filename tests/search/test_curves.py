"""Curves of an index with known answers, against searches one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from search.corpora import FEATURES, corpus, networks

from vkd.errors import ConfigError
from vkd.search import curves
from vkd.search.index import Index, build
from vkd.search.query import ORDERS, Order, rank
from vkd.search.truth import PROTOCOLS

VIDEOS, READ = corpus(13)
NETS = networks()
ANSWERS = {"0": ["4", "5", "0"], "3": ["7"], "gone": ["1"]}  # by file names
BUDGETS = (0.0, 0.3, 1.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build(VIDEOS, READ.__getitem__, NETS, FEATURES, str(tmp_path_factory.mktemp("index")))


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.mark.parametrize("order", ORDERS)
def test_curves_are_those_of_searches(index: Index, order: Order) -> None:
    report = curves.measure(index, PROTOCOLS["relevant"](ANSWERS), BUDGETS, 0, silent)
    assert (report.queries, report.missing, report.videos) == (2, 1, len(VIDEOS))
    for budget, value in zip(BUDGETS, report.curves["mAP"][order], strict=True):
        expected = []
        for query, answers in list(ANSWERS.items())[:2]:
            ranked = [i for i in rank(index, NETS.index(READ[f"shard/{query}"]), budget, order).order.tolist() if i != int(query)]
            ranks = sorted(1 + ranked.index(int(video)) for video in answers if video != query)
            expected.append(np.mean([found / place for found, place in enumerate(ranks, start=1)]))
        assert value == pytest.approx(np.mean(expected), abs=1e-9)


def test_no_order_counts_where_nothing_or_all_is_compared_finely(index: Index) -> None:
    found = curves.measure(index, PROTOCOLS["relevant"](ANSWERS), BUDGETS, 1, silent)
    assert found.queries == 1 and list(found.curves["mAP"]) == ["selector", "coarse", "random", "disagreement", "threshold"]
    assert len({(values[0], values[-1]) for values in found.curves["mAP"].values()}) == 1


def test_only_the_database_of_a_benchmark_is_searched(index: Index) -> None:
    told = {"annotation": {"0": {"ND": ["4"], "CS": ["5"]}}, "queries": ["0"], "database": ["4", "5", "6", "12", "gone"]}
    report = curves.measure(index, PROTOCOLS["fivr"](told), BUDGETS, 0, silent)
    assert report.videos == 4 and list(report.curves) == ["DSVR", "CSVR", "ISVR"]


def test_the_least_budget_that_is_enough() -> None:
    report = curves.Report((0.0, 0.1, 1.0), 1, 0, 9, {"mAP": {"selector": [0.5, 0.796, 0.8]}})
    assert report.enough("mAP", "selector") == 0.1
    assert report._replace(curves={"mAP": {"selector": [0.5, 0.6, 0.8]}}).enough("mAP", "selector") == 1.0


def test_a_truth_of_other_videos_is_told(index: Index, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of its 1 queries is among the 13 videos"):
        curves.measure(index, PROTOCOLS["relevant"]({"x": ["0"]}), BUDGETS, 0, silent)
    with pytest.raises(ConfigError, match="no query has a relevant video in the database"):
        curves.measure(index, PROTOCOLS["relevant"]({"0": ["x"]}), BUDGETS, 0, silent)


def test_a_name_goes_to_the_first_video_that_has_it(tmp_path: Path) -> None:
    videos = [video._replace(uri=f"{folder}/same.mp4") for video, folder in zip(VIDEOS[:3], "aab", strict=True)]
    index = build(videos, READ.__getitem__, NETS, FEATURES, str(tmp_path))
    assert curves._names(index, frozenset({"same", "b/same"})) == ["same", VIDEOS[1].video_id, "b/same"]
