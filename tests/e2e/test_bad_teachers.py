"""Teachers that end their process, or say the same of every clip, on Ray."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import harness
import pytest

from vkd import pipeline
from vkd.errors import TeacherError, VkdError
from vkd.execution import MAX_RETRIES
from vkd.run import Run

pytestmark = pytest.mark.usefixtures("local_ray")


def run_of(tmp_path: Path, tiny_video: Path, teacher: str) -> Run:
    """A run of 13 clips of one video in one chunk."""
    tree = harness.small_run(tmp_path, tiny_video)
    tree["data"] |= {"clips": {"plan": "windows", "length_s": 1.0, "stride_s": 0.25}, "chunk_size": 16, "keep_frames": "none"}
    return harness.parsed(tree, f"recipe.teacher={teacher}")


def test_a_teacher_that_dies_is_started_anew(tiny_video: Path, tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    report = pipeline.label(run_of(tmp_path, tiny_video, f"{{name: 'fakes:Dies', folder: {deaths}, times: 1}}"), Mock())
    assert (report.labelled, report.planned, len(list(deaths.iterdir()))) == (13, 13, 1)


@pytest.mark.slow
def test_a_teacher_that_dies_again_and_again_stops_the_run(tiny_video: Path, tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    run = run_of(tmp_path, tiny_video, f"{{name: 'fakes:Dies', folder: {deaths}, times: 99}}")
    with pytest.raises(VkdError, match=r"^a teacher's process died again and again") as raised:
        pipeline.label(run, Mock())
    assert "\n" not in str(raised.value)
    assert len(list(deaths.iterdir())) == 1 + MAX_RETRIES
    assert not list(Path(run.labels.store).rglob("chunk-*"))


def test_a_constant_teacher_labels_nothing(tiny_video: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_video, "'fakes:Constant'")
    with pytest.raises(TeacherError, match="logits is the same for 13 clips that look different"):
        pipeline.label(run, Mock())
    assert not list(Path(run.labels.store).rglob("chunk-*"))
