"""The window between labelling and training: what it keeps, whom it lets go on, and reading that waits for a commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from vkd import window
from vkd.errors import LabelsMissing
from vkd.run import Run
from vkd.stages import Job
from vkd.store.labelset import LabelSet
from vkd.window import Awaited, Key, Taken, Window

pytestmark = pytest.mark.timeout(60)
SHARD = "shard"


def key_of(number: int, alias: str = "teacher") -> Key:
    from vkd.rounds import Chunk

    return Key(alias, 0, Chunk(SHARD, number))


class LocalLink:
    """A window in this process."""

    def __init__(self, of: Window) -> None:
        self.window = of

    def take(self, key: Key) -> tuple[Taken, bytes | None]:
        taken = self.window.take(key)
        return taken, next(iter(taken.held), None)

    def commit(self, key: Key, round_number: int, data: bytes) -> None:
        self.window.commit(key, round_number, [data], len(data))

    def wait_for_turn(self, round_number: int) -> None:
        while not self.window.may_start(round_number):
            time.sleep(0.01)

    def trained(self, round_number: int) -> None:
        self.window.trained(round_number)


@given(st.lists(st.tuples(st.sampled_from(["commit", "trained"]), st.integers(0, 5), st.integers(1, 60)), max_size=40))
def test_a_window_never_holds_more_than_it_may(acts: list[tuple[str, int, int]]) -> None:
    found, newest, sizes = Window(max_bytes=100), -1, dict[Key, int]()
    for number, (act, round_number, size) in enumerate(acts):
        if act == "trained":
            found.trained(round_number)
            newest = max(newest, round_number)
        else:
            found.commit(key_of(number), round_number, [size], size)
            sizes[key_of(number)] = size
        held = {key: taken.held for key in sizes if (taken := found.take(key)).held}
        assert all(found.take(key).committed for key in sizes)
        assert found.num_bytes == sum(sizes[key] for key in held) <= 100
        assert found.num_bytes <= found.peak_bytes <= 100
    found.trained(9)
    assert found.num_bytes == 0 and not any(found.take(key).held for key in sizes)


def test_what_is_trained_is_not_kept_again() -> None:
    found = Window(max_bytes=100)
    found.trained(3)
    found.commit(key_of(0), 3, ["late"], 4)
    assert found.take(key_of(0)) == Taken(True, (), False)


def test_labelling_leads_by_a_bounded_number_of_rounds() -> None:
    found = Window(max_bytes=0, lead_rounds=2)
    assert [found.may_start(n) for n in range(5)] == [True, True, True, False, False]
    found.trained(1)
    assert [found.may_start(n) for n in range(6)] == [True] * 5 + [False]
    assert all(Window(max_bytes=0).may_start(n) for n in (0, 10**9))


def test_labelling_goes_on_out_of_turn_when_training_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that was lost with its node is made again behind those that wait for their turn."""
    now_s = [100.0]
    monkeypatch.setattr(window.time, "monotonic", lambda: now_s[0])
    found = Window(max_bytes=0, lead_rounds=1)
    assert not found.may_start(7)
    found.take(key_of(0))
    now_s[0] += window.STARVED_S + 1
    assert not found.may_start(7)  # nobody has asked lately
    found.take(key_of(0))
    assert found.may_start(7)
    found.commit(key_of(1), 0, [], 0)
    assert not found.may_start(7)


@pytest.fixture
def filling(unlabelled: Run, tmp_path: Path) -> tuple[Job, Window, Awaited]:
    """A labelling that has not begun, and a set that waits for it."""
    from dataclasses import replace

    found = Window(max_bytes=10**9)
    job = replace(small.job_of(small.changed(unlabelled, f"labels.store={tmp_path}")), link=LocalLink(found))
    return job, found, Awaited(job.store, job.specs["teacher"], LocalLink(found))


def label_item(job: Job, number: int) -> None:
    from vkd.teaching import Teach

    Teach(job, "teacher", 1, last=True)(small.decoded(job, number))


def later(act: Callable[..., Any], *arguments: Any) -> threading.Timer:
    timer = threading.Timer(0.3, act, arguments)
    timer.start()
    return timer


@pytest.mark.parametrize("max_bytes", [10**9, 0])
def test_reading_waits_for_the_commit(filling: tuple[Job, Window, Awaited], max_bytes: int) -> None:
    job, found, awaited = filling
    found.max_bytes = max_bytes
    timer = later(label_item, job, 1)
    table = awaited.read(0, job.items[1].chunk)
    timer.join()
    assert table.equals(LabelSet.open(job.store, awaited.spec).read(0, job.items[1].chunk))
    assert bool(found.handed_over_bytes) == bool(max_bytes)


def test_reading_finds_what_nobody_told_of(filling: tuple[Job, Window, Awaited], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "LOOK_S", 0.2)
    job, found, awaited = filling
    monkeypatch.setattr(found, "commit", lambda *_: None)
    label_item(job, 0)
    assert awaited.read(0, job.items[0].chunk).num_rows
    timer = later(label_item, job, 2)
    assert awaited.read(0, job.items[2].chunk).num_rows
    timer.join()


def test_labelling_that_ended_is_told(filling: tuple[Job, Window, Awaited]) -> None:
    job, found, awaited = filling
    label_item(job, 0)
    found.ended = True
    assert awaited.read(0, job.items[0].chunk).num_rows
    with pytest.raises(LabelsMissing, match="labelling ended without chunk"):
        awaited.read(0, job.items[1].chunk)


def test_who_no_longer_wants_it_stops_waiting(filling: tuple[Job, Window, Awaited]) -> None:
    job, _, awaited = filling
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(awaited.read, 0, job.items[0].chunk)
        awaited.stopped.set()
        assert isinstance(reading.exception(10), LabelsMissing)


def test_decoding_waits_for_its_turn(filling: tuple[Job, Window, Awaited]) -> None:
    job, found, _ = filling
    found.lead_rounds = 1
    job = type(job)(**(vars(job) | {"items": [item._replace(round=5) for item in job.items]}))
    timer = later(found.trained, 4)
    started_s = time.monotonic()
    small.decoded(job, 0)
    assert time.monotonic() - started_s > 0.2
    timer.join()
