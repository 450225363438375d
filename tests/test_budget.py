"""Hours and money that a run may take: counted over all its starts, and ended as by Ctrl-C."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from test_forecast import PRICES

from vkd.budget import SPENT, Budget, limited
from vkd.errors import BudgetSpent
from vkd.forecast import HOUR_S, Prices

LOOK_S = 0.02


def spend(output: Path, budget: Budget, nodes: dict[str, int], seconds: float = 10.0) -> None:
    with limited(str(output), budget, lambda: nodes, LOOK_S):
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(0.01)


def test_without_limits_nothing_is_counted(tmp_path: Path) -> None:
    spend(tmp_path, Budget(), {}, seconds=0.1)
    assert not list(tmp_path.iterdir())


def test_hours_end_a_run_and_its_next_start(tmp_path: Path) -> None:
    budget = Budget(max_hours=0.3 / HOUR_S)
    with pytest.raises(BudgetSpent, match=r"--max-hours.*what is committed is kept") as caught:
        spend(tmp_path, budget, {})
    assert caught.value.exit_code == 4 and "raise the limit" in caught.value.action
    started_s = time.monotonic()
    with pytest.raises(BudgetSpent):
        spend(tmp_path, budget, {})
    assert time.monotonic() - started_s < 5  # nothing is left of it: the body does not begin


def test_money_is_nodes_times_their_prices(tmp_path: Path) -> None:
    prices = Prices.parse(yaml.safe_load(PRICES))
    with pytest.raises(BudgetSpent, match=r"USD are spent \(--max-cost"):
        spend(tmp_path, Budget(max_cost=0.2 * 3.5 / HOUR_S, prices=prices), {"teacher": 2, "decode": 1, "head": 0, "": 9})
    told = json.loads((tmp_path / SPENT).read_text())
    assert told["cost"] == pytest.approx(told["hours"] * (2 * 1.5 + 0.4))


def test_ctrl_c_stays_ctrl_c(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), limited(str(tmp_path), Budget(max_hours=1), dict, LOOK_S):
        raise KeyboardInterrupt
