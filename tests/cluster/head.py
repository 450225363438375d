"""A real Ray head with a job server on free ports of this machine; in the end nothing of it is left, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fault_proxy
import harness

START_TIMEOUT_S = 90.0
OBJECT_STORE_BYTES = 200_000_000
RAY = (sys.executable, "-m", "ray.scripts.scripts")  # not `ray`: which Python it starts would be a matter of PATH


@dataclass
class Head:
    """A head that answers at `url`."""

    command: harness.Command
    url: str

    def pids(self, *words: str) -> list[int]:
        """Its processes, those of jobs included, whose command line has these words in a row."""
        wanted = b"\0".join(word.encode() for word in words)
        return [pid for pid in self.command.left_behind() if wanted in _command_line(pid)]


@contextmanager
def started(token: str = "") -> Iterator[Head]:
    """A head of two CPUs, whose jobs see this process's environment; with a token, it answers those only who have it."""
    folder = Path(tempfile.mkdtemp(prefix="vkd"))  # short: the names of sockets may have 107 characters
    dashboard = fault_proxy.free_port()
    free = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port", "dashboard-agent-grpc-port")
    ports = [f"--{name}={fault_proxy.free_port()}" for name in free]
    options = ["--head", "--block", "--num-cpus=2", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    try:
        with harness.vkd("start", *options, *ports, program=RAY) as command:
            head = Head(command, f"http://127.0.0.1:{dashboard}")
            give_up_s = time.monotonic() + START_TIMEOUT_S
            while not _answers(head.url, token):
                assert command.process.poll() is None, command.process.communicate()
                assert time.monotonic() < give_up_s
                time.sleep(0.2)
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str, token: str) -> bool:
    """Whether jobs are taken: the job server has an agent to hand them to."""
    request = urllib.request.Request(f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            nodes = json.loads(answer.read())["data"]["summary"]
    except (OSError, urllib.error.HTTPError, KeyError, ValueError):
        return False
    return bool(nodes)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def environment(port: int) -> dict[str, str]:
    """What the head and those who submit to it need: storage at this port, and the programs of this interpreter first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    places = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    auth = {"RAY_AUTH_MODE": "disabled", "PATH": path, "PYTHONPATH": os.pathsep.join(places)}
    return fault_proxy.environment(port) | auth
