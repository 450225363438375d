"""A Ray cluster on one machine for the chaos benchmarks: a head without CPUs and worker nodes, started as subprocesses, killed by pid.

All that is started carries a mark in its environment, by which it is found again; nothing else is ever touched.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ray  # noqa: F401  # brings psutil along

from vkd.compute import GROUP_LABEL

import psutil  # isort: skip

MARK = "VKD_CHAOS"
RAY = Path(sys.executable).with_name("ray")
NUM_CPUS = 2
STARTED = "Ray runtime started"
START_TIMEOUT_S = 240.0
OBJECT_STORE_BYTES = 300_000_000
QUICK_TO_NOTICE = {  # that a node is gone; Ray's defaults take half a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


class Cluster:
    """The two nodes. `address` stays the same when the head is started anew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self._starts = folder, uuid.uuid4().hex, 0
        self.address = f"127.0.0.1:{_free_port()}"
        self._known: dict[int, psutil.Process] = {}
        self.head: subprocess.Popen[bytes] | None = None
        self.node: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For everything that belongs to this cluster, drivers included."""
        places = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]  # the first is that of chaos_teacher.py
        here = {"PYTHONPATH": os.pathsep.join(filter(None, places))}
        return os.environ | QUICK_TO_NOTICE | here | {MARK: self.mark, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": self.address}

    def start(self) -> None:
        """Head and node, ready for a driver; what is left of those before is killed first."""
        self.start_head()
        self.start_node()

    def start_head(self) -> None:
        """The head alone; what is left of the one before is killed first."""
        self.kill_all()
        port = self.address.rpartition(":")[2]
        words = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", f"--ray-client-server-port={_free_port()}"]
        self.head = self._start(words)

    def start_node(self) -> None:
        """A worker node, once it is ready."""
        self.node = self.new_node(NUM_CPUS)

    def new_node(self, num_cpus: int, group: str = "") -> subprocess.Popen[bytes]:
        """One more worker node, of a group, once it is ready."""
        labels = [f"--labels={GROUP_LABEL}={group}"] if group else []
        return self._start([f"--address={self.address}", f"--num-cpus={num_cpus}", *labels])

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """All processes of a worker node at once, as when its machine goes."""
        kill([p for p in self.processes() if _session(p.pid) == node.pid])
        node.wait()

    @property
    def head_pid(self) -> int:
        return self.head.pid if self.head is not None else -1

    def raylets(self) -> list[psutil.Process]:
        """The worker node's."""
        return [p for p in self.processes() if _words(p)[:1] and _words(p)[0].endswith("/raylet") and _session(p.pid) == self.node_pid]

    @property
    def node_pid(self) -> int:
        return self.node.pid if self.node is not None else -1

    def decode_children(self) -> list[psutil.Process]:
        """Decoder processes of the worker node's workers."""
        return [p for p in self.processes() if "vkd.video.child" in _words(p)]

    def teacher_actors(self) -> list[psutil.Process]:
        return [p for p in self.processes() if any("_TeachStage" in word for word in _words(p))]

    def train_workers(self) -> list[psutil.Process]:
        return [p for p in self.processes() if any("RayTrainWorker" in word for word in _words(p))]

    def processes(self) -> list[psutil.Process]:
        """All that carry the mark, what they started, and what did so when it was looked for before, if alive."""
        alive = {process.pid: process for process in psutil.process_iter()}
        ours = {pid for pid, process in self._known.items() if alive.get(pid) == process}  # the same pid, started at the same time
        ours |= {pid for pid in alive if self._marked(pid)}
        for pid in sorted(alive):  # some, such as Ray's agents, overwrite their environment with their title
            with suppress(psutil.Error):
                if alive[pid].ppid() in ours:
                    ours.add(pid)
        self._known = {pid: alive[pid] for pid in ours}
        return list(self._known.values())

    def _marked(self, pid: int) -> bool:
        try:
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # it has ended, or is not ours
            return False

    def kill_head(self) -> None:
        """GCS, raylet and all else of the head node at once."""
        kill([p for p in self.processes() if _session(p.pid) == self.head_pid])

    def kill_all(self) -> None:
        """Everything with the mark, until nothing is left."""
        while found := [p for p in self.processes() if _is_running(p)]:
            kill(found)
            for process in (self.head, self.node):
                if process is not None:
                    process.poll()
            time.sleep(0.05)

    def _start(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """`ray start` with its log. Raises RuntimeError with the log's end when it does not come up."""
        self._starts += 1
        log = self.folder / f"ray-{self._starts}.log"
        # a folder of its own for each head: Ray takes a file that a killed one left for a running cluster
        temp = f"--temp-dir={self.folder / f'r{self._starts}'}"
        common = ["--block", "--disable-usage-stats", "--include-log-monitor=false", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [str(RAY), "start", *words, *common, "--node-ip-address=127.0.0.1", temp],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while STARTED not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"ray start {' '.join(words)} does not come up: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.05)
        return process


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL each; those that have ended already do not matter."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _free_port() -> int:
    """A port below those that the system gives out by itself."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000")
