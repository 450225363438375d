"""Manifests of rows that were made, not found."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from vkd import derived
from vkd.errors import ManifestError
from vkd.manifest import BuildOptions, Manifest, build


def table(*ids: str) -> pa.Table:
    return pa.table({"video_id": list(ids), "duration_s": pa.array([None] * len(ids), pa.float64())})


def test_it_is_a_manifest(tmp_path: Path) -> None:
    written = derived.write(f"{tmp_path}/m", [table("a", "b"), table("c")], 7, ["x", "y"])
    loaded = Manifest.load(f"{tmp_path}/m")
    assert loaded == written
    assert (loaded.num_videos, loaded.chunk_size, loaded.index.sources) == (3, 7, ["x", "y"])
    assert [loaded.read_shard(name) for name in loaded.shards] == [table("a", "b"), table("c")]
    loaded.check(["video_id"])


@pytest.mark.parametrize("other", [[], ["a"], ["a", "c"], ["b", "a"], ["a", "b", "c"]])
def test_other_rows_are_refused(tmp_path: Path, other: list[str]) -> None:
    before = derived.write(f"{tmp_path}/m", map(table, "ab"), 7, ["x"])
    with pytest.raises(ManifestError, match="name another OUT"):
        derived.write(f"{tmp_path}/m", map(table, other), 7, ["x"])
    assert Manifest.load(f"{tmp_path}/m") == before == derived.write(f"{tmp_path}/m", map(table, "ab"), 7, ["x"])
    assert len(list(tmp_path.glob("m/shards/*"))) == 2


def test_what_ended_half_way_is_ended(tmp_path: Path) -> None:
    whole = derived.write(f"{tmp_path}/m", map(table, "ab"), 7, ["x"])
    (tmp_path / "m" / "manifest.json").unlink()
    assert derived.write(f"{tmp_path}/m", map(table, "ab"), 7, ["x"]) == whole == Manifest.load(f"{tmp_path}/m")


def test_it_does_not_grow(tmp_path: Path) -> None:
    derived.write(f"{tmp_path}/m", [table("a")], 64, ["x"])
    (tmp_path / "videos").mkdir()
    with pytest.raises(ManifestError, match="made with probe none"):
        build(f"{tmp_path}/videos", f"{tmp_path}/m", BuildOptions())
