"""Time and money from measured costs, worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vkd.forecast import Forecast, Prices, StageCost, Work, money

PRICES = """
currency: USD
instances:
  cpu: {on_demand_per_h: 1.0, spot_per_h: 0.4}
  gpu: {on_demand_per_h: 4.0, spot_per_h: 1.5}
groups:
  head: {instance: cpu, spot: false}
  decode: {instance: cpu, spot: true}
  teacher: {instance: gpu, spot: true}
  student: {instance: gpu, spot: false}
storage_per_gb_month: 0.023
network_per_gb: 0.01
"""


def forecast(mode: str = "tee", to_label: int = 1000, epochs: float = 3, **changed: Any) -> Forecast:
    """Decode 4 x 0.2 s on 8 cores, teacher 2 x 0.4 s on GPUs, student 1 x 0.01 s."""
    decode = StageCost("decode", "decode", 4, 0.2, 0.2)
    teacher = StageCost("teacher", "teacher", 2, 0.4, 0.01)
    student = StageCost("student", "student", 1, 0.01, 0.005)
    cores = changed.get("cores", {"decode": 8.0, "teacher": 16.0, "student": 8.0})
    return Forecast([decode, teacher], student, Work(to_label, 900, epochs, mode, 4000.0, 10_000.0, 10), cores, 20.0)


def test_the_slowest_stage_decides() -> None:
    told = forecast()
    assert told.label_s == pytest.approx(200 + 2)  # 1000 x 0.4 / 2, and the first chunk's decoding
    assert told.epoch_s == pytest.approx(9)
    assert told.total_s == pytest.approx(20 + 202 + 2 * 9)
    assert told.bottleneck == "teacher" and told.balanced() == {"decode": 1, "teacher": 2}


def test_cores_of_a_group_decide_when_there_are_too_few() -> None:
    told = forecast(cores={"decode": 0.5, "teacher": 16.0, "student": 8.0})
    assert told.label_s == pytest.approx(402) and told.bottleneck == "cores of decode"


@pytest.mark.parametrize(("mode", "total_s"), [("stored", 20 + 202 + 27), ("live", 20 + 3 * 202), ("tee", 20 + 202 + 18)])
def test_a_mode_labels_once_or_each_epoch(mode: str, total_s: float) -> None:
    assert forecast(mode).total_s == pytest.approx(total_s)


def test_nothing_to_label_is_only_training() -> None:
    told = forecast(to_label=0)
    assert told.total_s == pytest.approx(20 + 27) and told.bottleneck == "student" and told.storage_bytes() == 0


def test_chunks_are_not_shared() -> None:
    """25 examples are 3 chunks, and two actors need two turns."""
    assert StageCost("teacher", "", 2, 0.4, 0.0).seconds(25, 10) == pytest.approx(2 * 10 * 0.4)
    assert StageCost("teacher", "", 2, 0.4, 0.0).seconds(5, 10) == pytest.approx(5 * 0.4)


@given(st.integers(1, 10**6), st.floats(0.1, 50))
def test_time_grows_with_the_work(to_label: int, epochs: float) -> None:
    assert forecast(to_label=to_label, epochs=epochs).total_s <= forecast(to_label=2 * to_label, epochs=epochs).total_s + 1e-9
    assert forecast(to_label=to_label, epochs=epochs).total_s <= forecast(to_label=to_label, epochs=epochs + 1).total_s + 1e-9


def test_groups_that_only_label_are_paid_until_labels_are_there() -> None:
    told, nodes = forecast(), {"head": 1, "decode": 2, "teacher": 2, "student": 1, "unknown": 7}
    costs = {cost.group: cost for cost in money(told, nodes, Prices.parse(yaml.safe_load(PRICES)))}
    assert set(costs) == {"head", "decode", "teacher", "student"}
    assert costs["teacher"].hours == pytest.approx(2 * 222 / 3600) and costs["student"].hours == pytest.approx(240 / 3600)
    assert costs["teacher"].cost == pytest.approx(costs["teacher"].hours * 1.5) == costs["teacher"].spot
    assert costs["student"].cost == pytest.approx(costs["student"].hours * 4.0) == costs["student"].on_demand
    assert math.isclose(costs["decode"].on_demand, costs["decode"].hours)
