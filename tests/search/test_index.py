"""Building, growing, opening and reading an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from search.corpora import FEATURES, corpus, networks

from vkd.errors import ConfigError, LabelsMismatch, StorageError
from vkd.search import index as indexing
from vkd.search.index import Index, build
from vkd.search.packed import pack


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def two_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SHARD_VIDEOS", 4)


@pytest.mark.usefixtures("two_shards")
@pytest.mark.parametrize("kind", ["binary", "attention"])
def test_an_index_holds_what_the_networks_make(tmp_path: Path, kind: str) -> None:
    (videos, read), nets = corpus(7), networks(kind)
    build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))
    index = Index.open(str(tmp_path), nets)
    assert (len(index), len(index.shards), index.features) == (7, 2, FEATURES)
    assert index.videos["video_id"].to_pylist() == [video.video_id for video in videos]
    order = np.array([5, 0, 6, 3, 0])
    for number, codes in zip(order.tolist(), index.fetch(order), strict=True):
        expected = nets.index(read[videos[number].name])
        assert np.array_equal(codes, expected.fine) and codes.dtype == (np.uint8 if kind == "binary" else np.float16)
        assert index.coarse[number] == pytest.approx(expected.coarse) and index.selector[number] == pytest.approx(expected.selector)
    assert index.num_frames.tolist() == [5, 12, 30, 6, 5, 12, 30]  # the comparator needs 4
    assert (tmp_path / "fine" / "model.safetensors").read_bytes() == nets.files["fine/model.safetensors"]


def test_it_is_told_of_how_many_videos_the_end_is_left_out(tmp_path: Path) -> None:
    (videos, read), nets = corpus(4), networks()
    lengths_s = [5 / FEATURES.fps + 1.5, 12 / FEATURES.fps + 0.5, None, 0.2]  # of 5, 12, 30 and 3 frames
    listed = [video._replace(duration_s=length_s) for video, length_s in zip(videos, lengths_s, strict=True)]
    assert build(listed, read.__getitem__, nets, FEATURES, str(tmp_path)).cut_short == 1


def test_what_an_interrupted_build_left_is_deleted(tmp_path: Path) -> None:
    (videos, read), nets = corpus(4), networks()
    build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))
    before = contents(tmp_path)
    (tmp_path / "shards" / "0123456789abcdef.fine.parquet").write_bytes(b"of another list of videos")
    build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))
    assert contents(tmp_path) == before


@torch.no_grad()
def test_a_frame_takes_a_bit_a_code() -> None:
    (_, read), nets = corpus(1), networks()
    x = torch.from_numpy(read["shard/0"])[None]
    fine = nets.index(read["shard/0"]).fine
    assert fine.shape == (5, 9, 8) and np.array_equal(fine, pack(nets.fine.index(x)[0]))


@pytest.mark.usefixtures("two_shards")
def test_the_same_input_changes_nothing_and_reads_nothing(tmp_path: Path) -> None:
    (videos, read), nets = corpus(6), networks()
    build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))
    before = contents(tmp_path)

    def unread(name: str) -> NoReturn:
        raise AssertionError(name)

    assert len(build(videos, unread, nets, FEATURES, str(tmp_path))) == 6
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("two_shards")
def test_more_videos_keep_full_shards_and_drop_the_old_last_one(tmp_path: Path) -> None:
    (videos, read), nets = corpus(10), networks()
    first = build(videos[:6], read.__getitem__, nets, FEATURES, str(tmp_path))
    grown = build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))
    assert len(grown) == 10 and grown.shards[0] == first.shards[0] and first.shards[1] not in grown.shards
    assert len(list((tmp_path / "shards").iterdir())) == 2 * len(grown.shards)
    anew = build(videos, read.__getitem__, nets, FEATURES, str(tmp_path / "anew"))
    assert np.array_equal(anew.coarse, grown.coarse) and anew.thresholds == grown.thresholds


def test_shards_of_long_videos_have_fewer_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "SHARD_FRAMES", 20)
    (videos, read), nets = corpus(6), networks()  # of 5, 12, 30, 3, 5 and 12 frames
    listed = [video._replace(num_frames=len(read[video.name])) for video in videos]
    index = build(listed, read.__getitem__, nets, FEATURES, str(tmp_path))
    assert np.bincount(index.shard_of).tolist() == [2, 1, 3]
    assert np.array_equal(index.coarse, build(videos, read.__getitem__, nets, FEATURES, str(tmp_path / "one")).coarse)


def test_a_video_without_frames_is_told_and_what_is_done_stays(tmp_path: Path) -> None:
    (videos, read), nets = corpus(3), networks()
    empty = read | {videos[1].name: read[videos[1].name][:0]}
    with pytest.raises(ConfigError, match=rf"{videos[1].uri}: it has features of no frame -> vkd labels forget RUN id0002"):
        build(videos, empty.__getitem__, nets, FEATURES, str(tmp_path))


def test_an_interrupted_build_is_no_index_and_goes_on(tmp_path: Path) -> None:
    (videos, read), nets = corpus(3), networks()
    with pytest.raises(KeyError):
        build(videos, {videos[0].name: read[videos[0].name]}.__getitem__, nets, FEATURES, str(tmp_path))
    with pytest.raises(ConfigError, match=r"no index here.*vkd index"):
        Index.open(str(tmp_path), nets)
    assert len(build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))) == 3


def test_other_networks_features_and_formats_are_refused(tmp_path: Path) -> None:
    (videos, read), nets = corpus(3), networks()
    build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))
    with pytest.raises(ConfigError, match=r"other networks: coarse/model.safetensors"):
        build(videos, read.__getitem__, networks(seed=1), FEATURES, str(tmp_path))
    with pytest.raises(ConfigError, match="other features: fps"):
        build(videos, read.__getitem__, nets, replace(FEATURES, fps=2.0), str(tmp_path))
    with pytest.raises(LabelsMismatch, match=r"regions-0123.*regions-9"):
        build(videos, read.__getitem__, nets, replace(FEATURES, name="regions-9"), str(tmp_path))
    with pytest.raises(ConfigError, match="no videos"):
        build([], read.__getitem__, nets, FEATURES, str(tmp_path / "empty"))
    place = tmp_path / "index.json"
    place.write_text(place.read_text().replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(ConfigError, match="format 9"):
        Index.open(str(tmp_path), nets)


def test_damaged_shards_are_told(tmp_path: Path) -> None:
    (videos, read), nets = corpus(3), networks()
    index = build(videos, read.__getitem__, nets, FEATURES, str(tmp_path))
    place = tmp_path / "shards" / f"{index.shards[0]}.fine.parquet"
    data = bytearray(place.read_bytes())
    data[200] ^= 255  # within the first codes
    place.write_bytes(data)
    with pytest.raises(StorageError, match=r"damaged.*vkd index"):
        Index.open(str(tmp_path), nets).fetch(np.array([0]))
    place.unlink()
    with pytest.raises(StorageError, match=r"fine.parquet.*gone"):
        Index.open(str(tmp_path), nets).fetch(np.array([0]))


def test_an_index_elsewhere_than_on_disk(tmp_path: Path) -> None:
    (videos, read), nets = corpus(3), networks()
    index = build(videos, read.__getitem__, nets, FEATURES, "memory://index")
    assert np.array_equal(index.fetch(np.array([1]))[0], nets.index(read[videos[1].name]).fine)


def test_open_shards_leave_file_descriptors_to_others() -> None:
    assert indexing.MAX_OPEN_SHARDS <= 512  # of the 1024 that processes have by default
