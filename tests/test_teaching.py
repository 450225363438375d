"""What a teacher's answers go through: the contract, rows that fail, statistics, and teachers that say the same of all clips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import paired
import pytest
import small

from vkd import derived
from vkd.errors import LabelsMismatch, LabelsMissing, TeacherError
from vkd.planning import FRAMES_ALIAS
from vkd.run import Run, parse
from vkd.schema import ATTEMPTS, FRAMES, LABELLED, REJECTED, STATUS, VIDEO_ID, Columns
from vkd.stages import REJECT, Job
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.teaching import Teach
from vkd.video.guard import Guard


@pytest.fixture
def run(unlabelled: Run, tmp_path: Path) -> Run:
    """The small run with an empty store."""
    return small.changed(unlabelled, f"labels.store={tmp_path}/labels")


def test_the_last_stage_gives_only_statistics(run: Run) -> None:
    job = small.job_of(run)
    batch = small.decoded(job)
    between = Teach(job, "teacher", 1, last=False)(batch)
    assert set(between) == set(batch)
    stats = small.stats_of(Teach(job, "teacher", 1, last=True)(batch))
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


def test_rows_that_are_not_finite_are_rejected(run: Run) -> None:
    job = small.label(small.changed(run, "recipe.teacher='fakes:NotFinite'"))
    table = small.committed(job, "teacher", 0)
    assert table[STATUS].to_pylist() == [LABELLED] + [REJECTED] * 4
    assert set(zip(table["reject_stage"].to_pylist(), table["reject_kind"].to_pylist(), strict=True)) == {
        (None, None),
        ("teach", "not_finite"),
    }
    assert np.isfinite(decode(table, "logits")).all()
    assert small.committed(job, FRAMES_ALIAS, 0)[STATUS].to_pylist() == [LABELLED] * 5
    small.chunk_files(run, "teacher")[0].unlink()
    stats = small.stats_of(Teach(job, "teacher", 1, last=True)(small.decoded(job)))
    assert (stats["labelled"], stats["rejected"]) == (1, {"not_finite": 4})


def test_a_teacher_is_not_asked_about_rejected_rows(spoiled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = small.job_of(small.changed(spoiled, f"labels.store={tmp_path}", "data.keep_frames=none"))
    teach = Teach(job, "teacher", 1, last=True)
    asked: list[int] = []
    answer = fakes.TinyTeacher.labels

    def counted(self: fakes.TinyTeacher, frames: np.ndarray) -> Columns:
        asked.append(len(frames))
        return answer(self, frames)

    monkeypatch.setattr(fakes.TinyTeacher, "labels", counted)
    stats = [small.stats_of(teach(small.decoded(job, number))) for number in range(5)]
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
        small.missing(job, "teacher")


def test_labels_of_another_shape_are_refused(run: Run) -> None:
    job = small.job_of(small.changed(run, "recipe.teacher='fakes:WrongOnClips'"))
    teach = Teach(job, "teacher", 1, last=True)
    with pytest.raises(TeacherError, match=r"teacher: logits has 5 rows of \(4,\), not 5 of \(5,\) -> mend emits"):
        teach(small.decoded(job))
    assert len(small.missing(job, "teacher")) == 5


def regions_of(run: Run, folder: Path) -> Job:
    """The labelling of an empty store by a teacher whose labels are ragged."""
    recipe = "recipe={name: label, models: {teacher: 'fakes:TinyRegions'}}"
    return small.job_of(small.changed(run, recipe, "labels.encodings={}", f"labels.store={folder}", "data.keep_frames=none"))


def test_ragged_labels_are_committed_and_read_back(spoiled: Run, tmp_path: Path) -> None:
    job = regions_of(spoiled, tmp_path)
    teach, batch = Teach(job, "teacher", 1, last=True), small.decoded(job, 1)
    stats = small.stats_of(teach(batch))
    assert (stats["labelled"], stats["rejected"]) == (3, {"not_a_video": 2})
    read = decode(small.committed(job, "teacher", 1), "regions")
    expected = fakes.TinyRegions()({FRAMES: batch[f"{FRAMES}.0"]})["regions"]
    assert [x.shape for x in read] == [(2, 9, 8)] * 3 + [(0, 9, 8)] * 2
    for got, said in zip(read[:3], expected, strict=False):
        np.testing.assert_allclose(got, said, atol=1e-3)
    assert stats["statistics"]["teacher.regions"]["clips"] == 3 and stats["fidelity"]["teacher.regions"]["cosine_min"] > 0.999
    nothing = small.stats_of(teach(small.decoded(job, 2)))
    assert (nothing["labelled"], nothing["rejected"], nothing["statistics"]) == (0, {"not_a_video": 5}, {})
    assert small.committed(job, "teacher", 2)[STATUS].to_pylist() == [REJECTED] * 5


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda rows: [row[:, 1:] for row in rows], r"5 rows of \(2, 8, 8\)"),
        (lambda rows: [row[0, 0, 0] for row in rows], r"5 rows of \(\)"),
        (lambda rows: rows[1:], r"4 rows of \(2, 9, 8\)"),
    ],
)
def test_ragged_labels_of_another_shape_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[np.ndarray], Any], told: str
) -> None:
    job, answer = regions_of(run, tmp_path), fakes.TinyRegions.labels
    teach = Teach(job, "teacher", 1, last=True)
    monkeypatch.setattr(fakes.TinyRegions, "labels", lambda self, frames: {"regions": spoil(answer(self, frames)["regions"])})
    with pytest.raises(TeacherError, match=rf"^teacher: regions has {told}, not 5 of \(None, 9, 8\) -> mend emits"):
        teach(small.decoded(job))
    assert len(small.missing(job, "teacher")) == 5


def test_a_teacher_without_frames_is_labelled_without_a_decoder_and_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of a text may be nothing."""
    monkeypatch.setattr(Guard, "_request", None)
    texts = ["a bb ccc", "", "a ?", "?", "? b"]
    rows = [{VIDEO_ID: f"v{i}", "others": text} for i, text in enumerate(texts)]
    derived.write(f"{tmp_path}/manifest", [paired.table_of(rows)], 3, ["test"])
    tree = small.tree_of(tmp_path) | {"data": {"manifest": f"{tmp_path}/manifest"}, "labels": {"store": f"{tmp_path}/labels"}}
    job = small.job_of(parse(tree | {"recipe": {"name": "label", "models": {"teacher": "fakes:Words"}}}))
    assert (job.decoding.samplings, job.column) == ((), {})
    teach = Teach(job, "teacher", 1, last=True)
    first, second = (small.stats_of(teach(small.decoded(job, number))) for number in range(2))
    assert (first["labelled"], first["rejected"]) == (2, {"not_finite": 1})
    assert (second["labelled"], second["rejected"], second["statistics"]) == (0, {"not_finite": 2}, {})
    said = first["statistics"]["teacher.scores"]
    assert (said["norm_mean"], said["distinct"]) == (1.0, 2)  # means of 2 and of nothing
    assert [x.tolist() for x in decode(small.committed(job, "teacher", 0), "scores")] == [[1, 2, 3], [], []]
    assert small.missing(job, "teacher") == []


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
    counts = decode(small.committed(job, "teacher", 0), "counts")
    assert isinstance(counts, np.ndarray)
    assert counts.dtype == np.int32
    assert counts.any()


def with_teacher(run: Run, name: str) -> Job:
    return small.job_of(small.changed(run, f"recipe.teacher='fakes:{name}'", "data.keep_frames=none"))


def test_a_clip_at_which_the_teacher_raises_is_rejected(run: Run) -> None:
    job = with_teacher(run, "RaisesAtBlack")
    batch = small.decoded(job)
    batch[f"{FRAMES}.0"][2] = 0
    stats = small.stats_of(Teach(job, "teacher", 1, last=True)(batch))
    assert (stats["labelled"], stats["rejected"]) == (4, {"teacher_error": 1})
    table = small.committed(job, "teacher", 0)
    assert table[STATUS].to_pylist() == [LABELLED] * 2 + [REJECTED] + [LABELLED] * 2
    reject = [table[name][2].as_py() for name in ("reject_stage", "reject_kind", "reject_message", "reject_permanent", ATTEMPTS)]
    assert reject == ["teach", "teacher_error", "ZeroDivisionError: no light", False, 2]
    others = [0, 1, 3, 4]
    expected = fakes.TinyTeacher()({FRAMES: batch[f"{FRAMES}.0"][others]})
    np.testing.assert_allclose(decode(table, "logits", np.array(others)), expected["logits"], rtol=1e-5, atol=1e-5)


def test_a_batch_that_works_clip_by_clip_is_labelled(run: Run) -> None:
    job = with_teacher(run, "RaisesAtBatches")
    stats = small.stats_of(Teach(job, "teacher", 1, last=True)(small.decoded(job)))
    assert (stats["labelled"], stats["rejected"]) == (5, {})


def test_a_teacher_that_raises_at_every_clip_stops_the_run(run: Run) -> None:
    job = with_teacher(run, "RaisesAtClips")
    teach = Teach(job, "teacher", 1, last=True)
    with pytest.raises(TeacherError, match=r"^teacher, chunk 0 of shard \S+: raises at every clip: KeyError: 'no such layer' -> "):
        teach(small.decoded(job))
    assert len(small.missing(job, "teacher")) == 5
    alone = small.decoded(job, 1)
    spoilt = json.dumps({"stage": "decode", "kind": "crash", "message": "", "permanent": True, "attempts": 1})
    alone[REJECT] = np.array(["", *[spoilt] * 4])
    assert small.stats_of(teach(alone))["rejected"] == {"teacher_error": 1, "crash": 4}  # one clip is no proof against the teacher


@pytest.mark.parametrize(("name", "label"), [("Constant", "logits"), ("Collapsed", "embedding")])
def test_a_teacher_that_says_the_same_of_all_clips_stops_the_run(run: Run, name: str, label: str) -> None:
    job = with_teacher(run, name)
    teach = Teach(job, "teacher", 1, last=True)
    teach(small.decoded(job, 0))  # five clips are too few to tell
    with pytest.raises(TeacherError, match=f"^teacher: {label} is the same for 9 clips that look different .* -> check its weights"):
        teach(small.decoded(job, 4))
    assert len(small.missing(job, "teacher")) == 4


@pytest.mark.parametrize("kind", ["black", "one clip many times", "a picture that stands still"])
def test_clips_that_look_alike_may_have_the_same_labels(run: Run, kind: str) -> None:
    job = with_teacher(run, "Constant")
    batch, rng = small.decoded(job), np.random.default_rng(0)
    frames = np.repeat(batch[f"{FRAMES}.0"][:1], 5, axis=0)
    teach = Teach(job, "teacher", 1, last=True)
    for _ in range(4):
        noise = rng.integers(0, 3, frames.shape, np.uint8)
        alike = {"black": frames * 0 + noise, "one clip many times": frames, "a picture that stands still": frames // 2 + noise}[kind]
        assert small.stats_of(teach(batch | {f"{FRAMES}.0": alike}))["labelled"] == 5


def test_statistics_of_each_label(run: Run) -> None:
    job = with_teacher(run, "TinyTeacher")
    batch = small.decoded(job)
    batch[f"{FRAMES}.0"][1] = batch[f"{FRAMES}.0"][0]
    found = small.stats_of(Teach(job, "teacher", 1, last=True)(batch))["statistics"]
    expected = fakes.TinyTeacher()({FRAMES: batch[f"{FRAMES}.0"]})
    assert set(found) == {"teacher.logits", "teacher.embedding"}
    assert found["teacher.embedding"]["norm_mean"] == pytest.approx(np.linalg.norm(expected["embedding"], axis=1).mean(), rel=1e-5)
    assert found["teacher.logits"]["duplicates"] == 0.0  # the same clip twice is one clip
    assert (found["teacher.logits"]["clips"], found["teacher.logits"]["distinct"]) == (5, 4)
    assert 0 < found["teacher.logits"]["entropy_nats"] < np.log(fakes.NUM_CLASSES)
    assert "entropy_nats" not in found["teacher.embedding"]
