"""`python -m vkd.supervisor VERB RUN ...`: a job's entry point. It starts the command, and again when it died: Ray tries no job again."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

FINAL = (0, 2, 4, 130)  # done, the user must edit something, the budget is spent, interrupted: another start would change nothing
BY_SIGNAL = 128  # as a shell, 128 + n stands for signal n
PR_SET_PDEATHSIG = 1
LOOK_S = 0.1


@dataclass(frozen=True)
class Policy:
    """How often in a row a command is started again, and after what wait, which doubles. One that lived `long_life_s` got somewhere."""

    max_restarts: int = 10
    first_wait_s: float = 5.0
    max_wait_s: float = 300.0
    long_life_s: float = 600.0


class Supervisor:
    """Runs a command until it ends for good; SIGTERM and SIGINT are passed on to it, and it is not started again then."""

    def __init__(self, command: Sequence[str], policy: Policy) -> None:
        self.command, self.policy = command, policy
        self.driver: subprocess.Popen[bytes] | None = None
        self.stop_signal: int | None = None

    def run(self) -> int:
        """The exit code of the last driver, 128 + n when signal n ended it."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})  # Ray's processes block SIGINT
        restarts = 0
        while True:
            started_s = time.monotonic()
            code = self._start()
            if code in FINAL or self.stop_signal is not None:
                return code
            restarts = 0 if time.monotonic() - started_s >= self.policy.long_life_s else restarts
            if restarts == self.policy.max_restarts:
                _say(f"the driver {_how(code)}; {restarts} restarts in a row did not help, so it stays ended")
                return code
            wait_s = min(self.policy.first_wait_s * 2**restarts, self.policy.max_wait_s)
            restarts += 1
            _say(f"the driver {_how(code)}; starting it again in {wait_s:g} s (restart {restarts} of {self.policy.max_restarts})")
            self._sleep(wait_s)
            if self.stop_signal is not None:
                return BY_SIGNAL + self.stop_signal

    def _start(self) -> int:
        # in this process group: Ray kills the group when the job's own actor dies
        self.driver = subprocess.Popen(self.command, preexec_fn=_end_with_parent)
        if self.stop_signal is not None:  # it came before there was a driver
            self.driver.send_signal(self.stop_signal)
        code = self.driver.wait()
        return code if code >= 0 else BY_SIGNAL - code

    def _pass_on(self, signum: int, frame: object) -> None:
        self.stop_signal = signum
        if self.driver is not None:
            self.driver.send_signal(signum)

    def _sleep(self, wait_s: float) -> None:
        until_s = time.monotonic() + wait_s
        while self.stop_signal is None and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(LOOK_S, left_s))


def _end_with_parent() -> None:
    """A supervisor that is killed takes its driver along: nobody else would end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _how(code: int) -> str:
    names = {BY_SIGNAL + signum: signum.name for signum in signal.Signals}
    return f"was killed by {names[code]}" if code in names else f"ended with exit code {code}"


def _say(text: str) -> None:
    print(f"vkd supervisor: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m vkd.supervisor", description="Run a vkd command; start it again when it died.")
    parser.add_argument("--max-restarts", type=int, default=Policy.max_restarts, help="in a row (%(default)s)")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="VERB RUN ...", help="the command")
    given = parser.parse_args()
    if not given.words:
        parser.error("name a command, such as label RUN")
    os.environ["PYTHONUNBUFFERED"] = "1"
    sys.exit(Supervisor([sys.executable, "-m", "vkd", *given.words], Policy(max_restarts=given.max_restarts)).run())


if __name__ == "__main__":
    main()
