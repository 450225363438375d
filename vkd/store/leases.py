"""Who works on a label set right now: one small file a driver, with a heartbeat. Advice for sharing work, never safety.

Two drivers that do the same chunk cost time and harm nothing: either file is complete and valid.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from vkd.errors import StorageError
from vkd.store import files

FOLDER = "leases"
BEAT_S, STALE_S = 15.0, 60.0
Item = TypeVar("Item")


@contextmanager
def held(label_set_uri: str) -> Iterator[int]:
    """Hold a lease while inside; gives the number of other drivers that work on the set now."""
    folder = files.join(label_set_uri, FOLDER)
    others = len(live(label_set_uri))
    mine, ended = files.join(folder, f"{uuid.uuid4().hex}.json"), threading.Event()
    _beat(mine)
    heart = threading.Thread(target=_keep_beating, args=(mine, ended), daemon=True)
    heart.start()
    try:
        yield others
    finally:
        ended.set()
        heart.join(BEAT_S)
        with suppress(StorageError):
            files.delete(mine)


def live(label_set_uri: str) -> list[str]:
    """Names of the leases whose heart beat lately."""
    folder, now_s = files.join(label_set_uri, FOLDER), time.time()
    return [name for name in files.list_names(folder) if now_s - _last_beat_s(files.join(folder, name)) < STALE_S]


def in_turn(items: Sequence[Item], num_others: int) -> list[Item]:
    """The same items from another place on, far from where others began: 0, 1/2, 1/4, 3/4, ... of the way, then around.

    >>> in_turn("abcdefgh", 1)
    ['e', 'f', 'g', 'h', 'a', 'b', 'c', 'd']
    """
    share, step, number = 0.0, 0.5, num_others
    while number:  # van der Corput's sequence
        share += step * (number % 2)
        step, number = step / 2, number // 2
    start = int(share * len(items))
    return [*items[start:], *items[:start]]


def _keep_beating(uri: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(StorageError):  # only advice
            _beat(uri)


def _beat(uri: str) -> None:
    files.put(uri, json.dumps({"beat_s": time.time(), "host": socket.gethostname(), "pid": os.getpid()}).encode())


def _last_beat_s(uri: str) -> float:
    """When a driver last said that it works; 0 when the file is gone or says nothing, or its process on this machine has ended."""
    try:
        told = json.loads(files.read(uri))
        ended = told["host"] == socket.gethostname() and not os.path.exists(f"/proc/{int(told['pid'])}")
        return 0.0 if ended else float(told["beat_s"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0.0
