"""A rank that hangs: nobody else notices it, since its process is alive. Its own watch ends it, and the group starts anew."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 70
LOOKS_PER_LIMIT = 10


@contextmanager
def limited(limit_s: float, end: Callable[[int], object] = os._exit) -> Iterator[Callable[[], None]]:
    """Gives `beat`; when it is not called for `limit_s`, what every thread does is printed and the process ends.

    Ranks wait for each other in every step: when one hangs, those that wait for it end too, or it alone would never be found.
    """
    last_s, ended = [time.monotonic()], threading.Event()

    def beat() -> None:
        last_s[0] = time.monotonic()

    def watch() -> None:
        while not ended.wait(limit_s / LOOKS_PER_LIMIT):
            silent_s = time.monotonic() - last_s[0]
            if silent_s > limit_s:
                print(f"vkd: this rank made no step for {silent_s:.0f} s (compute.student.stalled_s); it ends", file=sys.stderr, flush=True)
                if sys.__stderr__ is not None:
                    faulthandler.dump_traceback(sys.__stderr__)
                end(EXIT_CODE)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield beat
    finally:
        ended.set()
        watcher.join()
