"""The parent's end of a decoding child: its start, its answers within a deadline, and why it ended.

Nothing that the child does may hold the parent, whatever a video made of it: every wait here is bounded.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from socket import SO_RCVTIMEO, SO_SNDTIMEO, SOL_SOCKET, socketpair
from typing import Any

import numpy as np

from vkd.errors import StorageError, VideoError
from vkd.store import files
from vkd.video.settings import CLOCK_BYTES, NUM_SLOTS, OUT_OF_MEMORY, Settings

STARTUP_S = 60.0
MESSAGE_S = 10  # a message that has begun is all there, or taken, within this
EXIT_S = 5.0  # a killed process is gone within this, unless a dead disk holds it
MAX_ANSWER_BYTES = 1 << 20


class ChildEnded(VideoError):
    """The child died of a clip, or had to be killed. Kinds: `deadline`, `out_of_memory`, `crash`, `killed` (by somebody else).

    `alone`: the child had worked on nothing else before, which could have harmed it.
    """

    alone = True


class Process:
    """The process, its connection, and the memory that both see."""

    def __init__(self, settings: Settings, module: str) -> None:
        self.num_answers = 0
        rate = settings.access.max_requests_per_s
        self._longest_wait_s = files.PATIENCE_S + (0.0 if rate is None else 1 / rate)
        self.memory, memory_fd = _shared_memory(CLOCK_BYTES + NUM_SLOTS * settings.slot_bytes)
        self._clock = np.frombuffer(self.memory, np.float64, 2)
        ours, theirs = socketpair()
        for option in (SO_RCVTIMEO, SO_SNDTIMEO):
            ours.setsockopt(SOL_SOCKET, option, struct.pack("ll", MESSAGE_S, 0))
        self.connection = Connection(ours.detach())
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the child
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(memory_fd), str(os.getpid()), settings.to_json()],
                pass_fds=(theirs.fileno(), memory_fd),
                stdin=subprocess.DEVNULL,
                stdout=self.stderr,
                stderr=self.stderr,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise ChildEnded("crash", str(error)) from error
        finally:
            theirs.close()
            os.close(memory_fd)
        try:
            self.answer(STARTUP_S, "")  # it says that it is ready
        except BaseException:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def say(self, message: Mapping[str, Any]) -> None:
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError:  # it has ended, or does not listen: the answer, which does not come, says of what
            return

    def answer(self, deadline_s: float, uri: str) -> dict[str, Any]:
        """The next answer. Raises ChildEnded, and StorageError when one request to storage takes for ever."""
        started_s = time.monotonic()
        waited_s, _ = self._waited_s(started_s)
        self.num_answers += 1
        while True:
            now_s = time.monotonic()
            waited_now_s, wait_s = self._waited_s(now_s)
            left_s = deadline_s - (now_s - started_s) + max(waited_now_s - waited_s, 0.0)
            if self._has_answered(max(0.0, min(left_s, 1.0))):
                return self._heard(uri)
            if left_s <= 0:
                self.kill()
                raise self._blamed(ChildEnded("deadline", f"not decoded within {now_s - started_s:.1f} s", where=uri, permanent=False))
            if wait_s > self._longest_wait_s:
                self.kill()
                action = "check that the storage can be reached, then run the same command again"
                raise StorageError(f"no answer for {wait_s:.0f} s", where=uri, action=action, passing=True)

    def _waited_s(self, now_s: float) -> tuple[float, float]:
        """How long the child has waited for storage in all, and in the request that it is in. A spoilt clock counts as none."""
        since_s = float(self._clock[1])  # first: the child adds a wait to the sum before it ends it
        wait_s = now_s - since_s if 0 < since_s < now_s else 0.0
        waited_s = float(self._clock[0]) + wait_s
        return (waited_s, wait_s) if 0 <= waited_s < np.inf else (0.0, wait_s)

    def _has_answered(self, timeout_s: float) -> bool:
        try:
            return self.connection.poll(timeout_s)
        except OSError:
            return True  # reading tells

    def _heard(self, uri: str) -> dict[str, Any]:
        try:
            told = json.loads(self.connection.recv_bytes(MAX_ANSWER_BYTES))
        except (EOFError, OSError):
            raise self._ended(uri) from None
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            self.kill()
            raise self._blamed(ChildEnded("crash", "the decoder's process answered what is no answer", where=uri))
        return told

    def _ended(self, uri: str) -> ChildEnded:
        """Why the child is gone."""
        try:
            code = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._blamed(ChildEnded("deadline", "the decoder's process stopped answering", where=uri, permanent=False))
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - 2000))
        words = " ".join(self.stderr.read().decode(errors="replace").split())[-200:]
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if code == OUT_OF_MEMORY or (code == -signal.SIGABRT and "bad_alloc" in words):
            return self._blamed(ChildEnded("out_of_memory", "the decoder needs more memory than it may have", where=uri))
        if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            return ChildEnded("killed", f"the decoder was ended from outside by {name}", where=uri, permanent=False)
        return self._blamed(ChildEnded("crash", f"the decoder ended by {name}{': ' if words else ''}{words}", where=uri))

    def _blamed(self, ended: ChildEnded) -> ChildEnded:
        ended.alone = self.num_answers <= 2  # the first says that it is ready
        return ended

    def kill(self) -> None:
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        self.connection.close()
        self.stderr.close()
        self._clock = np.zeros(2)
        with suppress(BufferError):  # somebody looks at a slot
            self.memory.close()


def _shared_memory(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Memory and its descriptor; sealed, since a child that made it shorter would crash its parent."""
    memory_fd = os.memfd_create("vkd-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory_fd, num_bytes)
    fcntl.fcntl(memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return mmap.mmap(memory_fd, num_bytes), memory_fd
