"""Training in a Ray Train group of two workers against training in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import harness
import pytest
import ray  # noqa: F401  # brings psutil along
import torch

from vkd import pipeline, training
from vkd.checkpoint import load_student
from vkd.errors import StorageError
from vkd.planning import Plan
from vkd.run import Run

import psutil  # isort: skip

TOLERANCE = 2e-4  # of the norm of all weights; 3e-5 was measured, and 1e-5 between one thread and two: Adam enlarges rounding


GROUP = ("compute.student.workers=[1, 2]", "compute.student.cpus=0.4", "labels.mode=tee")


@pytest.mark.usefixtures("report")
def test_a_group_beside_its_teachers_trains_what_one_process_trains(tree: harness.Tree, tmp_path: Path) -> None:
    """The group asks for one or two workers and gets two; its labels are made meanwhile."""
    weights = {}
    for name, changes in {"process": (), "group": (*GROUP, f"labels.store={tmp_path / 'labels'}")}.items():
        run = harness.parsed(tree, f"output={tmp_path / name}", "train.epochs=3", *changes)
        trained = pipeline.distill(run, Mock())
        assert trained.num_examples == run.train.epochs * sum(len(rows) for rows in Plan.of(run).rows("train"))
        assert trained.num_steps > run.train.epochs
        assert (trained.labels is not None) == (name == "group")
        weights[name] = torch.cat([tensor.flatten() for tensor in load_student(trained.student).state_dict().values()])
    told = json.loads((tmp_path / "group" / training.STUDENT_TIME).read_text())
    assert told["world_size"] == 2
    assert (weights["group"] - weights["process"]).norm() < TOLERANCE * weights["process"].norm()


@pytest.mark.slow
@pytest.mark.usefixtures("report")
def test_what_a_worker_raises_is_raised_here(tree: harness.Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MAX_FAILURES", 0)
    shutil.copytree(tree["labels"]["store"], tmp_path / "labels")
    for damaged in (tmp_path / "labels").glob("teacher-*/view=0/*/chunk-*"):
        damaged.write_bytes(damaged.read_bytes()[:1000])
    run = harness.parsed(tree, f"output={tmp_path / 'out'}", f"labels.store={tmp_path / 'labels'}", "compute.student.workers=2")
    with pytest.raises(StorageError, match="corrupt label file"):
        pipeline.distill(run, Mock())


@pytest.mark.slow
@pytest.mark.usefixtures("report")
def test_a_rank_that_hangs_ends_and_the_group_goes_on(tree: harness.Tree, tmp_path: Path) -> None:
    """One of two ranks is stopped in the middle: the other one waits for it in a step, and gives up."""
    changes = ("compute.student.workers=2", "compute.student.stalled_s=8", "train.epochs=40")
    run, stopped = harness.parsed(tree, f"output={tmp_path / 'out'}", *changes), list[int]()

    def stop_one() -> None:
        while not list((tmp_path / "out").glob("attempts/*/step-*/DONE")):
            time.sleep(0.05)
        ranks = [p for p in psutil.process_iter() if "RayTrainWorker" in " ".join(p.cmdline())]
        stopped.append(ranks[0].pid)
        ranks[0].send_signal(signal.SIGSTOP)

    stopper = threading.Thread(target=stop_one)
    stopper.start()
    trained = pipeline.distill(run, Mock())
    stopper.join()
    assert stopped and not psutil.pid_exists(stopped[0])
    assert trained.num_examples == run.train.epochs * sum(len(rows) for rows in Plan.of(run).rows("train"))


@pytest.mark.slow
@pytest.mark.usefixtures("report")
def test_a_lost_node_shrinks_the_group(tree: harness.Tree, tmp_path: Path) -> None:
    """Of two nodes with one rank each one is killed: training goes on with the other, and every example counts once an epoch."""
    run, told = on_two_nodes(tree, tmp_path, "kill")
    assert int(told.split()[-1]) == run.train.epochs * sum(len(rows) for rows in Plan.of(run).rows("train"))
    assert json.loads((tmp_path / "out" / training.STUDENT_TIME).read_text())["world_size"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("report")
def test_a_notice_is_heard_and_saved_for(tree: harness.Tree, tmp_path: Path) -> None:
    """One of two nodes is announced to go: rank 0 saves inside the round, and nothing is lost or counted twice."""
    run, told = on_two_nodes(tree, tmp_path, "drain")
    assert "vkd: a node is being taken away; saving after step" in told
    assert int(told.split()[-1]) == run.train.epochs * sum(len(rows) for rows in Plan.of(run).rows("train"))


def on_two_nodes(tree: harness.Tree, folder: Path, how: str) -> tuple[Run, str]:
    """A training of which one node goes, and all that it said, the examples that it counted last."""
    run = harness.parsed(tree, f"output={folder / 'out'}", "compute.student.workers=[1, 2]", "train.epochs=60")
    run_file = harness.write(run.model_dump(mode="json"), folder / "run.yaml")
    script, environment = Path(harness.__file__).with_name("elastic.py"), os.environ | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    done = subprocess.run([sys.executable, script, run_file, how], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return run, done.stderr + done.stdout
