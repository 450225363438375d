"""What workers do to a chunk: videos that fail become rejects, labels are checked, and each stage commits what it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pyarrow as pa
import pytest
import small

from vkd import planning, stages
from vkd.clips import Clip, ViewPolicy
from vkd.errors import LabelsMismatch, LabelsMissing, StorageError, TeacherError
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.run import Run
from vkd.schema import EXAMPLE_ID, FRAMES, LABELLED, REJECTED, STATUS, Columns
from vkd.stages import ITEM, REJECT, STATS, Item, Job
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.teaching import Teach
from vkd.video.decode import decode_clip
from vkd.video.guard import Guard


@pytest.fixture
def run(unlabelled: Run, tmp_path: Path) -> Run:
    """The small run with an empty store."""
    return small.changed(unlabelled, f"labels.store={tmp_path}/labels")


def read(job: Job, alias: str, number: int) -> pa.Table:
    """What is committed of one item."""
    item = job.items[number]
    return LabelSet.open(job.store, job.specs[alias]).read(item.view, item.chunk, verify=True)


def clips_of(job: Job, number: int) -> list[Clip]:
    item = job.items[number]
    return [stages.clip_of(example, job.views, item.view) for example in job.plan.examples(item.chunk).to_pylist()]


def stats_of(batch: Columns) -> dict[str, Any]:
    (text,) = batch[STATS].tolist()
    found: dict[str, Any] = json.loads(text)
    return found


def missing(job: Job, alias: str) -> list[Chunk]:
    return LabelSet.open(job.store, job.specs[alias]).missing(0, job.plan.chunks)


def test_a_chunk_is_decoded_once_for_all_samplings(run: Run) -> None:
    job = small.job_of(run)
    batch = small.decoded(job, 1)
    clips = clips_of(job, 1)
    assert [s.size_px for s in job.decoding.samplings] == [16, 32]
    assert job.column == {"teacher": f"{FRAMES}.0", FRAMES_ALIAS: f"{FRAMES}.1"}
    for i, sampling in enumerate(job.decoding.samplings):
        np.testing.assert_array_equal(batch[f"{FRAMES}.{i}"], np.stack([decode_clip(clip, [sampling])[0] for clip in clips]))
    assert batch[ITEM].tolist() == [1] * 5
    assert batch[REJECT].tolist() == [""] * 5


def test_kept_frames_are_committed_by_decoding(run: Run) -> None:
    job = small.job_of(run)
    batch = small.decoded(job, 4)
    table = read(job, FRAMES_ALIAS, 4)
    assert table[EXAMPLE_ID].to_pylist() == job.plan.examples(job.items[4].chunk)[EXAMPLE_ID].to_pylist()
    np.testing.assert_array_equal(decode(table, FRAMES_ALIAS), batch[f"{FRAMES}.1"])
    assert len(missing(job, FRAMES_ALIAS)) == 4


def test_a_damaged_file_among_good_ones_becomes_rejects(spoiled: Run, tmp_path: Path) -> None:
    job = small.job_of(small.changed(spoiled, f"labels.store={tmp_path}"))
    batch = small.decoded(job, 1)  # the last three clips of a_sharp, the first two of b_dull
    texts = batch[REJECT].tolist()
    assert texts[:3] == [""] * 3
    for reject in map(json.loads, texts[3:]):
        assert (reject["stage"], reject["kind"], reject["permanent"], reject["attempts"]) == ("decode", "not_a_video", True, 1)
        assert "b_dull.mp4" in reject["message"]
    for i in range(2):
        assert batch[f"{FRAMES}.{i}"][:3].any(axis=(1, 2, 3, 4)).all()
        assert not batch[f"{FRAMES}.{i}"][3:].any()
    table = read(job, FRAMES_ALIAS, 1)
    assert table[STATUS].to_pylist() == [LABELLED] * 3 + [REJECTED] * 2
    np.testing.assert_array_equal(decode(table, FRAMES_ALIAS, np.arange(3)), batch[f"{FRAMES}.1"][:3])


def test_broken_storage_is_not_the_videos_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise StorageError("unreachable")

    job = small.job_of(run)
    monkeypatch.setattr(Guard, "decode", broken)
    with pytest.raises(StorageError):
        small.decoded(job)
    assert len(missing(job, FRAMES_ALIAS)) == 5


def test_labels_are_what_the_teacher_says_of_the_frames(labelled: Run) -> None:
    job = small.job_of(small.changed(labelled, "labels.store=/nowhere", "data.keep_frames=none"))
    teacher = fakes.TinyTeacher()
    stored = LabelSet.open(labelled.labels.store, job.specs["teacher"])
    for number, item in enumerate(job.items):
        table = stored.read(0, item.chunk)
        assert table[STATUS].to_pylist() == [LABELLED] * table.num_rows
        expected = teacher({FRAMES: small.decoded(job, number)[f"{FRAMES}.0"]})
        for name in teacher.emits:
            np.testing.assert_allclose(decode(table, name), expected[name], rtol=1e-5, atol=1e-5)


def test_the_last_stage_gives_only_statistics(run: Run) -> None:
    job = small.job_of(run)
    batch = small.decoded(job)
    between = Teach(job, "teacher", 1, last=False)(batch)
    assert set(between) == set(batch)
    stats = stats_of(Teach(job, "teacher", 1, last=True)(batch))
    assert (stats["labelled"], stats["rejected"]) == (5, {})
    assert stats["decode_s"] > 0
    assert stats["teach_s"]["teacher"] >= 0
    assert stats["fidelity"]["teacher.logits"]["cosine_min"] == pytest.approx(1)


def test_the_set_keeps_the_probe_and_the_fidelity(run: Run) -> None:
    job = small.job_of(run)
    Teach(job, "teacher", 1, last=True)
    label_set = LabelSet.open(job.store, job.specs["teacher"])
    teacher = fakes.TinyTeacher()
    np.testing.assert_allclose(label_set.probe["embedding"], teacher(teacher.probe_batch())["embedding"], rtol=1e-5)
    assert set(label_set.fidelity) == {"logits", "embedding"}
    assert {"torch", "python"} <= set(label_set.recorded)


def test_only_what_lacks_is_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small.label(small.changed(run, "data.keep_frames=none"))
    job = small.job_of(run)
    assert [item.lacks for item in job.items] == [(FRAMES_ALIAS,)] * 5
    batch = small.decoded(job)
    monkeypatch.setattr(fakes.TinyTeacher, "__call__", None)
    teach = Teach.__new__(Teach)
    teach.job, teach.alias, teach.last = job, "teacher", True
    assert stats_of(teach(batch))["teach_s"] == {}
    assert len(missing(job, FRAMES_ALIAS)) == 4


def test_what_lacks_is_planned_view_by_view(run: Run) -> None:
    two = small.changed(run, "data.views.count=2")
    small.label(run)
    job = small.job_of(two)
    assert job.items == [Item(1, chunk, ("teacher", FRAMES_ALIAS)) for chunk in job.plan.chunks]
    assert [item.view for item in small.job_of(small.changed(two, f"labels.store={run.output}")).items] == [0] * 5 + [1] * 5


def test_another_view_is_other_pixels_in_another_folder(run: Run) -> None:
    job = small.job_of(small.changed(run, "data.views.count=2"))
    first, second = small.decoded(job, 0), small.decoded(job, 5)
    assert job.items[0].chunk == job.items[5].chunk
    assert (first[f"{FRAMES}.1"] != second[f"{FRAMES}.1"]).any(axis=(1, 2, 3, 4)).all()
    np.testing.assert_array_equal(decode(read(job, FRAMES_ALIAS, 5), FRAMES_ALIAS), second[f"{FRAMES}.1"])
    np.testing.assert_array_equal(decode(read(job, FRAMES_ALIAS, 0), FRAMES_ALIAS), first[f"{FRAMES}.1"])


def test_a_clip_is_a_view_of_an_example(run: Run) -> None:
    (example,) = Plan.of(run).examples(Plan.of(run).chunks[0]).slice(1, 1).to_pylist()
    views = ViewPolicy(seed=3)
    clip = stages.clip_of(example, views, 2)
    assert (clip.uri, clip.start_s, clip.end_s) == (example["uri"], 0.5, 1.0)
    assert clip.view == views.view(example[EXAMPLE_ID], 2)
    assert len({stages.clip_of(example, ViewPolicy(seed=seed), k).key for seed in (0, 1) for k in (0, 1)}) == 4


def test_rows_that_are_not_finite_are_rejected(run: Run) -> None:
    job = small.label(small.changed(run, "recipe.teacher='fakes:NotFinite'"))
    table = read(job, "teacher", 0)
    assert table[STATUS].to_pylist() == [LABELLED] + [REJECTED] * 4
    assert set(zip(table["reject_stage"].to_pylist(), table["reject_kind"].to_pylist(), strict=True)) == {
        (None, None),
        ("teach", "not_finite"),
    }
    assert np.isfinite(decode(table, "logits")).all()
    assert read(job, FRAMES_ALIAS, 0)[STATUS].to_pylist() == [LABELLED] * 5
    small.chunk_files(run, "teacher")[0].unlink()
    stats = stats_of(Teach(job, "teacher", 1, last=True)(small.decoded(job)))
    assert (stats["labelled"], stats["rejected"]) == (1, {"not_finite": 4})


def test_a_chunk_without_one_good_row_is_still_committed(spoiled: Run) -> None:
    teachers = planning.build_teachers(spoiled.recipe.teachers)
    chunk = Plan.of(spoiled).chunks[2]  # all of it is b_dull
    for spec in planning.label_specs(spoiled, teachers).values():
        label_set = LabelSet.open(spoiled.labels.store, spec)
        assert label_set.missing(0, Plan.of(spoiled).chunks) == []
        table = label_set.read(0, chunk, verify=True)
        assert table[STATUS].to_pylist() == [REJECTED] * 5
        assert label_set.summary(0).rejects == {"not_a_video": 8}


def test_a_teacher_is_not_asked_about_rejected_rows(spoiled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small.job_of(small.changed(spoiled, f"labels.store={tmp_path}", "data.keep_frames=none"))
    teach = Teach(job, "teacher", 1, last=True)
    asked: list[int] = []
    answer = fakes.TinyTeacher.labels

    def counted(self: fakes.TinyTeacher, frames: np.ndarray) -> Columns:
        asked.append(len(frames))
        return answer(self, frames)

    monkeypatch.setattr(fakes.TinyTeacher, "labels", counted)
    stats = [stats_of(teach(small.decoded(job, number))) for number in range(5)]
    assert asked == [5, 3, 4, 4]
    assert [s["rejected"].get("not_a_video", 0) for s in stats] == [0, 2, 5, 1, 0]
    assert sum(s["labelled"] for s in stats) == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [("WrongShape", "values have shape"), ("Silent", "teacher: gives no 'logits', which it says it emits")],
)
def test_a_teacher_that_breaks_its_contract_labels_nothing(run: Run, name: str, message: str) -> None:
    job = small.job_of(small.changed(run, f"recipe.teacher='fakes:{name}'", "data.keep_frames=none"))
    with pytest.raises(TeacherError, match=message) as raised:
        Teach(job, "teacher", 1, last=True)
    assert raised.value.exit_code == 2
    with pytest.raises(LabelsMissing):
        missing(job, "teacher")


def test_labels_of_another_shape_are_refused(run: Run) -> None:
    job = small.job_of(small.changed(run, "recipe.teacher='fakes:WrongOnClips'"))
    teach = Teach(job, "teacher", 1, last=True)
    with pytest.raises(TeacherError, match=r"teacher: logits has shape \(5, 4\), not \(5,\) a row -> mend emits"):
        teach(small.decoded(job))
    assert len(missing(job, "teacher")) == 5


def test_a_node_with_other_weights_is_refused(run: Run, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_text("the driver's")
    job = small.job_of(small.changed(run, f"recipe.teacher={{name: 'fakes:TinyTeacher', weights: {weights}}}"))
    Teach(job, "teacher", 1, last=True)
    weights.write_text("another")
    with pytest.raises(TeacherError, match="other weight files than the driver"):
        Teach(job, "teacher", 1, last=True)


def test_a_node_that_computes_something_else_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small.job_of(run)
    Teach(job, "teacher", 1, last=True)
    answer = fakes.TinyTeacher.labels
    monkeypatch.setattr(fakes.TinyTeacher, "labels", lambda self, frames: {k: v + 1 for k, v in answer(self, frames).items()})
    with pytest.raises(LabelsMismatch, match=r"probe of .* differs"):
        Teach(job, "teacher", 1, last=True)


def test_whole_numbers_are_stored_as_they_are(run: Run) -> None:
    job = small.label(small.changed(run, "labels.encodings={}", "recipe.teacher='fakes:Counts'", "data.keep_frames=none"))
    counts = decode(read(job, "teacher", 0), "counts")
    assert isinstance(counts, np.ndarray)
    assert counts.dtype == np.int32
    assert counts.any()
