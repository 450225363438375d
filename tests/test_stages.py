"""What workers do to a chunk: videos that fail become rejects, labels are checked, and each stage commits what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import fakes
import numpy as np
import pytest
import small

from vkd import planning, stages
from vkd.clips import Clip, ViewPolicy
from vkd.errors import StorageError
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.run import Run
from vkd.schema import EXAMPLE_ID, FRAMES, LABELLED, REJECTED, STATUS
from vkd.stages import ITEM, REJECT, Item, Job
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.teaching import Teach
from vkd.video.decode import decode_clip
from vkd.video.guard import Guard


@pytest.fixture
def run(unlabelled: Run, tmp_path: Path) -> Run:
    """The small run with an empty store."""
    return small.changed(unlabelled, f"labels.store={tmp_path}/labels")


def clips_of(job: Job, number: int) -> list[Clip]:
    item = job.items[number]
    return [stages.clip_of(example, job.views, item.view) for example in job.plan.examples(item.chunk).to_pylist()]


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
    table = small.committed(job, FRAMES_ALIAS, 4)
    assert table[EXAMPLE_ID].to_pylist() == job.plan.examples(job.items[4].chunk)[EXAMPLE_ID].to_pylist()
    np.testing.assert_array_equal(decode(table, FRAMES_ALIAS), batch[f"{FRAMES}.1"])
    assert len(small.missing(job, FRAMES_ALIAS)) == 4


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
    table = small.committed(job, FRAMES_ALIAS, 1)
    assert table[STATUS].to_pylist() == [LABELLED] * 3 + [REJECTED] * 2
    np.testing.assert_array_equal(decode(table, FRAMES_ALIAS, np.arange(3)), batch[f"{FRAMES}.1"][:3])


def test_broken_storage_is_not_the_videos_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise StorageError("unreachable")

    job = small.job_of(run)
    monkeypatch.setattr(Guard, "decode", broken)
    with pytest.raises(StorageError):
        small.decoded(job)
    assert len(small.missing(job, FRAMES_ALIAS)) == 5


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


def test_only_what_lacks_is_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    small.label(small.changed(run, "data.keep_frames=none"))
    job = small.job_of(run)
    assert [item.lacks for item in job.items] == [(FRAMES_ALIAS,)] * 5
    batch = small.decoded(job)
    monkeypatch.setattr(fakes.TinyTeacher, "__call__", None)
    teach = Teach.__new__(Teach)
    teach.job, teach.alias, teach.last = job, "teacher", True
    assert small.stats_of(teach(batch))["teach_s"] == {}
    assert len(small.missing(job, FRAMES_ALIAS)) == 4


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
    np.testing.assert_array_equal(decode(small.committed(job, FRAMES_ALIAS, 5), FRAMES_ALIAS), second[f"{FRAMES}.1"])
    np.testing.assert_array_equal(decode(small.committed(job, FRAMES_ALIAS, 0), FRAMES_ALIAS), first[f"{FRAMES}.1"])


def test_a_clip_is_a_view_of_an_example(run: Run) -> None:
    (example,) = Plan.of(run).examples(Plan.of(run).chunks[0]).slice(1, 1).to_pylist()
    views = ViewPolicy(seed=3)
    clip = stages.clip_of(example, views, 2)
    assert (clip.uri, clip.start_s, clip.end_s) == (example["uri"], 0.5, 1.0)
    assert clip.view == views.view(example[EXAMPLE_ID], 2)
    assert len({stages.clip_of(example, ViewPolicy(seed=seed), k).key for seed in (0, 1) for k in (0, 1)}) == 4


def test_a_chunk_without_one_good_row_is_still_committed(spoiled: Run) -> None:
    teachers = planning.build_teachers(spoiled.recipe.teachers)
    chunk = Plan.of(spoiled).chunks[2]  # all of it is b_dull
    for spec in planning.label_specs(spoiled, teachers).values():
        label_set = LabelSet.open(spoiled.labels.store, spec)
        assert label_set.missing(0, Plan.of(spoiled).chunks) == []
        table = label_set.read(0, chunk, verify=True)
        assert table[STATUS].to_pylist() == [REJECTED] * 5
        assert label_set.summary(0).rejects == {"not_a_video": 8}
