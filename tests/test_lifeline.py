"""A driver ends with one line when its cluster has gone, and goes on while it only is slow."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DRIVER = """
import sys, time
from vkd import lifeline
lifeline.PERIOD_S = 0.05
with lifeline.watched(sys.argv[1], ("127.0.0.1", int(sys.argv[2]))):
    print("watched", flush=True)
    sys.stdin.readline()
print("over", flush=True)
"""


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "raylet"))
        listener.listen(1)  # nobody accepts: those who connect are let in by the system, or wait
        yield listener


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        yield listener


@pytest.fixture
def driver(raylet: socket.socket, head: socket.socket) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", DRIVER, raylet.getsockname(), str(head.getsockname()[1])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watched\n"
        yield process
        process.kill()


@pytest.mark.parametrize(("gone", "told"), [("raylet", "this node's Ray process has ended"), ("head", "the Ray head at 127.0.0.1:")])
def test_what_has_gone_is_told_in_one_line(gone: str, told: str, request: pytest.FixtureRequest, driver: subprocess.Popen[str]) -> None:
    request.getfixturevalue(gone).close()
    assert driver.wait(60) == 1
    out, err = driver.communicate()
    assert out == ""
    assert err.startswith(f"vkd: {told}") and err.count("\n") == 1
    assert "run the same command again" in err


def test_a_busy_cluster_is_there(driver: subprocess.Popen[str]) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(3)  # many periods, in which both queues have long been full
    out, err = driver.communicate("\n", timeout=60)
    assert (driver.returncode, out, err) == (0, "over\n", "")
