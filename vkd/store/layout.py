"""Where chunks lie: file names in a shard's folder, and which file of a chunk counts.

Of one chunk's files the highest attempt wins, and `all.parquet` before an equal attempt.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import NamedTuple

from vkd.store import chunkfile, files
from vkd.store.chunkfile import ChunkInfo, Stamp

DOCUMENT, ALL = "labelset.json", "all.parquet"
_CHUNK_NAME = re.compile(r"chunk-(\d{5,})\.a(\d+)\.parquet")
_VIEW_NAME = re.compile(r"view=(\d+)")


class Source(NamedTuple):
    """Where a chunk lies: its attempt and the file in the shard's folder; stamp is size and time of a compacted file."""

    attempt: int
    name: str
    stamp: Stamp | None = None


class ShardFiles(NamedTuple):
    """One listing of a shard's folder: (index, attempt) of each chunk file by its name, and what the compacted file holds."""

    chunks: dict[str, tuple[int, int]]
    compacted: list[ChunkInfo]
    stamp: Stamp | None

    @property
    def sources(self) -> dict[int, Source]:
        """The file that counts of each chunk."""
        sources = {info.index: Source(info.attempt, ALL, self.stamp) for info in self.compacted}
        for name, (index, attempt) in self.chunks.items():
            if index not in sources or attempt > sources[index].attempt:
                sources[index] = Source(attempt, name)
        return sources

    @property
    def superseded(self) -> list[str]:
        """Files of which nothing counts any more."""
        counted = {source.name for source in self.sources.values()}
        return [name for name in [*self.chunks, *([ALL] if self.compacted else [])] if name not in counted]


def folder_of(uri: str, view: int, shard: str) -> str:
    """A shard's folder in a label set."""
    return files.join(uri, f"view={view}", shard)


def shards_of(uri: str, view: int) -> list[str]:
    """The shards that have a folder."""
    return files.list_names(files.join(uri, f"view={view}"))


def folders_of(uri: str) -> list[tuple[int, str, str]]:
    """(view, shard, folder) of every shard's folder in a label set."""
    return [(view, shard, folder_of(uri, view, shard)) for view in views_of(uri) for shard in shards_of(uri, view)]


def views_of(uri: str) -> list[int]:
    """Numbers of the views that have a folder."""
    return sorted(int(found[1]) for name in files.list_names(uri) if (found := _VIEW_NAME.fullmatch(name)))


def chunk_name(index: int, attempt: int) -> str:
    """The name of a chunk's own file."""
    return f"chunk-{index:05d}.a{attempt}.parquet"


def is_chunk(name: str) -> bool:
    """Whether a file name is that of a chunk's own file."""
    return _CHUNK_NAME.fullmatch(name) is not None


def list_shard(folder: str, *, ask: bool = False) -> ShardFiles:
    """What lies in a shard's folder: one listing, and the footer of the compacted file when there is one.

    With `ask` the compacted file is asked for by its name when it is not listed: a listing may be late.
    """
    for _ in range(3):  # the compacted file may be taken away after the listing
        listed, compacted = files.list_infos(folder), list[ChunkInfo]()
        stamp = next(((size, time_s) for name, size, time_s in listed if name == ALL), None)
        unlisted = stamp is None
        if unlisted and ask:
            stamp = (0, time.time())  # like no other, so that its footer is read now
        with suppress(FileNotFoundError):
            compacted = [] if stamp is None else chunkfile.infos(files.join(folder, ALL), stamp)
            break
        if unlisted:
            break
    found = ((name, _CHUNK_NAME.fullmatch(name)) for name, _, _ in listed)
    return ShardFiles({name: (int(match[1]), int(match[2])) for name, match in found if match}, compacted, stamp)
