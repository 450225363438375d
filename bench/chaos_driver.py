"""The command that the chaos benchmarks run over and over, as a process of the cluster that they kill."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import finish
from raylets import Cluster

VKD = Path(sys.executable).with_name("vkd")


def under_fire(chaos: Callable[[Path, argparse.Namespace], dict[str, Any]], options: argparse.Namespace) -> None:
    """Run a benchmark in a folder of its own, and print what it found; whatever ends it, nothing is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="vkd-chaos-"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped"))  # through what follows
    try:
        finish(chaos(folder, options), options.json)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """A `vkd` command, started again whenever it has ended."""

    def __init__(self, cluster: Cluster, words: Sequence[str], log: Path) -> None:
        self.cluster, self.words, self.log = cluster, words, log
        self.starts = self.tracebacks = 0
        self.ends: Counter[str] = Counter()
        self.process: subprocess.Popen[bytes] | None = None

    def keep_going(self) -> bool:
        """Start it when it does not run; whether it ended with success."""
        if self.process is not None:
            if (code := self.process.poll()) is None:
                return False
            self._note(code)
            if code == 0:
                return True
        self.starts += 1
        words = [str(VKD), *self.words]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.cluster.environment, start_new_session=True
            )
        return False

    def next(self, words: Sequence[str]) -> None:
        """Another command, once this one has ended with success."""
        self.words, self.process = words, None

    def wait_for_end(self, timeout_s: float) -> bool:
        """Whether it has ended by itself; else it is killed."""
        assert self.process is not None
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False
        return True

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def _note(self, code: int) -> None:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        line = next((line for line in reversed(lines) if line.startswith("vkd: ")), "")
        self.tracebacks += any("Traceback" in line for line in lines)
        if code:
            self.ends[f"{code}: {line[:200]}" if line else str(code)] += 1
            print(f"    driver ended with {code}: {line or lines[-1:]}", flush=True)
