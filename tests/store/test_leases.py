"""Leases: who is alive, and where each driver begins."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vkd.errors import StorageError
from vkd.store import files, leases


def test_drivers_see_each_other_while_they_hold_a_lease(tmp_path: Path) -> None:
    with leases.held(str(tmp_path)) as first, leases.held(str(tmp_path)) as second:
        assert (first, second) == (0, 1)
        assert len(leases.live(str(tmp_path))) == 2
    assert leases.live(str(tmp_path)) == []


def test_a_driver_that_died_counts_no_more(tmp_path: Path) -> None:
    (tmp_path / leases.FOLDER).mkdir()
    now_s, here = time.time(), socket.gethostname()
    ended = subprocess.Popen(["true"])
    ended.wait()
    told = {"silent": (now_s - 2 * leases.STALE_S, "far", 1), "ended": (now_s, here, ended.pid), "alive": (now_s, "far", 1)}
    for name, values in told.items():
        (tmp_path / leases.FOLDER / f"{name}.json").write_text(json.dumps(dict(zip(("beat_s", "host", "pid"), values, strict=True))))
    (tmp_path / leases.FOLDER / "damaged.json").write_text("{")
    assert leases.live(str(tmp_path)) == ["alive.json"]


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.01)
    with leases.held(str(tmp_path)):
        (path,) = (tmp_path / leases.FOLDER).glob("*.json")
        before = path.read_text()
        while path.read_text() == before:
            time.sleep(0.01)


def test_a_store_that_refuses_leases_does_not_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(leases, "BEAT_S", 0.01)
    with leases.held(str(tmp_path)):
        monkeypatch.setattr(files, "put", broken)
        monkeypatch.setattr(files, "delete", broken)
        time.sleep(0.05)


@given(st.integers(0, 40), st.integers(0, 9))
def test_every_driver_has_all_of_the_work(num_items: int, num_others: int) -> None:
    order = leases.in_turn(range(num_items), num_others)
    assert sorted(order) == list(range(num_items))
    assert num_others or order == list(range(num_items))


def test_drivers_begin_far_from_each_other() -> None:
    assert [leases.in_turn(range(16), others)[0] for others in range(8)] == [0, 8, 4, 12, 2, 10, 6, 14]
