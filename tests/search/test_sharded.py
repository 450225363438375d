"""A search by parts gives what a search of the whole index gives. The parts run here; tests/e2e has them in actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from search.corpora import FEATURES, corpus, networks, regions

from vkd.search import index as indexing
from vkd.search import sharded
from vkd.search.index import Index, build
from vkd.search.networks import Networks
from vkd.search.query import search
from vkd.search.sharded import Part, ShardedIndex

NETS = networks()


class Here:
    """An actor's method, called in this process."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class Handle:
    def __init__(self, part: Part) -> None:
        self.size, self.needs, self.hits = Here(part.size), Here(part.needs), Here(part.hits)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """23 videos in 4 shards; two of the videos are equal, and lie in different shards."""
    monkeypatch.setattr(indexing, "SHARD_VIDEOS", 7)
    monkeypatch.setattr(Networks, "beside", lambda uri: NETS)
    videos, read = corpus(23)
    read[videos[20].name] = read[videos[2].name]
    build(videos, read.__getitem__, NETS, FEATURES, str(tmp_path))
    return str(tmp_path)


def in_parts(folder: str, num_parts: int, monkeypatch: pytest.MonkeyPatch) -> ShardedIndex:
    told = indexing.told_of(folder)
    index = ShardedIndex.__new__(ShardedIndex)
    index.networks = NETS
    index.parts = [Handle(Part(folder, told | {"shards": told["shards"][i::num_parts]})) for i in range(num_parts)]
    index.num_videos = sum(handle.size.remote() for handle in index.parts)
    monkeypatch.setattr(sharded.ray, "get", lambda answers: answers)
    return index


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("budget", [0.0, 0.05, 0.3, 1.0])
def test_parts_find_what_the_whole_finds(folder: str, num_parts: int, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = Index.open(folder, NETS), in_parts(folder, num_parts, monkeypatch)
    assert len(parts) == len(whole) == 23
    for query in (regions(9, 100), regions(14, 2)):
        expected, found = search(whole, query, budget, 6), parts.search(query, budget, 6)
        assert [(hit.video_id, hit.is_fine, hit.matches) for hit in found] == [(hit.video_id, hit.is_fine, hit.matches) for hit in expected]
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)
