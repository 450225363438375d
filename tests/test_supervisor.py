"""The entry point of a job: drivers that end, die, or are stopped, as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOON = "first_wait_s=0.01, max_wait_s=0.02"
KILL_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIG{})"
LIVE_LONG = "import time; time.sleep(60)"


def start(folder: Path, *drivers: str, policy: str = SOON) -> subprocess.Popen[str]:
    """A supervisor whose n-th driver runs the n-th program; the last one's again after that. Each start is noted in a file."""
    for number, program in enumerate(drivers):
        (folder / f"{number}.py").write_text(program)
    driver = folder / "driver.py"
    driver.write_text(
        "import os, runpy\n"
        f"starts = open({str(folder / 'starts')!r}, 'a+')\n"
        "print(os.getpid(), file=starts, flush=True)\n"
        "starts.seek(0)\n"
        f"number = min(len(starts.readlines()), {len(drivers)}) - 1\n"
        f"runpy.run_path({str(folder)!r} + f'/{{number}}.py')\n"
    )
    program = (
        "import sys\nfrom vkd.supervisor import Policy, Supervisor\n"
        f"sys.exit(Supervisor([sys.executable, {str(driver)!r}], Policy({policy})).run())"
    )
    words = [sys.executable, "-c", program]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True)


def starts(folder: Path) -> list[int]:
    """Process ids of the drivers that were started."""
    path = folder / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def finish(supervisor: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code, and the supervisor's own lines."""
    stderr = supervisor.communicate(timeout=30)[1]
    return supervisor.returncode, [line for line in stderr.splitlines() if line.startswith("vkd supervisor: ")]


def until(happened: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


@pytest.mark.parametrize("code", [0, 2, 4, 130])
def test_what_ended_for_good_is_not_started_again(tmp_path: Path, code: int) -> None:
    assert finish(start(tmp_path, f"raise SystemExit({code})")) == (code, [])
    assert len(starts(tmp_path)) == 1


def test_what_died_is_started_again(tmp_path: Path) -> None:
    drivers = [KILL_ITSELF.format("KILL"), "raise SystemExit(1)", "raise SystemExit(3)", KILL_ITSELF.format("SEGV"), "raise SystemExit(0)"]
    code, lines = finish(start(tmp_path, *drivers))
    assert (code, len(starts(tmp_path))) == (0, 5)
    told = ["was killed by SIGKILL", "ended with exit code 1", "ended with exit code 3", "was killed by SIGSEGV"]
    assert [line.split("; ")[0].removeprefix("vkd supervisor: the driver ") for line in lines] == told
    assert "starting it again in 0.01 s (restart 1 of 10)" in lines[0]


@pytest.mark.parametrize(
    ("driver", "code", "how"), [("raise SystemExit(3)", 3, "exit code 3"), (KILL_ITSELF.format("KILL"), 137, "SIGKILL")]
)
def test_restarts_in_a_row_have_a_limit_and_the_real_exit_code_is_passed_on(tmp_path: Path, driver: str, code: int, how: str) -> None:
    ended, lines = finish(start(tmp_path, driver, policy=f"max_restarts=2, {SOON}"))
    assert (ended, len(starts(tmp_path))) == (code, 3)
    assert how in lines[-1]
    assert "2 restarts in a row did not help" in lines[-1]


def test_waits_double_up_to_a_limit(tmp_path: Path) -> None:
    _, lines = finish(start(tmp_path, "raise SystemExit(1)", policy="max_restarts=4, first_wait_s=0.01, max_wait_s=0.05"))
    assert [line.split("again in ")[1].split(" s")[0] for line in lines[:-1]] == ["0.01", "0.02", "0.04", "0.05"]


def test_a_driver_that_lived_long_starts_the_count_anew(tmp_path: Path) -> None:
    lived = "import time; time.sleep(0.3); raise SystemExit(1)"
    drivers = ["raise SystemExit(1)", lived, "raise SystemExit(1)", "raise SystemExit(0)"]
    code, lines = finish(start(tmp_path, *drivers, policy=f"max_restarts=2, long_life_s=0.3, {SOON}"))
    assert code == 0
    assert ["restart 1" in line for line in lines] == [True, True, False]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_driver_and_nothing_is_left(tmp_path: Path, signum: signal.Signals) -> None:
    supervisor = start(tmp_path, LIVE_LONG)
    until(lambda: starts(tmp_path))
    supervisor.send_signal(signum)
    code, lines = finish(supervisor)
    assert (code, lines) == (128 + signum, [])
    assert not [pid for pid in starts(tmp_path) if Path(f"/proc/{pid}").exists()]


def test_the_code_of_a_stopped_driver_is_passed_on(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    handle = "import pathlib, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    supervisor = start(tmp_path, f"{handle}pathlib.Path({str(ready)!r}).touch()\ntime.sleep(60)")
    until(ready.exists)
    supervisor.send_signal(signal.SIGTERM)
    assert finish(supervisor) == (7, [])
    assert len(starts(tmp_path)) == 1


def test_a_stop_while_it_waits_ends_at_once(tmp_path: Path) -> None:
    supervisor = start(tmp_path, "raise SystemExit(1)", policy="first_wait_s=60")
    assert supervisor.stderr is not None
    waits = supervisor.stderr.readline()
    began_s = time.monotonic()
    supervisor.send_signal(signal.SIGTERM)
    code, lines = finish(supervisor)
    assert (code, lines, len(starts(tmp_path))) == (143, [], 1)
    assert "starting it again in 60 s" in waits
    assert time.monotonic() - began_s < 5


def test_a_killed_supervisor_takes_its_driver_along(tmp_path: Path) -> None:
    supervisor = start(tmp_path, LIVE_LONG)
    until(lambda: starts(tmp_path))
    (driver,) = starts(tmp_path)
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.communicate()
    until(lambda: not _alive(driver))


def test_its_command_is_vkd_of_the_same_interpreter() -> None:
    """A user's mistake ends it with one line and exit code 2."""
    words = [sys.executable, "-m", "vkd.supervisor", "--max-restarts", "0", "label", "nowhere.yaml", "--limit", "5%"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "nowhere.yaml: cannot read the run file" in done.stderr


def test_it_needs_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "vkd.supervisor"], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 2
    assert "name a command" in done.stderr


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
