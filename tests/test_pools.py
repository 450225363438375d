from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vkd.pools import map_in


def test_results_come_in_the_order_of_the_items_and_progress_counts_up() -> None:
    told: list[tuple[int, int]] = []
    assert map_in(ThreadPoolExecutor(3), lambda x: x * x, range(7), lambda done, total: told.append((done, total))) == [
        x * x for x in range(7)
    ]
    assert told == [(done, 7) for done in range(1, 8)]


def test_nothing_is_no_work() -> None:
    assert map_in(ThreadPoolExecutor(1), str, []) == []


def test_the_first_error_cancels_what_has_not_begun() -> None:
    begun, hold = [], threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise OSError("disk")
        hold.wait(5)

    def progress(done: int, total: int) -> None:
        raise AssertionError("nothing was done")

    threading.Timer(0.2, hold.set).start()
    with pytest.raises(OSError, match="disk"):
        map_in(ThreadPoolExecutor(1), work, range(50), progress)
    assert len(begun) < 50
