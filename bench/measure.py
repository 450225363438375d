"""What the benchmarks share: where real clips are, CPU and memory of a process tree, ratios with their spread, printing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported

try:
    import psutil
except ModuleNotFoundError:
    import ray  # noqa: F401  # brings it along

    import psutil  # isort: skip

SHARED_MEMORY = "/dev/shm"


def corpus() -> Path:
    """The folder of real clips: VKD_CORPUS, or shared/corpus beside the repository."""
    place = Path(os.environ.get("VKD_CORPUS", Path(__file__).resolve().parents[2] / "shared" / "corpus"))
    if not place.is_dir():
        sys.exit(f"no clips at {place}: set VKD_CORPUS to a folder with wagon/, weizmann/ and natural/")
    return place


def arguments(description: str, **options: Any) -> argparse.Namespace:
    """Parsed options, `--json` among them; each keyword is an option with its default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print every figure on a line of its own, then the JSON object."""
    for name, value in result.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    if as_json:
        print(json.dumps(result), flush=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of repeats."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "repeats": len(values)}


class Sampler(threading.Thread, ABC):
    """Looks at something every `period_s` while its body runs."""

    def __init__(self, period_s: float) -> None:
        super().__init__(daemon=True)
        self.period_s, self._ended = period_s, threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(self.period_s):
            self.sample()

    @abstractmethod
    def sample(self) -> None: ...


class Watch(Sampler):
    """Samples this process and all its children: CPU seconds of each (also of those that ended), peak shared memory, peak USS.

    Without `memory` no USS: asking for it costs time.
    """

    def __init__(self, period_s: float = 0.5, memory: bool = True) -> None:
        super().__init__(period_s)
        self.memory = memory
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._shared_start_bytes = shutil.disk_usage(SHARED_MEMORY).used
        self.peak_uss_bytes = self.peak_shared_bytes = 0
        self.sample()
        self._before_s = self.cpu_s

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the tree so far."""
        return sum(self._cpu_s.values())

    @property
    def spent_cpu_s(self) -> float:
        """CPU seconds since the watch began."""
        return self.cpu_s - self._before_s

    @property
    def peak_bytes(self) -> int:
        """Peak of private memory plus what the object store took."""
        return self.peak_uss_bytes + self.peak_shared_bytes

    def sample(self) -> None:
        me = psutil.Process()
        uss = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._cpu_s[process.pid, process.create_time()] = times.user + times.system
                uss += process.memory_full_info().uss if self.memory else 0
            except psutil.Error:
                continue
        self.peak_uss_bytes = max(self.peak_uss_bytes, uss)
        self.peak_shared_bytes = max(self.peak_shared_bytes, shutil.disk_usage(SHARED_MEMORY).used - self._shared_start_bytes)
