"""Searching against a brute-force oracle, and what is told of matches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search.corpora import FEATURES, corpus, networks, regions

from vkd.search import index as indexing
from vkd.search.calibration import Thresholds
from vkd.search.index import Index, build
from vkd.search.query import rank, search

VIDEOS, READ = corpus(23)
NETS = networks()
TILED = {v.video_id: torch.from_numpy(np.concatenate([READ[v.name]] * 2) if len(READ[v.name]) < 4 else READ[v.name])[None] for v in VIDEOS}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "SHARD_VIDEOS", 7)
        yield build(VIDEOS, READ.__getitem__, NETS, FEATURES, str(tmp_path_factory.mktemp("index")))


@torch.inference_mode()
def oracle(query: np.ndarray, budget: float) -> list[tuple[str, float, bool]]:
    """Every video by a loop: id, score, whether it is the fine one; best first."""
    x = torch.from_numpy(query)[None]
    e, g, f = NETS.selector.index(x), NETS.coarse.index(x)[0], NETS.fine.index(x)[0]
    coarse = {key: float(NETS.coarse.index(video)[0] @ g) for key, video in TILED.items()}
    need = {key: float(NETS.selector(e, NETS.selector.index(video), torch.tensor([coarse[key]]))) for key, video in TILED.items()}
    chosen = sorted(need, key=lambda key: (-need[key], key))[: int(budget * len(VIDEOS))]
    fine = {key: float(NETS.fine.exact(f, NETS.fine.index(TILED[key])[0])) / 2 + 0.5 for key in chosen}
    scores = coarse | fine
    return [(key, scores[key], key in fine) for key in sorted(scores, key=lambda key: (-scores[key], key))]


@given(st.sampled_from([0.0, 0.05, 0.3, 0.5, 1.0]), st.integers(4, 20), st.integers(100, 120))
@settings(deadline=None, max_examples=6)
def test_ranking_is_that_of_a_brute_force_search(index: Index, budget: float, length: int, seed: int) -> None:
    query = regions(length, seed)
    hits, expected = search(index, query, budget, top=len(VIDEOS)), oracle(query, budget)
    assert [(hit.video_id, hit.is_fine) for hit in hits] == [(key, is_fine) for key, _, is_fine in expected]
    assert [hit.score for hit in hits] == pytest.approx([score for _, score, _ in expected], abs=1e-5)
    assert sum(hit.is_fine for hit in hits) == int(budget * len(VIDEOS))


def test_ties_are_broken_by_id(tmp_path: Path) -> None:
    same = regions(8, 5)
    index = build(VIDEOS[:6], lambda name: same, NETS, FEATURES, str(tmp_path))
    hits = search(index, regions(8, 6), 0.5, 6)
    assert [hit.video_id for hit in hits] in (
        sorted(hit.video_id for hit in hits if hit.is_fine) + sorted(hit.video_id for hit in hits if not hit.is_fine),
        sorted(hit.video_id for hit in hits if not hit.is_fine) + sorted(hit.video_id for hit in hits if hit.is_fine),
    )
    assert sorted(hit.video_id for hit in hits if hit.is_fine) == sorted(video.video_id for video in VIDEOS[:6])[:3]


def test_a_copy_matches_in_its_segment_and_the_rest_does_not(index: Index) -> None:
    (number,) = (i for i, video in enumerate(VIDEOS) if video.name == "shard/2")
    query = np.concatenate([regions(6, 300), READ["shard/2"][10:25]])
    fine = rank(index, NETS.index(query), 1.0).scores
    assert fine.min() >= 0 and fine.max() <= 1
    best_other = np.delete(fine, number).max()
    index = Index(index.uri, index.told, NETS)
    index.thresholds = replace(index.thresholds, match=float(fine[number]) - 1e-4)  # drawn weights: their scores order nothing
    hits = {hit.video_id: hit for hit in search(index, query, 1.0, len(VIDEOS))}
    segment = hits[VIDEOS[number].video_id].segment
    assert segment == (6.0, 21.0, 10.0, 25.0)
    assert all(hit.matches == (hit.score >= index.thresholds.match) and (hit.segment is None or hit.matches) for hit in hits.values())
    assert best_other != fine[number]


def test_no_match_is_told(index: Index) -> None:
    index = Index(index.uri, index.told | {"thresholds": vars(Thresholds())}, NETS)
    assert [hit.matches for hit in search(index, regions(9, 400), 0.3, 5)] == [False] * 5
    assert [hit.matches for hit in search(index, READ["shard/2"], 1.0, 1)] == [False], "though it is found"


def test_a_segment_ends_with_the_video(tmp_path: Path) -> None:
    """A video of 3 frames is repeated to 6; its second showing is none."""
    index = build(VIDEOS[:8], READ.__getitem__, NETS, FEATURES, str(tmp_path))
    index.thresholds = Thresholds(0.0, 0.9)
    short = READ["shard/3"]
    (hit,) = (hit for hit in search(index, short, 1.0, 8) if hit.uri == "shard/3.mp4")
    assert hit.segment == (0.0, 3.0, 0.0, 3.0)
    (hit,) = (hit for hit in search(index, short[[2, 0, 1]], 1.0, 8) if hit.uri == "shard/3.mp4")
    assert hit.segment == (1.0, 3.0, 0.0, 2.0)  # frames 2, 3 and 4 would be all of the query
