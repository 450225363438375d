"""Stored, tee and live: teachers label before training or beside it, and the student learns the same."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import harness
import pytest
import ray

from vkd import beside, cluster, pipeline, planning, verification
from vkd.errors import TeacherError
from vkd.loop import RoundReport
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import VAL
from vkd.store import files
from vkd.store.labelset import LabelSet

FP32 = "labels.encodings={logits: fp32, embedding: fp32}"
FINE = ("data.clips.stride_s=0.5", "data.chunk_size=2", "data.split.holdout=0.4", "checkpoint.every_examples=3", "train.epochs=2", FP32)


def run_of(folder: Path, videos: Path, mode: str, *overrides: str) -> Run:
    return harness.parsed(harness.small_run(folder, videos), f"labels.mode={mode}", *FINE, *overrides)


def told(run: Run, watch: Mock) -> list[RoundReport]:
    """Every round of a run from its beginning to its end."""
    if run.labels.mode == "stored":
        pipeline.label(run, watch)
    assert not pipeline.distill(run, watch).skipped
    return [call.args[0] for call in watch.trained.call_args_list]


def sets_of(run: Run) -> dict[str, LabelSet]:
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    return {alias: LabelSet.open(run.store, spec) for alias, spec in specs.items()}


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Callable[[RoundReport], None]:
    """Kills the actor that labels beside training, once; Ray starts it again."""
    started, killed = list[beside.Beside](), list[int]()
    create = beside.Beside.__init__
    monkeypatch.setattr(beside.Beside, "__init__", lambda self, *args: (create(self, *args), started.append(self))[0])

    def kill(report: RoundReport) -> None:
        if not killed:
            ray.kill(started[0].actor, no_restart=False)
            killed.append(report.step)

    return kill


@pytest.mark.usefixtures("local_ray")
def test_the_three_modes_learn_the_same(tiny_video: Path, tmp_path: Path, killer: Callable[[RoundReport], None]) -> None:
    stored = told(run_of(tmp_path / "stored", tiny_video, "stored"), Mock())
    for mode in ("tee", "live"):
        run, watch = run_of(tmp_path / mode, tiny_video, mode), Mock()
        watch.trained.side_effect = killer if mode == "tee" else None
        rounds = told(run, watch)
        assert [(r.epoch, r.round, r.step) for r in rounds] == [(r.epoch, r.round, r.step) for r in stored]
        for ours, theirs in zip(rounds, stored, strict=True):
            assert ours.losses == pytest.approx(theirs.losses, abs=1e-6)
        assert watch.labelled.called
        kept = sets_of(run).values()
        if mode == "tee":
            assert not any(label_set.missing(0, Plan.of(run).chunks) for label_set in kept)
            again = pipeline.distill(run.model_copy(update={"output": f"{run.output}2"}), Mock())
            assert again.labels is None and again.num_steps == stored[-1].step  # the second student costs no teacher
        else:  # what training has read is gone, what is held out is there
            assert {view for label_set in kept for view in label_set.views() if label_set.committed(view)} == {run.held_out_view}
            assert not files.exists(run.labels.store)
            assert verification.verify(run, num_sampled=1).ok
            assert pipeline.evaluate(run, Mock())["num_clips"] == sum(map(len, Plan.of(run).rows(VAL)))


@pytest.mark.usefixtures("local_ray")
def test_what_ends_the_labelling_ends_the_training(tiny_video: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, tiny_video, "tee", "recipe.teacher='fakes:RaisesAtClips'", "data.split.by=none")
    with pytest.raises(TeacherError, match="raises at every clip"):
        pipeline.distill(run, Mock())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_figures_reach_prometheus() -> None:
    """From a process of the session to the page that its node shows to Prometheus."""
    cluster.export_metrics({"busy.teacher": 0.5})
    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    give_up_s = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(page, timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_vkd_busy_teacher{")]
        if lines:
            break
        assert time.monotonic() < give_up_s
        time.sleep(1)
    assert float(lines[0].split()[-1]) == 0.5
