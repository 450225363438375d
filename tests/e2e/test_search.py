"""Search by actors that hold an index between them."""

from __future__ import annotations

import time
from pathlib import Path

import paired
import pytest
import ray

from vkd import cluster
from vkd.errors import ConfigError, StorageError
from vkd.search import calibration
from vkd.search import index as indexing
from vkd.search.index import Features, Video
from vkd.search.networks import PARTS, Networks
from vkd.search.query import search
from vkd.search.sharded import ShardedIndex

FEATURES = Features("regions-0123", 1.0, {"name": "regions"}, {"name": "regions"})
VIDEOS = paired.random_videos(23)

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An index of 23 videos in 4 shards."""
    monkeypatch.setattr(indexing, "SHARD_VIDEOS", 7)
    monkeypatch.setattr(calibration, "NUM_PAIRS", 30)
    networks = Networks.load({part: str(paired.exported(tmp_path / part, part, FEATURES.name)) for part in PARTS})
    videos = [Video(name, name, f"{name}.mp4", float(len(regions))) for name, regions in VIDEOS.items()]
    indexing.build(videos, VIDEOS.__getitem__, networks, FEATURES, str(tmp_path / "index"))
    return str(tmp_path / "index")


def test_a_cluster_makes_the_shards_that_one_process_makes(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "MANY_CHUNKS", 2)
    videos = [Video(name, name, f"{name}.mp4", float(len(regions))) for name, regions in VIDEOS.items()]
    networks, other = Networks.beside(folder), tmp_path / "other"
    made = indexing.build(videos, VIDEOS.__getitem__, networks, FEATURES, str(other), cluster.map_chunks)
    assert made.shards == indexing.Index.open(folder).shards
    for path in (other / "shards").iterdir():
        assert path.read_bytes() == Path(folder, "shards", path.name).read_bytes()


def test_actors_find_what_one_process_finds_also_after_one_died(folder: str) -> None:
    query = VIDEOS["v002"]
    expected = search(indexing.Index.open(folder), query, 0.3, 6)
    index = ShardedIndex(folder, 2)
    for turn in range(2):
        found = index.search(query, 0.3, 6)
        assert [hit.video_id for hit in found] == [hit.video_id for hit in expected]
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)
        best = [hit.video_id for hit in search(indexing.Index.open(folder), query, 0.3, 6, "coarse")]
        assert [hit.video_id for hit in index.search(query, 0.3, 6, "coarse")] == best
        if not turn:
            ray.kill(index.parts[0], no_restart=False)
            time.sleep(0.1)


def test_more_actors_than_the_cluster_holds_are_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="needs 4 search actors of 1 CPU each; 2 of them find no place"):
        ShardedIndex(folder, 4)


def test_a_damaged_shard_is_told_by_its_name(folder: str) -> None:
    shard = sorted(path for path in Path(folder, "shards").iterdir() if ".fine." not in path.name)[0]
    shard.write_bytes(b"damaged")
    with pytest.raises(StorageError, match=f"{shard.name}: gone or damaged"), cluster.worker_errors():
        len(ShardedIndex(folder, 2))
