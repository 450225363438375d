"""A guard's child whose decoder does what a clip's name says: sleep for ever, crash, take all memory, lie, or decode as usual."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePath

import numpy as np

from vkd.clips import Clip, Sampling
from vkd.errors import StorageError, VideoError
from vkd.video import child
from vkd.video.access import METER, Access
from vkd.video.decode import decode_clip

SEEN: list[str] = []


def misbehave(clip: Clip, samplings: Sequence[Sampling], backend: str, access: Access) -> list[np.ndarray]:
    """The clip's name says what happens, and with `.auto` at its end that it happens to the first decoder only."""
    name, _, tried = PurePath(clip.uri).name.partition(".")
    SEEN.append(name)
    if tried != "auto" or backend == "auto":
        if name == "sleeps":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            time.sleep(10_000)
        if name == "segfaults":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "aborts":
            os.abort()
        if name == "exits":
            os._exit(7)
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "allocates":
            held = [np.empty(1 << 24) for _ in range(10_000)]  # the limit is on address space: nothing need be touched
            raise AssertionError(f"{len(held)} times 128 MiB")
        if name == "harmed" and len(SEEN) > 1:  # what the clip before it left behind
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "enomem":
            raise VideoError("out_of_memory", "Cannot allocate memory", where=clip.uri)
        lie(name)
        if name == "unreachable":
            raise StorageError("503", where=clip.uri, action="wait", passing=False)
        if name == "slow_storage":
            with METER.request(None):
                time.sleep(3.0)
    return decode_clip(replace(clip, uri=os.environ["VKD_STUB_CLIP"]), samplings, backend, access)


def lie(name: str) -> None:
    """What a process that a video has taken over may do to its parent."""
    connection_fd, memory_fd = (int(text) for text in sys.argv[1:3])
    if name == "babbles":
        os.write(connection_fd, struct.pack("!i", 6) + b"[[[[[[")
    if name == "nests":
        os.write(connection_fd, struct.pack("!i", 20_000) + b"[" * 20_000)
    if name == "stammers":
        os.write(connection_fd, struct.pack("!i", 100) + b"{")
    if name == "spoils_clock":
        METER.clock[0], METER.clock[1] = float("nan"), -1.0
    if name == "waits_for_ever":
        METER.clock[1] = time.monotonic() - 1.0
    if name in ("babbles", "nests", "stammers", "spoils_clock", "waits_for_ever"):
        time.sleep(10_000)
    if name == "shrinks":
        with suppress(PermissionError):
            os.ftruncate(memory_fd, 0)


if __name__ == "__main__":
    child.decode_clip = misbehave
    child.main()
