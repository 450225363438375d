"""Training in a Ray Train group of two workers against training in this process."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import harness
import pytest
import torch

from vkd import pipeline
from vkd.checkpoint import load_student
from vkd.planning import Plan


@pytest.mark.usefixtures("report")
def test_two_workers_train_what_one_process_trains(tree: harness.Tree, tmp_path: Path) -> None:
    students = {}
    for workers in (0, 2):
        run = harness.parsed(tree, f"output={tmp_path / str(workers)}", f"compute.student.workers={workers}", "train.epochs=3")
        trained = pipeline.distill(run, Mock())
        assert trained.num_examples == run.train.epochs * sum(len(rows) for rows in Plan.of(run).rows("train"))
        students[workers] = load_student(trained.student).state_dict()
    for name, alone in students[0].items():
        # batches are the same; sums over rows round in another order, and Adam makes steps of equal size of the smallest gradients
        torch.testing.assert_close(students[2][name], alone, rtol=0, atol=1e-4, msg=name)
