"""After a takedown no byte of a video's labels or frames is left, and no later labelling brings any back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small

from vkd import takedown
from vkd.errors import ConfigError
from vkd.manifest import BuildOptions, Manifest, build
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.run import Run
from vkd.schema import EXAMPLE_ID, LABELLED, REJECT_STAGE, STATUS, URI, VIDEO_ID
from vkd.store import files, forgotten
from vkd.store.housekeeping import label_sets
from vkd.store.labelset import LabelSet
from vkd.verification import verify


def video_named(run: Run, name: str) -> str:
    """The id of the video in a file of this name."""
    (shard,) = (Manifest.load(run.data.manifest).read_shard(each) for each in Manifest.load(run.data.manifest).shards)
    (row,) = (row for row in shard.to_pylist() if Path(row[URI]).name == name)
    return str(row[VIDEO_ID])


def rows_of(run: Run, video_id: str) -> dict[tuple[str, str], tuple[str, bytes]]:
    """(set, example) -> status and the bytes of the first label, of one video's clips as the store has them."""
    plan, found = Plan.of(run), {}
    for label_set in label_sets(run.labels.store):
        for chunk in sorted(label_set.committed(0).keys() & set(plan.chunks)):
            table, label = label_set.read(0, chunk, verify=True), next(iter(label_set.spec.tensors))
            examples = {row[EXAMPLE_ID] for row in plan.examples(chunk).to_pylist() if row[VIDEO_ID] == video_id}
            for row in table.to_pylist():
                if row[EXAMPLE_ID] in examples:
                    found[label_set.spec.alias, row[EXAMPLE_ID]] = row[STATUS], row[label] or b""
    return found


def everything_in(folder: Path) -> bytes:
    """All values of all Parquet files of a folder, whatever their names, and all other files."""
    parts = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            parts += [data] if data[:4] != b"PAR1" else [repr(pq.read_table(path).to_pylist()).encode()]
    return b"\n".join(parts)


def assert_no_byte_is_left(run: Run, before: dict[tuple[str, str], tuple[str, bytes]]) -> None:
    left = everything_in(Path(run.labels.store))
    values = {value for status, value in before.values() if status == LABELLED}
    assert values and not [value for value in values if repr(value).encode()[2:-1] in left or value in left]


@pytest.fixture
def store(labelled: Run, tmp_path: Path) -> Run:
    return small.copied(labelled, tmp_path)


@pytest.mark.parametrize("compacted", [False, True])
def test_no_byte_of_a_video_is_left(store: Run, compacted: bool) -> None:
    video_id, other = video_named(store, "b_dull.mp4"), video_named(store, "a_sharp.mp4")
    before, others = rows_of(store, video_id), rows_of(store, other)
    assert len(before) == 16 and len(others) == 16
    (shard,) = {chunk.shard for chunk in Plan.of(store).chunks}
    for label_set in label_sets(store.labels.store):
        if compacted:
            label_set.compact(0, shard, 5)
        folder = Path(label_set.uri) / "view=0" / shard
        stray = next(iter(folder.iterdir())).read_bytes()
        (folder / ".chunk-00001.a0.parquet.1234.tmp").write_bytes(stray)
    with pytest.raises(AssertionError):
        assert_no_byte_is_left(store, before)

    done = takedown.forget(store, [video_id])
    assert (done.videos, done.sets, done.chunks, done.rewritten, done.copies) == ([video_id], 2, 6, 6, [])
    assert_no_byte_is_left(store, before)
    after = rows_of(store, video_id)
    assert after.keys() == before.keys() and {status for status, _ in after.values()} == {"rejected"}
    assert rows_of(store, other) == others
    assert verify(store, 2).ok
    again = takedown.forget(store, [video_id])
    assert (again.chunks, again.rewritten) == (6, 0)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("compacted", [False, True])
def test_a_takedown_that_dies_anywhere_is_finished_by_the_next(store: Run, compacted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    video_id = video_named(store, "b_dull.mp4")
    before, others = rows_of(store, video_id), rows_of(store, video_named(store, "c_sharp.mp4"))
    for label_set in label_sets(store.labels.store) if compacted else []:
        label_set.compact(0, Plan.of(store).chunks[0].shard, 5)
    put, delete, left = files.put, files.delete, 0

    def or_die(change: object) -> object:
        def changed(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop
            return change(*args, **kwargs)  # type: ignore[operator]

        return changed

    monkeypatch.setattr(files, "put", or_die(put))
    monkeypatch.setattr(files, "delete", or_die(delete))
    died = 0
    for allowed in range(1, 100):
        left = allowed if died % 2 else 1  # now from the start, now one change further
        try:
            takedown.forget(store, [video_id])
        except Stop:
            died += 1
            assert rows_of(store, video_named(store, "c_sharp.mp4")) == others
            continue
        break
    assert died > 5
    assert_no_byte_is_left(store, before)
    assert {status for status, _ in rows_of(store, video_id).values()} == {"rejected"}


def test_labels_that_come_later_leave_it_out(store: Run) -> None:
    """Chunks that lacked, another view, another teacher: the video's clips are rejected and its file is not read."""
    video_id = video_named(store, "b_dull.mp4")
    for path in small.chunk_files(store, "teacher")[1:3]:
        path.unlink()
    takedown.forget(store, [video_id])
    later = small.changed(store, "data.views.count=2", "recipe.teacher={name: 'fakes:TinyTeacher', seed: 3}")
    for run in (store, later):
        small.label(run)
        assert verify(run, 0).ok
    plan = Plan.of(later)
    assert len(label_sets(store.labels.store)) == 3
    for label_set in label_sets(store.labels.store):
        for view in label_set.views():
            for chunk in plan.chunks:
                stages = label_set.read(view, chunk)[REJECT_STAGE].to_pylist()
                videos = plan.examples(chunk)[VIDEO_ID].to_pylist()
                assert [stage == forgotten.STAGE for stage in stages] == [each == video_id for each in videos]


def test_shards_of_another_manifest_are_searched(store: Run, small_videos: Path, tmp_path: Path) -> None:
    """The same videos in other shards of the same store, listed by a manifest that the run does not name."""
    other = tmp_path / "other"
    build(str(small_videos), str(other), BuildOptions(chunk_size=5))
    run = small.changed(store, f"data.manifest={other}")
    small.label(run)
    video_id = video_named(store, "b_dull.mp4")
    before = rows_of(store, video_id) | rows_of(run, video_id)
    assert video_id == video_named(run, "b_dull.mp4") and Plan.of(run).chunks[0].shard != Plan.of(store).chunks[0].shard
    assert takedown.forget(store, [video_id]).chunks == 12
    assert_no_byte_is_left(run, before)
    assert verify(run, 0).ok


def test_another_cut_into_clips_is_found_too(store: Run) -> None:
    run = small.changed(store, "data.clips.stride_s=0.25")
    small.label(run)
    video_id = video_named(store, "a_sharp.mp4")
    before = rows_of(run, video_id)
    takedown.forget(store, [video_id])
    after = {key: status for key, (status, _) in rows_of(run, video_id).items()}
    assert after.keys() == before.keys() and set(after.values()) == {"rejected"}


def test_who_is_forgotten_is_named_by_id_or_uri(store: Run, tmp_path: Path) -> None:
    video_id = video_named(store, "b_dull.mp4")
    (uri,) = {
        row[URI] for chunk in Plan.of(store).chunks for row in Plan.of(store).examples(chunk).to_pylist() if row[VIDEO_ID] == video_id
    }
    assert takedown.videos_of(store, video_id) == takedown.videos_of(store, uri) == [video_id]
    with pytest.raises(ConfigError, match="no video 'nobody' in the manifest"):
        takedown.videos_of(store, "nobody")
    for name in ("../up", "", ".", "a/b"):
        with pytest.raises(ConfigError, match="is no video id"):
            forgotten.note(str(tmp_path / "notes"), name)


def test_copies_of_the_same_content_are_told(small_videos: Path, unlabelled: Run, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("one.mp4", "two.mp4"):
        (videos / name).write_bytes((small_videos / "a_sharp.mp4").read_bytes())
    build(str(videos), str(tmp_path / "manifest"), BuildOptions(hash=True, chunk_size=5))
    run = small.changed(unlabelled, f"data.manifest={tmp_path}/manifest", f"labels.store={tmp_path}/labels")
    small.label(run)
    one, two = video_named(run, "one.mp4"), video_named(run, "two.mp4")
    assert takedown.forget(run, [one]).copies == [two]
    assert takedown.forget(run, [two]).copies == [one]


def test_frames_are_gone_as_pixels(store: Run) -> None:
    video_id = video_named(store, "b_dull.mp4")
    takedown.forget(store, [video_id])
    plan = Plan.of(store)
    (frames,) = (each for each in label_sets(store.labels.store) if each.spec.alias == FRAMES_ALIAS)
    assert isinstance(frames, LabelSet)
    for chunk in plan.chunks:
        table = frames.read(0, chunk)
        held = np.array([each == video_id for each in plan.examples(chunk)[VIDEO_ID].to_pylist()])
        assert [value is None for value in table[FRAMES_ALIAS].to_pylist()] == held.tolist()


def test_videos_rendered_from_one_are_told_with_it() -> None:
    rows = [
        ("a", "x", "original", None),
        ("b", "x", "crop", None),
        ("c", "y", "partial", "x"),
        ("d", "y", "original", None),
        ("e", None, None, None),
    ]
    names = ("video_id", "source", "copy", "host")
    shard = pa.Table.from_pylist([dict(zip(names, row, strict=True)) | {"duplicate_of": None} for row in rows])
    assert takedown._copies({"s": shard}, ["a"]) == ["b", "c"]
    assert takedown._copies({"s": shard}, ["b"]) == []
    assert takedown._copies({"s": shard}, ["d"]) == ["c"]
    assert takedown._copies({"s": shard.drop_columns(["source", "copy", "host"])}, ["a"]) == []
