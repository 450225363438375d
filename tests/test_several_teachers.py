"""Two teachers with samplings of their own: one decode for both, and training on what both have labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small

from vkd import stages, training
from vkd.clips import Clip
from vkd.loop import RoundReport
from vkd.planning import Plan
from vkd.run import Run

RECIPE = "{name: 'fakes:TwoTeachers', student: {name: shift_cnn, num_frames: 2, size_px: 32}, first: %s, second: %s}"
FIRST, SECOND = "'fakes:TinyTeacher'", "{name: 'fakes:TinyTeacher', num_frames: 4, size_px: 32, seed: 1}"


def run_of(unlabelled: Run, folder: Path, second: str = SECOND) -> Run:
    return small.changed(unlabelled, f"labels.store={folder}/labels", f"output={folder}/out", f"recipe={RECIPE % (FIRST, second)}")


def test_a_clip_is_decoded_once_for_both(unlabelled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = list[Clip](), stages.decode_or_reject

    def counted(clips: Sequence[Clip], settings: Any) -> Any:
        decoded.extend(clips)
        return decode(clips, settings)

    monkeypatch.setattr(stages, "decode_or_reject", counted)
    run = run_of(unlabelled, tmp_path)
    job = small.label(run)
    assert sorted(s.size_px for s in job.decoding.samplings) == [16, 32, 32]
    assert len(decoded) == len(set(decoded)) == Plan.of(run).num_examples
    assert not small.missing(job, "first") and not small.missing(job, "second")


def test_an_example_trains_when_both_have_labelled_it(unlabelled: Run, tmp_path: Path) -> None:
    """The second answers NaN for all clips of a chunk but the first."""
    run = run_of(unlabelled, tmp_path, "'fakes:NotFinite'")
    small.label(run)
    told = list[RoundReport]()
    training.train(run, told.append)
    plan = Plan.of(run)
    planned = sum(len(rows) for rows in plan.rows("train"))
    trained = sum(0 in rows for rows in plan.rows("train"))
    assert 0 < trained < planned
    assert told[-1].left_out == run.train.epochs * (planned - trained)
    assert f"{told[-1].left_out} left out" in training.round_line(told[-1])
