"""A video's bytes, wherever they are: a local path, the whole object in memory, or a file object that reads ranges."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fsspec.implementations.local import LocalFileSystem

from vkd.errors import StorageError, VideoError
from vkd.store import files
from vkd.store.files import UNREACHABLE
from vkd.video.access import METER, Access

BLOCK_BYTES = 4 << 20
MAX_BLOCKS = 16  # of one open object: the memory that range reads may hold
EVERYTHING = Access()


@contextmanager
def opened(uri: str, access: Access = EVERYTHING) -> Iterator[str | BinaryIO]:
    """A local path, a `BytesIO` of a small object, or a file object that reads blocks on demand.

    What goes wrong inside the block while bytes are read is told apart too: VideoError (`missing`, `empty`, `not_allowed`) is
    about this video, StorageError about the storage.
    """
    with _read_errors(uri):
        source = _open(access.resolve(uri), uri, access)
        try:
            yield source
        finally:
            if not isinstance(source, str):
                source.close()


def _open(resolved: str, uri: str, access: Access) -> str | BinaryIO:
    fs, path = files.filesystem(resolved)
    with METER.request(access.max_requests_per_s):
        info = fs.info(path)
    if info["type"] == "directory":
        raise VideoError("not_a_video", "it is a folder", where=uri)
    size_bytes = info["size"]
    if size_bytes == 0:
        raise VideoError("empty", "the file has no bytes", where=uri)
    if isinstance(fs, LocalFileSystem):
        if not os.path.isfile(path):
            raise VideoError("not_a_video", "it is no regular file", where=uri)
        if not os.access(path, os.R_OK):
            raise PermissionError("the file cannot be read")
        return str(path)
    if size_bytes is None or size_bytes <= access.max_inline_bytes:
        with METER.request(access.max_requests_per_s):
            data = fs.cat_file(path)
        METER.num_bytes += len(data)
        if size_bytes is not None and len(data) != size_bytes:
            raise OSError(errno.EIO, f"{len(data)} of {size_bytes} bytes came")
        return io.BytesIO(data)
    blocks = {"block_size": BLOCK_BYTES, "cache_type": "blockcache", "cache_options": {"maxblocks": MAX_BLOCKS}}
    handle: BinaryIO = fs.open(path, "rb", **blocks)
    _meter_ranges(handle, access)
    return handle


def _meter_ranges(handle: BinaryIO, access: Access) -> None:
    """Count the ranges that a file object fetches; its cache calls this function for each block that it lacks."""
    cache = getattr(handle, "cache", None)  # files in memory have none
    if cache is None:
        return
    fetch = cache.fetcher

    def metered(start: int, end: int) -> bytes:
        with METER.request(access.max_requests_per_s):
            data: bytes = fetch(start, end)
        METER.num_bytes += len(data)
        return data

    cache.fetcher = metered


@contextmanager
def _read_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError("missing", "there is no such file", where=uri) from error
    except UNREACHABLE as error:
        if getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP):
            raise VideoError("missing", f"no file can be there: {error}", where=uri) from error
        action = "check that the storage can be reached and read, then run the same command again"
        raise StorageError(f"{type(error).__name__}: {error}", where=uri, action=action, passing=files.passes(uri, error)) from error
