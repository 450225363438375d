"""Decoding in a child process: a video that hangs, crashes or fills the memory ends that child only, and is rejected.

One guard belongs to one thread. Frames come through shared memory, several clips a call; what is said beside them is JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from socket import socketpair
from typing import Any

import numpy as np

from vkd.clips import Clip
from vkd.errors import StorageError, VideoError, VkdError
from vkd.store import files
from vkd.video.container import VideoInfo
from vkd.video.fetch import FORBIDDEN
from vkd.video.settings import CLOCK_BYTES, MAX_DEADLINE_S, NUM_SLOTS, Settings, Views

CHILD = "vkd.video.child"
MAX_CLIPS = 1000  # of one child: decoders leak
STARTUP_S = 60.0
MAX_ANSWER_BYTES = 1 << 20
MAX_STARTS = 3
MAX_KILLED = 2  # tries of a clip whose child somebody else killed


class ChildEnded(VideoError):
    """The child died of a clip, or had to be killed. Kinds: `deadline`, `out_of_memory`, `crash`, `killed` (by somebody else)."""


class Guard:
    """One child, started when it is needed. `cpu_s` is what its children spent; `attempts` how often the last clip was tried."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cpu_s, self.attempts = 0.0, 0
        self._child: _Child | None = None

    def decode(self, clips: Sequence[Clip]) -> Iterator[Views | VideoError]:
        """Frames of each clip, in order, or why it cannot be used. Raises StorageError when storage stays away, or refuses all videos.

        A clip that ends the child is tried once more, by PyAV when the decoder may be chosen; both within its deadline.
        """
        refused: set[str] = set()
        for clip, answer in zip(clips, self._each(clips), strict=True):
            if isinstance(answer, VideoError) and answer.kind == FORBIDDEN:
                refused.add(clip.uri)
            yield answer
        if len(refused) > 1 and refused == {clip.uri for clip in clips}:
            action = "check the credentials and what they permit, then run the same command again"
            raise StorageError(f"access denied to all {len(refused)} videos of a chunk", where=clips[0].uri, action=action)

    def _each(self, clips: Sequence[Clip]) -> Iterator[Views | VideoError]:
        done = 0
        while done < len(clips):
            self.attempts = 1
            try:
                for answer in self._answers(clips[done:], self.settings.backend):
                    yield answer
                    done += 1
            except ChildEnded as ended:
                yield self._again(clips[done], ended)
                done += 1
            except StorageError as error:
                yield self._when_storage_answers(clips[done], error)
                done += 1

    def probe(self, uri: str, full: bool = False) -> VideoInfo:
        """What the header of a video says; `full` decodes all of it. Raises VideoError, StorageError when storage stays away."""
        op, deadline_s = ("probe_full", MAX_DEADLINE_S) if full else ("probe", self.settings.limits.deadline_s)

        def once() -> VideoInfo:
            with self._request({"op": op, "uri": uri}) as child:
                answer = child.answer(deadline_s, uri)
            return VideoInfo(**self._told(answer, uri)["info"])

        return files.patiently(once, uri)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __del__(self) -> None:
        self.close()

    def _answers(self, clips: Sequence[Clip], backend: str) -> Iterator[Views | VideoError]:
        with self._request({"op": "decode", "backend": backend, "clips": [asdict(clip) for clip in clips]}) as child:
            for number, clip in enumerate(clips):
                # a first try leaves half of the time to the second
                answer = child.answer(self.settings.limits.of(clip) / self.settings.num_tries, clip.uri)
                try:
                    self._told(answer, clip.uri)
                    views: Views | VideoError = [view.copy() for view in self.settings.views_of(child.memory, number % NUM_SLOTS)]
                except VideoError as error:
                    views = error
                child.say({"taken": number})
                yield views

    def _again(self, clip: Clip, ended: ChildEnded) -> Views | VideoError:
        """The second try; a child that somebody else killed says nothing about the clip, which is then tried as before."""
        for _ in range(MAX_KILLED if ended.kind == "killed" else self.settings.num_tries - 1):
            self.attempts += 1
            backend = self.settings.backend if ended.kind == "killed" else "pyav"
            try:
                return files.patiently(partial(self._answer, clip, backend), clip.uri)
            except ChildEnded as error:
                ended = error
        return ended

    def _when_storage_answers(self, clip: Clip, error: StorageError) -> Views | VideoError:
        try:
            return files.patiently(partial(self._answer, clip, self.settings.backend), clip.uri, error)
        except ChildEnded as ended:
            return self._again(clip, ended)

    def _answer(self, clip: Clip, backend: str) -> Views | VideoError:
        (answer,) = self._answers([clip], backend)
        return answer

    @contextmanager
    def _request(self, message: Mapping[str, Any]) -> Iterator[_Child]:
        """A child at work on a request; one that was left in the middle of it is of no more use."""
        if self._child is not None and (self._child.num_clips >= MAX_CLIPS or not self._child.alive):
            self.close()
        self._child = child = self._child or _started(self.settings)
        try:
            child.say(message)
            yield child
        except BaseException:
            self.close()
            raise

    def _told(self, answer: dict[str, Any], uri: str) -> dict[str, Any]:
        """The answer of a request that went well. Raises what the child says went wrong."""
        self.cpu_s += answer["cpu_s"]
        if "storage" in answer:
            raise StorageError(answer["storage"], where=uri, action=answer["action"], passing=answer["passing"])
        if "kind" in answer:
            raise VideoError(answer["kind"], answer["what"], where=uri, permanent=answer["permanent"])
        return answer


class _Child:
    """The process, its connection, and the memory that both see."""

    def __init__(self, settings: Settings) -> None:
        self.num_clips = 0
        num_bytes = CLOCK_BYTES + NUM_SLOTS * settings.slot_bytes
        memory_fd = os.memfd_create("vkd-frames")
        os.ftruncate(memory_fd, num_bytes)
        self.memory = mmap.mmap(memory_fd, num_bytes)
        self._clock = np.frombuffer(self.memory, np.float64, 2)
        ours, theirs = socketpair()
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the child
        self.process = subprocess.Popen(
            [sys.executable, "-m", CHILD, str(theirs.fileno()), str(memory_fd), str(os.getpid()), settings.to_json()],
            pass_fds=(theirs.fileno(), memory_fd),
            stdin=subprocess.DEVNULL,
            stdout=self.stderr,
            stderr=self.stderr,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        os.close(memory_fd)
        self.connection = Connection(ours.detach())
        try:
            self.answer(STARTUP_S, "")  # it says that it is ready
        except ChildEnded:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def say(self, message: Mapping[str, Any]) -> None:
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError:  # it has ended: the answer, which does not come, says of what
            return

    def answer(self, deadline_s: float, uri: str) -> dict[str, Any]:
        """The next answer. Raises ChildEnded; a deadline that storage takes is a StorageError."""
        started_s, waited_s = time.monotonic(), float(self._clock[0])
        self.num_clips += 1
        while True:
            now_s, since_s = time.monotonic(), float(self._clock[1])
            waiting_s = float(self._clock[0]) - waited_s + (now_s - since_s if since_s else 0.0)
            left_s = deadline_s - (now_s - started_s - waiting_s)
            if left_s <= 0:
                self.kill()
                raise ChildEnded("deadline", f"not decoded within {now_s - started_s:.1f} s", where=uri, permanent=False)
            if self._has_answered(min(left_s, 1.0)):
                break
        try:
            told: dict[str, Any] = json.loads(self.connection.recv_bytes(MAX_ANSWER_BYTES))
        except (EOFError, OSError, ValueError):
            raise self._ended(uri) from None
        return told

    def _has_answered(self, timeout_s: float) -> bool:
        try:
            return self.connection.poll(timeout_s)
        except OSError:
            return True  # reading tells

    def _ended(self, uri: str) -> ChildEnded:
        """Why the child is gone."""
        if not self._exits():
            self.process.kill()
        code = self.process.wait()
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - 2000))
        words = " ".join(self.stderr.read().decode(errors="replace").split())[-200:]
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if "bad_alloc" in words or "MemoryError" in words or "Cannot allocate memory" in words:
            return ChildEnded("out_of_memory", f"the decoder needs more memory than it may have: {words}", where=uri)
        if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            return ChildEnded("killed", f"the decoder was ended from outside by {name}", where=uri, permanent=False)
        return ChildEnded("crash", f"the decoder ended by {name}{': ' if words else ''}{words}", where=uri)

    def _exits(self) -> bool:
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.stderr.close()


def _started(settings: Settings) -> _Child:
    """A child that is ready. Raises VkdError when none starts: that is no video's fault."""
    for _ in range(MAX_STARTS):
        try:
            return _Child(settings)
        except ChildEnded as error:
            why = error.what
    raise VkdError(f"the decoder's process does not start: {why}", where="compute.decode", action="mend the installation, or report this")


_HERE = threading.local()


def here(settings: Settings) -> Guard:
    """The guard of this thread: the same one for the same settings. It ends with its thread."""
    guard: Guard | None = getattr(_HERE, "guard", None)
    if guard is None or guard.settings != settings:
        if guard is not None:
            guard.close()
        _HERE.guard = guard = Guard(settings)
    return guard
