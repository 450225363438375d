"""A notice that a node goes: it is heard beside training, and asks for a save now and then until the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import pytest

from vkd import preemption
from vkd.preemption import Notice


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "LOOK_S", 0.01)


def comes_true(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_notice_of_another_node_is_none() -> None:
    with closing(Notice({"a", "b"}, lambda: {"c"})) as notice:
        assert not comes_true(notice, within_s=0.2)


def test_it_asks_again_while_the_node_is_there() -> None:
    draining: set[str] = set()
    with closing(Notice({"a", "b"}, lambda: draining, save_every_s=0.1)) as notice:
        assert not notice()
        draining.add("b")
        assert comes_true(notice) and not notice()
        assert comes_true(notice)
        draining.clear()
        time.sleep(0.2)
        notice()
        assert not comes_true(notice, within_s=0.3)


def test_a_head_that_does_not_answer_says_nothing() -> None:
    def broken() -> set[str]:
        raise OSError

    with closing(Notice({"a"}, broken)) as notice:
        assert not comes_true(notice, within_s=0.1)


def test_without_ray_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption.ray, "is_initialized", lambda: False)  # other tests of this process may have one
    assert preemption.nodes_of_ranks() == set()
    with closing(Notice(set())) as notice:
        assert not notice()
