"""Whether the Ray cluster of a driver is still there. Ray itself ends a driver without a word, a minute after its head has gone."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PERIOD_S = 5.0  # each look is a line in the log of the raylet
NUM_MISSES = 2  # of the driver's own node, whose objects are gone with it
HEAD_MISSES = 9  # 45 s: a head that keeps its state elsewhere may come back; after 60 s Ray ends the process
EXIT_CODE = 1


@contextmanager
def watched(raylet: str, head: tuple[str, int]) -> Iterator[None]:
    """While this lasts, the process ends with one clear line when its node's raylet (a socket's path) or the head does not answer."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(raylet, head, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(raylet: str, head: tuple[str, int], ended: threading.Event) -> None:
    raylet_misses = head_misses = 0
    while not ended.wait(PERIOD_S):
        raylet_misses = 0 if _answers(socket.AF_UNIX, raylet) else raylet_misses + 1
        head_misses = 0 if _answers(socket.AF_INET, head) else head_misses + 1
        if raylet_misses >= NUM_MISSES or head_misses >= HEAD_MISSES:
            _end("this node's Ray process has ended" if raylet_misses >= NUM_MISSES else f"the Ray head at {head[0]}:{head[1]} has gone")


def _answers(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    """Whether something listens. Slowness is no absence."""
    with socket.socket(family) as connection:
        connection.settimeout(PERIOD_S)
        try:
            connection.connect(address)
        except (TimeoutError, BlockingIOError):  # its queue is full
            return True
        except OSError:
            return False
    return True


def _end(what: str) -> None:
    """Nothing that waits for Ray in this process can be woken, so the process ends here."""
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr)  # a progress bar hides the cursor
    action = "start the cluster again, then run the same command again"
    print(f"vkd: {what}; what is committed is kept -> {action}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
