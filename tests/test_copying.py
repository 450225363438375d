"""Copies are rendered once, and the manifest says what they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from video.clipmaker import counter_frame

from vkd import copying, manifest
from vkd.errors import ConfigError, ManifestError
from vkd.manifest import BuildOptions, Manifest
from vkd.run import Data
from vkd.video.render import MADE_S, encode, read

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a video each, one that is none, and one of a distractor."""
    root = tmp_path_factory.mktemp("videos")
    for first, name in ((0, "in/x/a b.mp4"), (100, "in/y/b.mp4"), (200, "far/c.mp4")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode([counter_frame(first + i) for i in range(12)], 8.0, 23))
    (root / "in/y/no.mp4").write_bytes(b"this is no video")
    return root


def data_of(videos: Path, folder: Path, **copies: Any) -> Data:
    tree = {"out": str(folder / "copies"), "per_video": 2, "split": [3, 0, 0], "distractors": [str(videos / "far")]} | copies
    return Data.model_validate({"source": str(videos / "in"), "manifest": str(folder / "manifest"), "label_from": "folder", "copies": tree})


def made(data: Data) -> str:
    assert data.copies is not None
    return copying.make(data, data.copies)


def files_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*.mp4")}


def rows_of(table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(table).to_pylist()
    return found


def test_the_table_says_what_each_video_is_and_nothing_is_made_twice(
    videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = data_of(videos, tmp_path)
    table = made(data)
    assert "no.mp4" in capfd.readouterr().err, "a source that cannot be decoded is told"
    rows = rows_of(table)
    assert [(r["source"], r["family"], r["copy"], r["split"], r["label"]) for r in rows if r["copy"] in ("original", "distractor")] == [
        ("x/a b.mp4", "x/a b.mp4", "original", "train", "x"),
        ("y/b.mp4", "y/b.mp4", "original", "train", "y"),
        ("y/no.mp4", "y/no.mp4", "original", "train", "y"),
        ("far/c.mp4", "far", "distractor", "test", None),
    ]
    partial = [r for r in rows if r["copy"] == "partial"]
    assert [(r["source"], r["host"], r["label"]) for r in partial] == [("x/a b.mp4", "y/b.mp4", "x"), ("y/b.mp4", "x/a b.mp4", "y")]
    for row in partial:
        shown_s = row["target_end_s"] - row["target_start_s"]
        assert row["target_start_s"] > 0
        assert shown_s == row["source_end_s"] - row["source_start_s"] > 0
        assert row["source_end_s"] <= 1.5
    assert len(rows) == 8
    report = manifest.build(table, data.manifest, BuildOptions(allow=data.access.allow or ()))
    assert (report.videos, report.rejected) == (7, {"not_a_video": 1})

    first = files_of(tmp_path / "copies")
    assert len(first) == 2 + 4
    gone = Path(partial[0]["uri"])
    gone.unlink()
    assert made(data) == table
    again = files_of(tmp_path / "copies")
    assert again.pop(gone.name)[1:] == first.pop(gone.name)[1:]
    assert again == first, "other files are as they were"
    assert rows_of(table) == rows
    assert manifest.build(table, data.manifest, BuildOptions(allow=data.access.allow or ())).new == 0

    with pytest.raises(ConfigError, match="another split, seed or form"):
        made(data_of(videos, tmp_path, seed=1))
    grown = made(data_of(videos, tmp_path, per_video=3))
    assert (grown, len(rows_of(grown))) == (table, 10)
    assert set(Manifest.load(data.manifest).index.columns) >= set(copying.COLUMNS.names)


def test_a_split_of_the_source_is_kept(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "list.csv"
    source.write_text(f"uri,split\n{videos}/in/x/a b.mp4,val\n{videos}/in/y/b.mp4,\n")
    tree = {"source": str(source), "manifest": str(tmp_path / "manifest"), "allow": [str(videos / "in")]}
    rows = rows_of(made(Data.model_validate(tree | {"copies": {"out": str(tmp_path / "copies"), "per_video": 2}})))
    assert [(r["source"], r["split"], r["copy"] == "original") for r in rows] == [
        ("x/a b.mp4", "val", True),
        ("y/b.mp4", "train", True),
        ("x/a b.mp4", "val", False),  # two splits: no host for a partial copy
        ("y/b.mp4", "train", False),
    ]


def program(data: Data, folder: Path) -> Path:
    """One that makes the copies."""
    made_here = f"from vkd import copying\nfrom vkd.run import Data\nd = Data.model_validate_json({data.model_dump_json()!r})\n"
    path = folder / "main.py"
    path.write_text(made_here + 'if __name__ == "__main__":\n    copying.make(d, d.copies)\n')
    return path


def started(path: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, str(path)], env=environment, stderr=subprocess.DEVNULL)


def test_a_killed_rendering_leaves_whole_files_only_and_two_at_once_end_it(videos: Path, tmp_path: Path) -> None:
    data = data_of(videos, tmp_path, per_video=12)
    main = program(data, tmp_path)
    process = started(main)
    try:
        while process.poll() is None and len(list((tmp_path / "copies").glob("videos/*.mp4"))) < 3:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    half = files_of(tmp_path / "copies")
    assert half
    both = [started(main) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    rows = rows_of(made(data))
    whole = files_of(tmp_path / "copies")
    assert {Path(row["uri"]).name for row in rows if row["copy"] not in ("original", "distractor")} < set(whole)
    assert len(whole) == 2 + 24
    assert all(whole[name] == was for name, was in half.items()), "what was there stays"
    assert all(len(read(str(path))) for path in (tmp_path / "copies").rglob("*.mp4"))
    times = {path.stat().st_mtime for path in (tmp_path / "copies/videos").glob("*.mp4")}  # what was cut off has another name
    assert times == {MADE_S}, "no kill comes between a file's name and its time"


def test_what_cannot_be_copied(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"are 2 sources, data.source has 3"):
        made(data_of(videos, tmp_path, split=[1, 1, 0]))
    pq.write_table(pa.table({"uri": [f"{videos}/in/y/b.mp4"], "start_s": [0.0], "end_s": [1.0]}), tmp_path / "moments.parquet")
    with pytest.raises(ManifestError, match="it lists moments"):
        made(data_of(videos, tmp_path).model_copy(update={"source": str(tmp_path / "moments.parquet")}))
    with pytest.raises(ValueError, match="copies are made of the videos of source"):
        Data.model_validate({"manifest": "m", "copies": {"out": "o"}})
