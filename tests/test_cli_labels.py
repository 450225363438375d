"""`vkd labels ...` and the options of `vkd verify`, as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small

from vkd import training
from vkd.manifest import Manifest
from vkd.run import Run, dump
from vkd.schema import VIDEO_ID
from vkd.store.labelset import LabelSet
from vkd.verification import STRAY_AGE_S

USER, STORAGE = 2, 3
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(labelled: Run, tmp_path: Path) -> Run:
    return small.changed(small.copied(labelled, tmp_path), f"output={tmp_path}/out")


@pytest.fixture
def run_file(run: Run, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump(run))
    return path


def names_in(store: str) -> list[str]:
    return sorted(path.parent.name for path in Path(store).glob("*/labelset.json"))


def test_ls_tells_what_is_there(main: Main, run: Run, run_file: Path) -> None:
    code, out, _ = main("labels", "ls", run.labels.store, "--json")
    assert code == 0
    frames, teacher = json.loads(out)["sets"]
    assert [frames["name"], teacher["name"]] == names_in(run.labels.store)
    assert teacher["what"] == "TinyTeacher v1: embedding fp32, logits fp32; 2 frames of 16 px"
    assert frames["what"] == "frames raw; 2 frames of 32 px"
    assert {(each["views"], each["chunks"]) for each in (frames, teacher)} == {(1, 5)}
    assert frames["num_bytes"] == sum(path.stat().st_size for path in small.chunk_files(run, "frames"))
    assert frames["newest_s"] == max(path.stat().st_mtime for path in small.chunk_files(run, "frames"))
    code, out, _ = main("labels", "ls", run_file)
    assert code == 0 and teacher["name"] in out


def test_rm_removes_one_set_and_asks_before(main: Main, run: Run) -> None:
    frames, teacher = names_in(run.labels.store)
    code, _, err = main("labels", "rm", run.labels.store, frames)
    assert code == USER and "nothing was deleted" in err and "--yes" in err and err.count("\n") == 1
    assert names_in(run.labels.store) == [frames, teacher]
    assert main("labels", "rm", run.labels.store, frames, "--yes")[0] == 0
    assert os.listdir(run.labels.store) == [teacher]


@pytest.mark.parametrize("name", ["nothing", "..", ".", "notes", "../labels", "teacher"])
def test_rm_refuses_what_is_no_label_set(main: Main, run: Run, name: str) -> None:
    (Path(run.labels.store) / "notes").mkdir()
    code, _, err = main("labels", "rm", run.labels.store, name, "--yes")
    assert code == USER and "is no label set" in err and "name one of frames-" in err
    assert len(names_in(run.labels.store)) == 2 and (Path(run.labels.store) / "notes").is_dir()


def test_forget_asks_and_takes_down(main: Main, run: Run, run_file: Path) -> None:
    manifest = Manifest.load(run.data.manifest)
    video_id = manifest.read_shard(manifest.shards[0])[VIDEO_ID][0].as_py()
    code, _, err = main("labels", "forget", run_file, video_id)
    assert code == USER and "nothing was deleted" in err
    code, out, _ = main("labels", "forget", run_file, video_id, "--yes", "--json")
    assert code == 0
    assert json.loads(out) == {"videos": [video_id], "sets": 2, "chunks": 4, "rewritten": 4, "copies": []}
    code, out, _ = main("verify", run_file, "--sample", "0", "--rejects", "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"]
    assert {(row["stage"], row["kind"], row["permanent"]) for row in found["rejects"]} == {("forget", "forgotten", True)}
    assert len(found["rejects"]) == 8
    code, _, err = main("labels", "forget", run_file, "nobody", "--yes")
    assert code == USER and "no video 'nobody' in the manifest" in err


def test_verify_cleans(main: Main, run: Run, run_file: Path) -> None:
    (kept, *_) = small.chunk_files(run, "teacher")
    label_set = LabelSet.at(str(kept.parents[2]))
    old = kept.parent / ".chunk-00000.a0.parquet.1234.tmp"
    young = kept.parent / ".chunk-00000.a0.parquet.5678.tmp"
    superseding = kept.with_name("chunk-00000.a1.parquet")
    chunk = min(label_set.committed(0))
    label_set.forget(0, chunk, label_set.read(0, chunk, ())["example_id"].to_pylist()[:1])
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (old.stat().st_mtime - STRAY_AGE_S - 60,) * 2)
    code, out, _ = main("verify", run_file, "--sample", "0", "--clean")
    assert code == 0 and "cleaned: 1 files of interrupted writes, 1 superseded files" in out
    assert not old.exists() and young.exists() and not kept.exists() and superseding.exists()
    assert "cleaned: 0 files of interrupted writes, 0 superseded files" in main("verify", run_file, "--sample", "0", "--clean")[1]


def test_what_is_superseded_stays_while_its_successor_is_damaged(main: Main, run: Run, run_file: Path) -> None:
    (kept, *_) = small.chunk_files(run, "teacher")
    kept.with_name("chunk-00000.a1.parquet").write_bytes(b"damaged")
    code, out, err = main("verify", run_file, "--sample", "0", "--clean")
    assert code == USER and "0 superseded files" in out and kept.exists()
    assert "the labels are not whole" in err and err.count("\n") == 1


def test_verify_fails_below_its_threshold(main: Main, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main("verify", run_file)[0] == 0
    monkeypatch.setattr("vkd.verification.MIN_COSINE", 1.1)
    code, out, err = main("verify", run_file)
    assert code == USER and "lowest cosine" in out and "the labels are not whole" in err and "another labels.store" in err


def test_rejects_tell_all_that_is_known(main: Main, spoiled: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump(spoiled))
    code, out, _ = main("verify", tmp_path / "run.yaml", "--sample", "0", "--rejects", "--json")
    rejects = json.loads(out)["rejects"]
    assert code == 0 and len(rejects) == 8
    assert {(row["stage"], row["kind"], row["permanent"], row["decoder"]) for row in rejects} == {("decode", "not_a_video", True, "pyav")}
    assert sorted(row["start_s"] for row in rejects) == [i / 2 for i in range(8)] and {row["attempts"] for row in rejects} == {1}


def test_videos_that_the_manifest_rejected_are_listed(main: Main, labelled: Run, small_videos: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(small_videos / "a_sharp.mp4", videos)
    (videos / "bad.mp4").write_text("no video\n")
    code, out, _ = main("manifest", videos, tmp_path / "manifest", "--chunk-size", "5")
    assert code == 0
    run = small.changed(labelled, f"data.manifest={tmp_path}/manifest", f"labels.store={tmp_path}/labels")
    small.label(run)
    (tmp_path / "run.yaml").write_text(dump(run))
    code, out, _ = main("verify", tmp_path / "run.yaml", "--sample", "0", "--rejects", "--json")
    (row,) = json.loads(out)["rejects"]
    assert (Path(row["clip"]).name, row["stage"], row["permanent"], row["attempts"]) == ("bad.mp4", "manifest", True, None)
    told = main("verify", tmp_path / "run.yaml", "--sample", "0", "--rejects")[1].splitlines()[-1]
    assert told.startswith(f"rejected: {videos / 'bad.mp4'}: manifest ") and "(permanent): " in told


def test_partial_training_tells_the_share(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for alias in ("teacher", "frames"):
        small.chunk_files(run, alias)[1].unlink()
    partial = small.changed(run, "labels.allow_partial=true", "train.epochs=1")
    training.train(partial, lambda _: None)
    assert "training on 79% of the planned clips" in capsys.readouterr().err  # 19 of 24


@pytest.mark.parametrize("options", ["size=64k", "size=1m,ro"])
def test_committed_labels_survive_a_store_that_cannot_be_written(run: Run, run_file: Path, tmp_path: Path, options: str) -> None:
    """The store is copied into a real file system that is full, or read-only, in a name space of its own."""
    mount = f"mount -t tmpfs -o size=16m tmpfs {tmp_path}/mounted && cp -r {run.labels.store} {tmp_path}/mounted && "
    full = f"dd if=/dev/zero of={tmp_path}/mounted/ballast bs=4k 2>/dev/null; " if "ro" not in options else ""
    remount = f"mount -o remount,ro {tmp_path}/mounted; " if "ro" in options else ""
    outer = ("unshare", "--mount", "--map-root-user", "sh", "-c")
    if shutil.which("unshare") is None or subprocess.run([*outer, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    (tmp_path / "mounted").mkdir()
    manifest = Manifest.load(run.data.manifest)
    video_id = manifest.read_shard(manifest.shards[0])[VIDEO_ID][0].as_py()
    vkd = f"{sys.executable} -c 'from vkd import cli; cli.main()'"
    store = f"labels.store={tmp_path}/mounted/labels"
    do = f"{vkd} labels forget {run_file} {video_id} {store} --yes; echo code $?; {vkd} verify {run_file} {store} --sample 0; echo code $?"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*outer, mount + full + remount + do], capture_output=True, text=True, env=environment, timeout=250)
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 3", "code 0"], done
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("vkd: "), done.stderr
    assert ("Read-only" if "ro" in options else "No space left") in done.stderr
