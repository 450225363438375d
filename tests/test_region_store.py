"""Reading the region features of single videos from a real label set."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vkd.errors import ConfigError, LabelsMissing
from vkd.region_store import RegionStore
from vkd.rounds import Chunk
from vkd.schema import TensorType
from vkd.store.labelset import ChunkRows, LabelSet, LabelSetSpec, Reject

CHUNK_SIZE, NUM_VIDEOS, REJECTED = 12, 30, 13  # chunks of 12, 12 and 6; a file of 12 rows has two row groups
REGIONS = TensorType("float32", (None, 9, 5))
FIELDS = {"data": {"chunk_size": CHUNK_SIZE}}
Written = tuple[LabelSet, dict[int, np.ndarray]]


def spec(fields: object = FIELDS, tensor: TensorType = REGIONS, name: str = "regions") -> LabelSetSpec:
    return LabelSetSpec("regions", fields, {name: tensor})  # type: ignore[arg-type]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A set of one shard, and the features of each video that is not rejected, as half precision keeps them."""
    label_set, rng = LabelSet.create(str(tmp_path), spec(), {}, {}, {}), np.random.default_rng(0)
    regions = {i: rng.normal(size=(1 + i % 4, 9, 5)).astype(np.float16).astype(np.float32) for i in range(NUM_VIDEOS) if i != REJECTED}
    for index in range(3):
        videos = range(index * CHUNK_SIZE, min((index + 1) * CHUNK_SIZE, NUM_VIDEOS))
        rejects = {REJECTED - videos[0]: Reject("decode", "missing", "gone", True)} if REJECTED in videos else {}
        rows = ChunkRows([f"e{i}" for i in videos], rejects, {"regions": [regions.get(i) for i in videos]})
        label_set.write(0, Chunk("s1", index), rows)
    return label_set, regions


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Chunk]:
    """The chunks that are read from storage from now on."""
    seen, read = list[Chunk](), LabelSet.read

    def noted(self: LabelSet, view: int, chunk: Chunk, *args: object) -> object:
        seen.append(chunk)
        return read(self, view, chunk, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(LabelSet, "read", noted)
    return seen


@pytest.mark.parametrize("compacted", [False, True])
def test_every_video_is_found_at_its_place(written: Written, compacted: bool) -> None:
    label_set, regions = written
    if compacted:
        label_set.compact(0, "s1", 3)
    store = RegionStore(label_set.uri + "/")
    assert (store.name, store.num_regions, store.num_dims) == (Path(label_set.uri).name, 9, 5)
    for video, expected in regions.items():
        found = store.read(f"s1/{video}")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("video", "kind", "says"),
    [
        (f"s1/{REJECTED}", LabelsMissing, "video s1/13 is rejected"),
        ("s1/30", LabelsMissing, "video s1/30 is not there"),
        ("s1/36", LabelsMissing, "chunk 3 of shard s1, view 0 is not labelled"),
        ("s2/0", LabelsMissing, "chunk 0 of shard s2"),
        ("s1", ConfigError, "'s1' names no video"),
        ("s1/-1", ConfigError, "'s1/-1' names no video"),
    ],
)
def test_what_is_not_there_is_told(written: Written, video: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        RegionStore(written[0].uri).read(video)


def test_chunks_stay_up_to_a_number_of_bytes(written: Written, reads: list[Chunk]) -> None:
    label_set, regions = written
    num_bytes = RegionStore(label_set.uri)._chunk(Chunk("s1", 0)).nbytes
    reads.clear()
    store = RegionStore(label_set.uri, cache_bytes=2 * num_bytes)
    for video in (0, 12, 1, 14, 0, 24, 2, 12, 11):  # chunks 0, 1, then 2, which takes the place of 1
        np.testing.assert_array_equal(store.read(f"s1/{video}"), regions[video])
    assert [chunk.index for chunk in reads] == [0, 1, 2, 1]
    assert store._num_bytes == sum(table.nbytes for table in store._chunks.values()) <= store.cache_bytes


def test_a_chunk_larger_than_the_cache_stays_until_the_next(written: Written, reads: list[Chunk]) -> None:
    store = RegionStore(written[0].uri, cache_bytes=1)
    for video in (0, 1, 12, 14, 0):
        store.read(f"s1/{video}")
    assert [chunk.index for chunk in reads] == [0, 1, 0]


def test_a_copy_for_another_process_takes_no_chunks_along(written: Written) -> None:
    label_set, regions = written
    store = RegionStore(label_set.uri)
    empty = len(pickle.dumps(store))
    store.read("s1/0")
    assert len(pickle.dumps(store)) == empty
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.read("s1/5"), regions[5])
    assert list(store._chunks) == [Chunk("s1", 0)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: spec(name="embedding"), "the labels are embedding"),
        (lambda: spec(tensor=TensorType("float32", (9, 5))), "no 'regions' of frames"),
        (lambda: spec(fields={"data": {}}), "how large its chunks are"),
    ],
)
def test_another_set_is_refused(tmp_path: Path, make: Callable[[], LabelSetSpec], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RegionStore(LabelSet.create(str(tmp_path), make(), {}, {}, {}).uri)
    with pytest.raises(LabelsMissing, match="no label set here"):
        RegionStore(str(tmp_path / "nowhere"))
