"""A guard's child whose decoder does what a clip's name says: sleep for ever, crash, take all memory, or decode as usual."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

import numpy as np

from vkd.clips import Clip, Sampling
from vkd.errors import StorageError
from vkd.video import child
from vkd.video.access import METER, Access
from vkd.video.decode import decode_clip


def misbehave(clip: Clip, samplings: Sequence[Sampling], backend: str, access: Access) -> list[np.ndarray]:
    """The clip's name says what happens, and with `.auto` at its end that it happens to the first decoder only."""
    name, _, tried = PurePath(clip.uri).name.partition(".")
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
            held = [np.ones(1 << 24) for _ in range(10_000)]
            raise AssertionError(f"{len(held)} times 128 MiB")
        if name == "unreachable":
            raise StorageError("503", where=clip.uri, action="wait", passing=False)
        if name == "slow_storage":
            with METER.request(None):
                time.sleep(3.0)
    return decode_clip(replace(clip, uri=os.environ["VKD_STUB_CLIP"]), samplings, backend, access)


if __name__ == "__main__":
    child.decode_clip = misbehave
    child.main()
