"""Between labelling and training: which chunks are committed, the bytes of the nearest ones, and how far training is.

The store is the truth. What is here saves reading it, and tells one side of the other: bytes that do not fit into the window, or
are lost with their process, are read from the store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from vkd.errors import LabellingEnded, LabelsMissing
from vkd.rounds import Chunk
from vkd.store import chunkfile
from vkd.store.labelset import LabelSet, LabelSetSpec

POLL_S = 0.1
LOOK_S = 5.0  # between two looks at the store for a chunk of which nothing is heard
STARVED_S = 10.0  # training waits and nothing was committed: then labelling need not wait for its turn
ASKED_S = 2.0  # who still waits asks again within this time


class Key(NamedTuple):
    """One view of one chunk in one label set."""

    alias: str
    view: int
    chunk: Chunk


class Taken(NamedTuple):
    """An answer to training: whether the chunk is committed, what holds its bytes (at most one, none when they are not kept),
    and whether labelling is over."""

    committed: bool
    held: Sequence[Any]
    ended: bool


@dataclass
class Window:
    """Keeps at most `max_bytes`, and lets labelling lead training by `lead_rounds` (None: by any number). For many threads."""

    max_bytes: int
    lead_rounds: int | None = None
    num_bytes: int = 0
    peak_bytes: int = 0
    handed_over_bytes: int = 0
    ended: bool = False
    _held: dict[Key, tuple[int, Sequence[Any], int]] = field(default_factory=dict)  # round, what holds the bytes, how many
    _committed: set[Key] = field(default_factory=set)
    _round: int = 0
    _asked_s: float = float("-inf")
    _committed_s: float = field(default_factory=lambda: time.monotonic())
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, key: Key, round_number: int, held: Sequence[Any], num_bytes: int) -> None:
        """A chunk is committed; its bytes are kept when they fit, which `trained` makes them do."""
        with self._lock:
            self._committed.add(key)
            self._committed_s = time.monotonic()
            if round_number >= self._round and self.num_bytes + num_bytes <= self.max_bytes and key not in self._held:
                self._held[key] = round_number, held, num_bytes
                self.num_bytes += num_bytes
                self.peak_bytes = max(self.peak_bytes, self.num_bytes)

    def take(self, key: Key) -> Taken:
        """What training asks for; what is not committed yet it waits for."""
        with self._lock:
            _, held, num_bytes = self._held.get(key, (0, (), 0))
            self.handed_over_bytes += num_bytes
            if key not in self._committed:
                self._asked_s = time.monotonic()
            return Taken(key in self._committed, held, self.ended)

    def trained(self, round_number: int) -> None:
        """A round is trained: what is held for it goes."""
        with self._lock:
            self._round = max(self._round, round_number + 1)
            for key in [key for key, (number, _, _) in self._held.items() if number < self._round]:
                self.num_bytes -= self._held.pop(key)[2]

    def may_start(self, round_number: int) -> bool:
        """Whether labelling may begin a chunk of this round: it is near enough, or training starves (a lost block is made again)."""
        with self._lock:
            now_s = time.monotonic()
            starved = now_s - self._asked_s < ASKED_S and now_s - self._committed_s > STARVED_S
            return self.lead_rounds is None or round_number <= self._round + self.lead_rounds or starved


class Link(Protocol):
    """The window as workers reach it, wherever it is."""

    def take(self, key: Key) -> tuple[Taken, bytes | None]: ...
    def commit(self, key: Key, round_number: int, data: bytes) -> None: ...
    def wait_for_turn(self, round_number: int) -> None: ...
    def trained(self, round_number: int) -> None: ...


class Awaited:
    """A label set that is being filled: reading a chunk waits for its commit."""

    def __init__(self, store: str, spec: LabelSetSpec, link: Link) -> None:
        self.store, self.spec, self.link = store, spec, link
        self._set: LabelSet | None = None
        self.stopped = threading.Event()  # by who no longer wants what it asked for

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process nobody stops it but who made it there."""
        return Awaited, (self.store, self.spec, self.link)

    def read(self, view: int, chunk: Chunk, columns: Sequence[str] | None = None) -> pa.Table:
        """One chunk: all of it, or from the store these columns. Raises LabellingEnded when labelling ended without it."""
        looked_s = float("-inf")
        while not self.stopped.is_set():
            taken, data = self.link.take(Key(self.spec.alias, view, chunk))
            if data is not None:
                return chunkfile.parse(data, chunk.index, f"{self.spec.name}, chunk {chunk.index} of shard {chunk.shard}")
            if taken.committed or taken.ended or time.monotonic() - looked_s > LOOK_S:
                looked_s = time.monotonic()
                table = self._stored(view, chunk, columns)
                if table is not None:
                    return table
            if taken.ended:
                break
            time.sleep(POLL_S)
        what = f"labelling ended without chunk {chunk.index} of shard {chunk.shard}, view {view}"
        raise LabellingEnded(what, where=self.spec.name, action="run the same command again")

    def _stored(self, view: int, chunk: Chunk, columns: Sequence[str] | None) -> pa.Table | None:
        self._set = self._set or LabelSet.find(self.store, self.spec)
        with suppress(LabelsMissing):
            return self._set and self._set.read(view, chunk, columns)
        return None
