"""What is left to do: chunks that lack, and rejects that get another try without touching what is labelled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import small

from vkd import planning, stages, worklist
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.rounds import Round, rounds_from
from vkd.run import Run
from vkd.schema import LABELLED, REJECTED, STATUS
from vkd.stages import STATS
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet, LabelSetSpec
from vkd.teaching import Teach
from vkd.verification import verify
from vkd.worklist import Retry


@pytest.fixture
def mended(small_videos: Path, unlabelled: Run, tmp_path: Path) -> Run:
    """Labelled while `b_dull.mp4` was no video: clips 8 to 15 of 24 are rejected. Now it is one again."""
    shutil.copytree(small_videos, tmp_path / "videos")
    build(str(tmp_path / "videos"), str(tmp_path / "manifest"), BuildOptions(label_from="regex:_([a-z]+)", chunk_size=5))
    (tmp_path / "videos" / "b_dull.mp4").write_text("no video\n")
    run = small.changed(unlabelled, f"data.manifest={tmp_path}/manifest", f"labels.store={tmp_path}/labels")
    small.label(run)
    shutil.copy(small_videos / "b_dull.mp4", tmp_path / "videos")
    return run


def specs_of(run: Run) -> dict[str, LabelSetSpec]:
    return planning.label_specs(run, planning.build_teachers(run.recipe.teachers))


def tables(run: Run, alias: str) -> list[pa.Table]:
    label_set = LabelSet.open(run.labels.store, specs_of(run)[alias])
    return [label_set.read(0, chunk) for chunk in Plan.of(run).chunks]


def items(run: Run, retry: Retry) -> list[stages.Item]:
    return worklist.retry_items(run.labels.store, 1, specs_of(run), Plan.of(run).chunks, retry)


def test_rejects_are_found_by_reason_or_by_hope(mended: Run) -> None:
    assert items(mended, Retry()) == []  # what is no video is permanent
    assert items(mended, Retry("deadline")) == []
    found = items(mended, Retry("not_a_video"))
    expected = {1: (3, 4), 2: (0, 1, 2, 3, 4), 3: (0,)}
    assert [(item.chunk.index, item.redo) for item in found] == [(i, {"teacher": rows, "frames": rows}) for i, rows in expected.items()]
    assert sum(worklist.num_rows(Plan.of(mended), item) for item in found) == 8


@pytest.mark.parametrize("compacted", [False, True])
def test_a_retry_labels_what_was_rejected_and_leaves_the_rest(mended: Run, labelled: Run, compacted: bool) -> None:
    if compacted:
        for alias in ("teacher", "frames"):
            label_set = LabelSet.open(mended.labels.store, specs_of(mended)[alias])
            label_set.compact(0, Plan.of(mended).chunks[0].shard, 5)
    before = tables(mended, "teacher")
    job = small.label(mended, Retry("not_a_video"))
    assert len(job.items) == 3
    for alias in ("teacher", "frames"):
        for mine, never_broken in zip(tables(mended, alias), tables(labelled, alias), strict=True):
            assert mine[STATUS].to_pylist() == [LABELLED] * mine.num_rows
            for name in ("frames",) if alias == "frames" else ("logits", "embedding"):
                # a teacher's answer to two clips may differ from that to five in the last bits
                np.testing.assert_allclose(decode(mine, name), decode(never_broken, name), rtol=1e-4, atol=1e-5)
    for old, new in zip(before, tables(mended, "teacher"), strict=True):
        kept = pa.array([status == LABELLED for status in old[STATUS].to_pylist()])
        assert old.filter(kept).equals(new.filter(kept))
    assert verify(mended, 4).ok
    assert items(mended, Retry("not_a_video")) == []


def test_a_retry_in_vain_counts_and_keeps_the_labels(mended: Run) -> None:
    (Path(mended.labels.store).parent / "videos" / "b_dull.mp4").write_text("still no video\n")
    before = tables(mended, "teacher")
    job = small.job_of(mended, Retry("not_a_video"))
    teach = Teach(job, "teacher", 1, last=True)
    stats = json.loads(teach(small.decoded(job, 0))[STATS][0])
    assert (stats["labelled"], stats["rejected"]) == (0, {"not_a_video": 2})
    assert tables(mended, "teacher")[1].filter(pa.array([True] * 3 + [False] * 2)).equals(before[1].slice(0, 3))
    assert tables(mended, "teacher")[1][STATUS].to_pylist() == [LABELLED] * 3 + [REJECTED] * 2


def test_a_chunk_that_another_driver_did_is_left_alone(unlabelled: Run, tmp_path: Path) -> None:
    run = small.changed(unlabelled, f"labels.store={tmp_path}")
    job = small.job_of(run)
    small.label(run)
    written = {path: path.stat().st_mtime_ns for path in small.chunk_files(run, "teacher") + small.chunk_files(run, "frames")}
    teach = Teach(job, "teacher", 1, last=True)
    for number, item in enumerate(job.items):
        stats = json.loads(teach(small.decoded(job, number))[STATS][0])
        num_rows = job.plan.examples(item.chunk).num_rows
        assert (stats["labelled"], stats["rejected"], stats["elsewhere"]) == (0, {}, num_rows)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def rounds_of(run: Run) -> list[Round]:
    sizes = [len(rows) for rows in Plan.of(run).rows("train")]
    return list(rounds_from(sizes, (0, 0), run.train.epochs, run.checkpoint.every_examples, run.train.seed))


@pytest.mark.parametrize("mode", ["tee", "live"])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("start", [(0, 0), (1, 1), (3, 0)])
def test_labelling_goes_in_the_order_of_training(
    unlabelled: Run, tmp_path: Path, mode: str, num_views: int, start: tuple[int, int]
) -> None:
    """Whatever training reads from its position on is there by its round; what nobody trains on comes last."""
    places = f"labels.store={tmp_path}/labels", f"output={tmp_path}/out"
    run = small.changed(unlabelled, *places, f"labels.mode={mode}", f"data.views.count={num_views}")
    plan = Plan.of(run)
    found = worklist.training_items(run, plan, specs_of(run), start)
    assert [item.round for item in found] == sorted(item.round for item in found)
    first = {(item.view, item.chunk): item.round for item in found}
    assert len(first) == len(found)
    for number, round_ in enumerate(rounds_of(run)):
        if (round_.epoch, round_.index) >= start:
            assert all(first[run.stored_view(round_.epoch), plan.chunks[chunk]] <= number for chunk in round_.chunks)
    held_out = {plan.chunks[i] for i, rows in enumerate(plan.rows("val")) if rows}
    assert {(run.held_out_view, chunk) for chunk in held_out} <= set(first)
    if mode == "tee":
        assert set(first) == {(view, chunk) for view in range(num_views) for chunk in plan.chunks}
    else:
        assert run.held_out_view % num_views == 0 and run.held_out_view >= run.train.epochs
        assert all(view >= start[0] for view, _ in first)


def test_nothing_lacks_for_training_once_it_is_labelled(labelled: Run) -> None:
    assert worklist.training_items(labelled, Plan.of(labelled), specs_of(labelled)) == []
