"""`vkd plan` measures a run in small, on real clips, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import harness
import pytest

from vkd import pipeline
from vkd.errors import LabelsMissing
from vkd.run import Run


@pytest.fixture
def fresh(tree: harness.Tree, tmp_path: Path) -> Run:
    """The run of these tests with nothing labelled."""
    return harness.parsed(tree, f"output={tmp_path}/out", f"labels.store={tmp_path}/labels", "labels.mode=tee")


def test_a_plan_tells_time_and_bytes_and_writes_no_labels(fresh: Run, local_ray: None, tmp_path: Path) -> None:
    report = pipeline.plan(fresh, Mock(), 0.3)
    told = report.forecast
    assert set(report.checks) == {"manifest", "labels", "teachers", "student", "storage", "resources"}
    assert [stage.name for stage in told.stages] == ["decode", "teacher"] and told.student.busy_s > 0
    assert told.work.to_label > told.work.to_train > 0 and told.work.label_bytes > 1000 and told.work.frame_bytes > 1000
    assert told.total_s > told.label_s > 0 and report.network_bytes > 0
    assert not list(tmp_path.glob("labels/*")) and not list(tmp_path.glob("out/plan-*")) and not list(tmp_path.glob("out/attempts"))


def test_what_a_run_would_refuse_is_refused(fresh: Run, local_ray: None) -> None:
    stored = fresh.model_copy(update={"labels": fresh.labels.model_copy(update={"mode": "stored"})})
    with pytest.raises(LabelsMissing, match=r"labels of \d+ clips are missing"):
        pipeline.plan(stored, Mock(), 0.3)
