"""Where the time went: shares of each stage, the bound that the resources set, and what to scale."""

from __future__ import annotations

import pytest

from vkd.efficiency import Efficiency, Stage


def of(decode: Stage, teacher: Stage, student: Stage, wait_s: float) -> Efficiency:
    return Efficiency({"decode": decode, "teacher": teacher, "student": student}, 100.0, wait_s, 1000, num_cores=4)


def test_cores_that_are_full_are_what_lacks() -> None:
    found = of(Stage(4, 150, 140), Stage(2, 190, 180), Stage(1, 60, 60), wait_s=40)
    assert found.busy == pytest.approx({"decode": 0.375, "teacher": 0.95, "student": 0.6})
    assert found.share_of_bound == pytest.approx(0.95)
    assert (found.data_wait, found.to_scale) == (0.4, "cores")


@pytest.mark.parametrize(("teacher_s", "wait_s", "to_scale"), [(190, 80, "teacher"), (190, 5, "student"), (20, 80, "decode")])
def test_the_busiest_stage_is_scaled_while_the_student_waits(teacher_s: float, wait_s: float, to_scale: str) -> None:
    """A teacher on a GPU: its two actors are busy and need few cores."""
    found = of(Stage(1, 50, 50), Stage(2, teacher_s, 10), Stage(1, 20, 10), wait_s)
    assert found.to_scale == to_scale
    assert found.share_of_bound == pytest.approx(max(teacher_s / 200, 70 / 400))


def test_the_line_says_it_all() -> None:
    found = of(Stage(4, 150, 140), Stage(2, 190, 180), Stage(1, 60, 60), wait_s=40)
    assert found.line() == (
        "busy: decode 38%, teacher 95%, student 60%; data-wait 40%; 10.0 clips/s, 95% of what the resources allow; "
        "0.0 MB through the object store, nothing spilled; to go faster, scale: cores"
    )
    assert found.figures()["busy.teacher"] == pytest.approx(0.95)
