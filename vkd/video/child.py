"""The child process of a guard: decodes what it is asked and puts frames into shared memory. It may end in any way."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vkd.clips import Clip, View
from vkd.errors import StorageError, VideoError
from vkd.video.access import METER
from vkd.video.decode import decode_clip, probe, probe_full
from vkd.video.settings import NUM_SLOTS, OUT_OF_MEMORY, Settings

PR_SET_PDEATHSIG = 1
MAX_STDERR_BYTES = 1 << 20
MAX_WHAT_CHARS = 2000


class Child:
    """Serves one guard until it goes away."""

    def __init__(self, connection: Connection, memory_fd: int, settings: Settings) -> None:
        self.connection, self.settings = connection, settings
        self.memory = mmap.mmap(memory_fd, 0)
        METER.clock = np.frombuffer(self.memory, np.float64, 2)  # type: ignore[assignment]  # two numbers, seen by the guard

    def serve(self) -> None:
        self._say({})
        while True:
            request = json.loads(self.connection.recv_bytes())
            if request["op"] == "decode":
                self._decode(request)
            else:
                self._say(self._told(lambda request=request: self._probe(request)))  # type: ignore[misc]

    def _decode(self, request: Mapping[str, Any]) -> None:
        """Clip after clip; a slot is written again only when the guard has taken what was in it."""
        for number, told in enumerate(request["clips"]):
            if number >= NUM_SLOTS:
                self.connection.recv_bytes()
            self._say(self._told(lambda number=number, told=told: self._into_slot(number, told, request["backend"])))  # type: ignore[misc]
        for _ in request["clips"][:NUM_SLOTS]:
            self.connection.recv_bytes()

    def _into_slot(self, number: int, told: Mapping[str, Any], backend: str) -> dict[str, Any]:
        clip = clip_from(told)
        decoded = decode_clip(clip, self.settings.samplings, backend, self.settings.access)
        for slot, frames in zip(self.settings.views_of(self.memory, number % NUM_SLOTS), decoded, strict=True):
            slot[:] = frames
        return {}

    def _probe(self, request: Mapping[str, Any]) -> dict[str, Any]:
        ask = probe_full if request["op"] == "probe_full" else probe
        return {"info": asdict(ask(request["uri"], self.settings.access))}

    def _told(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        started_s = time.process_time()
        try:
            answer = work()
        except VideoError as error:
            if error.kind == "out_of_memory":  # an earlier video may have taken it: a fresh child tells
                raise MemoryError from error
            answer = {"kind": error.kind, "what": error.what[:MAX_WHAT_CHARS], "permanent": error.permanent}
        except StorageError as error:
            answer = {"storage": error.what[:MAX_WHAT_CHARS], "action": error.action, "passing": error.passing}
        return answer | {"cpu_s": time.process_time() - started_s}

    def _say(self, answer: Mapping[str, Any]) -> None:
        self.connection.send_bytes(json.dumps(answer).encode())


def clip_from(told: Mapping[str, Any]) -> Clip:
    """A clip from its JSON."""
    view = told["view"]
    return Clip(**{**told, "view": View(**{**view, "crop": tuple(view["crop"])})})


def _confine(max_memory_bytes: int, parent_pid: int) -> None:
    """Bound memory and output of this process, which ends with its parent."""
    resource.setrlimit(resource.RLIMIT_DATA, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_STDERR_BYTES, MAX_STDERR_BYTES))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    end_with(parent_pid)


def end_with(parent_pid: int) -> None:
    """End this process when its parent ends, and not by Ctrl-C, which is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            sys.exit()


def main() -> None:
    connection_fd, memory_fd, parent_pid, settings = sys.argv[1:]
    told = Settings.from_json(settings)
    _confine(told.limits.max_memory_bytes, int(parent_pid))
    try:
        Child(Connection(int(connection_fd)), int(memory_fd), told).serve()
    except (EOFError, ConnectionError):  # the guard has gone
        sys.exit()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
