"""Ground truth of the benchmarks, as it lies in the corpus, and what is told of other files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vkd.errors import ConfigError, StorageError
from vkd.metrics.retrieval import Scores
from vkd.search import truth

COUNTS = {  # queries, videos that are named, those that are searched
    "fivr_5k": ("fivr", 50, 5050, 5000),
    "cc_web_video": ("cc_web_video", 24, 13115, 13115),
    "svd": ("svd", 206, None, None),
    "evve": ("evve", 620, 2993, 2373),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_benchmarks_are_read(corpus: Path, name: str) -> None:
    place = corpus / "annotations" / "retrieval" / f"{name}.json"
    if not place.is_file():
        pytest.skip("no ground truth of retrieval in the corpus: annotations/retrieval")
    protocol, num_queries, num_named, num_searched = COUNTS[name]
    found = truth.read(str(place), protocol)
    assert len(found.queries) == num_queries and found.named.issuperset(found.queries)
    assert num_named is None or len(found.named) <= num_named
    assert (None if found.database is None else len(found.database)) == num_searched
    database = sorted(found.database or found.named)
    rows = np.random.default_rng(0).random((3, len(database)))
    assert all(0 < value < 1 for value in found.metrics(Scores(found.queries[:3], database, rows)).values())


def test_ones_own_is_a_list_for_each_query(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"q": ["a", "q", "gone"]}))
    found = truth.read(str(tmp_path / "t.json"), "relevant")
    assert (found.queries, found.named, found.database) == (["q"], frozenset({"q", "a", "gone"}), None)
    assert found.metrics(Scores(["q"], ["q", "b", "a"], np.array([[1.0, 0.8, 0.5]]))) == {"mAP": 0.5}


@pytest.mark.parametrize(
    ("protocol", "text", "told"),
    [
        ("relevant", '{"q": "a"}', "no ground truth of relevant: TypeError: a is no list of names"),
        ("fivr", '{"q": ["a"]}', "no ground truth of fivr: AttributeError"),
        ("cc_web_video", '{"q": ["a"]}', "no ground truth of cc_web_video: TypeError"),
        ("svd", '{"q": ["a"]}', "no ground truth of svd: ValueError"),
        ("evve", '{"events": {}}', "no ground truth of evve: KeyError: 'queries'"),
        ("vcdb", "{}", "'vcdb' is no protocol -> choose relevant, fivr"),
    ],
)
def test_another_file_is_told(tmp_path: Path, protocol: str, text: str, told: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        truth.read(str(tmp_path / "t.json"), protocol)
    assert told in str(error.value)


def test_no_file_and_no_json_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        truth.read(str(tmp_path / "t.json"), "fivr")
    (tmp_path / "t.json").write_text("[")
    with pytest.raises(StorageError, match="is not JSON"):
        truth.read(str(tmp_path / "t.json"), "fivr")
