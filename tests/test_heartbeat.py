"""A rank that makes no step ends itself; one that works or waits for data does not."""

from __future__ import annotations

import threading
import time

import pytest

from vkd import heartbeat


def test_silence_ends_the_process_and_says_where_it_hung(capfd: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with heartbeat.limited(0.2, end):
        assert ended.wait(10)
    assert codes == [heartbeat.EXIT_CODE]
    told = capfd.readouterr().err
    assert "made no step" in told and "stalled_s" in told


def test_beats_keep_it_alive() -> None:
    codes: list[int] = []
    with heartbeat.limited(2.0, codes.append) as beat:
        for _ in range(25):
            beat()
            time.sleep(0.1)
    assert codes == []
