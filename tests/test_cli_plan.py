"""The table of prices, and the limits of a run, as the command line takes them."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from vkd import cli_plan
from vkd.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "cluster" / "prices.yaml"


def test_the_shipped_prices_are_read() -> None:
    prices = cli_plan.read_prices(str(SHIPPED))
    assert set(prices.per_h) == {"head", "decode", "teacher", "student"} and prices.currency == "USD"
    assert all(
        0 < price["spot"] < price["on_demand"] and price["used"] in (price["spot"], price["on_demand"]) for price in prices.per_h.values()
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read the prices"),
        ("a: [", "is not YAML"),
        ("currency: USD", "is no table of prices: 'groups'"),
        ("- 1", "is no table of prices"),
        ("{groups: {decode: {instance: big}}, instances: {}}", "is no table of prices: 'big'"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        cli_plan.read_prices(str(path))
    assert str(path) in str(caught.value) and caught.value.action


def test_a_limit_of_cost_needs_prices() -> None:
    with pytest.raises(ConfigError, match="needs to know what nodes cost"), cli_plan.limits(Mock(), None, 10.0, None):
        pass


@pytest.mark.parametrize(("seconds", "text"), [(5, "5.0 s"), (89, "89.0 s"), (100, "1.7 min"), (7200, "2.0 h"), (200_000, "2.3 d")])
def test_times_are_read_by_people(seconds: float, text: str) -> None:
    assert cli_plan._time(seconds) == text
