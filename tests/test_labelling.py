"""What labelling decides before and after Ray runs: what lacks, when there are too many rejects, compaction."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import small
import torch

from vkd import labelling, planning, worklist
from vkd.errors import ManifestError
from vkd.label_report import LabelReport
from vkd.planning import Plan
from vkd.rounds import rounds_of_epoch
from vkd.run import Run


def batches(run: Run) -> list[dict[str, torch.Tensor]]:
    feeder = small.feeder_of(run)
    return [fed.batch for fed in feeder.stream(rounds_of_epoch(feeder.sizes, 0, 1000, 0), 8, 0)]


def test_what_lacks_is_the_plan_minus_a_listing(labelled: Run, tmp_path: Path) -> None:
    run = small.copied(labelled, tmp_path)
    specs, chunks = planning.label_specs(run, planning.build_teachers(run.recipe.teachers)), Plan.of(run).chunks
    assert worklist.missing_items(run.labels.store, [0], specs, chunks) == []
    small.chunk_files(run, "teacher")[1].unlink()
    small.chunk_files(run, "frames")[1].unlink()
    small.chunk_files(run, "frames")[3].unlink()
    lacking = worklist.missing_items(run.labels.store, [0], specs, chunks)
    assert [(item.view, item.chunk, item.lacks) for item in lacking] == [(0, chunks[1], ("teacher", "frames")), (0, chunks[4], ("frames",))]
    two_views = small.changed(run, "data.views.count=2")
    assert len(worklist.missing_items(two_views.labels.store, [0, 1], specs, chunks)) == 2 + len(chunks)


def test_too_many_rejects_stop_with_the_commonest_reason() -> None:
    report = LabelReport(planned=10, labelled=3, rejected=Counter({"missing": 2, "truncated": 1}))
    labelling._check_rejects(report, 0.3)
    with pytest.raises(ManifestError, match=r"3 of 10 examples are rejected, most often 'missing' \(2\)"):
        labelling._check_rejects(report, 0.29)


def test_compacted_shards_feed_the_same_batches(labelled: Run, tmp_path: Path) -> None:
    run = small.copied(labelled, tmp_path)
    before = batches(run)
    assert labelling.compact(run) == 2  # one shard, of the teacher's set and of the frames
    assert not small.chunk_files(run, "teacher") + small.chunk_files(run, "frames")
    assert labelling.compact(run) == 2
    for old, new in zip(before, batches(run), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_an_incomplete_shard_is_not_compacted(labelled: Run, tmp_path: Path) -> None:
    run = small.copied(labelled, tmp_path)
    small.chunk_files(run, "teacher")[0].unlink()
    assert labelling.compact(run) == 1
    assert small.chunk_files(run, "teacher")
