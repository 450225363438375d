"""A run that may take only so many hours, or cost only so much: it is stopped as by Ctrl-C, and what is committed is kept."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from vkd.errors import BudgetSpent
from vkd.forecast import HOUR_S, Prices
from vkd.store import files

LOOK_S = 5.0
SPENT = "spent.json"  # in the output: of all starts of the run together


@dataclass(frozen=True)
class Budget:
    """At most so many hours of the clock, and at most this cost, of all starts of a run together. None: without limit."""

    max_hours: float | None = None
    max_cost: float | None = None
    prices: Prices | None = None


@dataclass
class Spent:
    """What all starts of a run took together."""

    hours: float = 0.0
    cost: float = 0.0

    def over(self, budget: Budget) -> str | None:
        """What is used up, in words."""
        if budget.max_hours is not None and self.hours >= budget.max_hours:
            return f"{self.hours:.2f} hours are over (--max-hours {budget.max_hours:g})"
        if budget.max_cost is not None and self.cost >= budget.max_cost:
            currency = budget.prices.currency if budget.prices else ""
            return f"{self.cost:.2f} {currency} are spent (--max-cost {budget.max_cost:g})"
        return None


@contextmanager
def limited(output: str, budget: Budget, nodes: Callable[[], Mapping[str, int]], look_s: float = LOOK_S) -> Iterator[None]:
    """End the body by a SIGINT to this process once the budget is spent; `nodes` counts those of each group.

    Raises BudgetSpent then, and at once when nothing is left of it.
    """
    if budget.max_hours is None and budget.max_cost is None:
        yield
        return
    spent, ended, over = _before(output), threading.Event(), list[str]()
    if (what := spent.over(budget)) is not None:
        raise _stop(what, output)

    def watch() -> None:
        last_s = time.monotonic()
        while not ended.wait(look_s):
            now_s = time.monotonic()
            hours, last_s = (now_s - last_s) / HOUR_S, now_s
            spent.hours += hours
            per_h = {group: price["used"] for group, price in budget.prices.per_h.items()} if budget.prices else {}
            spent.cost += hours * sum(count * per_h.get(group, 0.0) for group, count in nodes().items())
            files.put(files.join(output, SPENT), json.dumps(vars(spent)).encode())
            if (what := spent.over(budget)) is not None:
                over.append(what)
                os.kill(os.getpid(), signal.SIGINT)
                return

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if over:
            raise _stop(over[0], output) from None
        raise
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


def _before(output: str) -> Spent:
    try:
        told = files.read_json(files.join(output, SPENT), ("hours", "cost"))
    except FileNotFoundError:
        return Spent()
    return Spent(float(told["hours"]), float(told["cost"]))


def _stop(what: str, output: str) -> BudgetSpent:
    return BudgetSpent(
        f"stopped: {what}; what is committed is kept", where=output, action="raise the limit and run the same command to go on"
    )
