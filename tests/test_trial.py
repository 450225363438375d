"""The sample that a forecast is measured on: light and heavy clips in proportion, and a plan like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from vkd import training, trial
from vkd.loop import Loop
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import EXAMPLE_ID


def ids(plan: Plan) -> list[str]:
    return [name for chunk in plan.chunks for name in plan.examples(chunk)[EXAMPLE_ID].to_pylist()]


@pytest.mark.parametrize("fraction", [0.01, 0.5, 1.0])
def test_a_sample_is_some_of_the_plan(labelled: Run, fraction: float) -> None:
    plan = Plan.of(labelled)
    sample = trial.drawn(plan, fraction)
    assert len(ids(sample)) == len(set(ids(sample))) == sample.num_examples
    assert set(ids(sample)) <= set(ids(plan))
    assert sample.num_examples == min(plan.num_examples, max(trial.MIN_CLIPS, int(fraction * plan.num_examples)))
    assert sum(map(len, sample.rows("train"))) == sample.num_examples and sample.classes() == plan.classes()
    assert ids(trial.drawn(plan, fraction)) == ids(sample)


def test_light_and_heavy_clips_are_drawn_in_proportion(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.of(labelled)
    work = np.linspace(1, 100, plan.num_examples) ** 2
    monkeypatch.setattr(trial, "_work", lambda table: work)
    by_id = dict(zip(ids(plan), work, strict=True))
    mean = np.mean([by_id[name] for name in ids(trial.drawn(plan, 0.2))])
    assert mean == pytest.approx(work.mean(), rel=0.15)


def test_a_sample_costs_what_its_run_would(labelled: Run) -> None:
    """Training on the labels that are there: seconds of an example are positive, and no checkpoint is left."""
    plan = Plan.of(labelled)
    busy_s, cpu_s = trial._train(labelled, _Stored(plan), labelled.labels.store)
    assert busy_s > 0 and cpu_s > 0


class _Stored(trial.SamplePlan):
    """All of a plan, under the names of its own chunks: its labels are in the store already."""

    def __init__(self, plan: Plan) -> None:
        self.__dict__ |= plan.__dict__ | {"_classes": plan.classes()}

    examples = Plan.examples


def test_a_training_in_phases_costs_what_its_last_phase_does(staged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the student learns in it, from the weak labels; nothing is validated or noted."""
    run, loops = small.changed(staged, f"output={tmp_path}"), list[Loop]()
    new_loop = training.new_loop

    def kept(*args: Any) -> Loop:
        loops.append(new_loop(*args))
        return loops[-1]

    monkeypatch.setattr(training, "new_loop", kept)
    busy_s, cpu_s = trial._train(run, _Stored(Plan.of(run)), run.labels.store)
    assert busy_s > 0 and cpu_s > 0
    assert loops[0].phase.name == "joint" and loops[0].optimizer.state
    views = {path.name for path in tmp_path.rglob("view=*")}
    assert views == {"view=0"}
