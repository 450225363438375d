"""A video's bytes, wherever they are: a local path, the whole object in memory, or a file object that reads ranges."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from fsspec.implementations.local import LocalFileSystem

from vkd.errors import StorageError, VideoError
from vkd.store import files
from vkd.store.files import UNREACHABLE
from vkd.video.sources import resolve_uri

MAX_INLINE_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
MAX_BLOCKS = 16  # of one open object: the memory that range reads may hold


@contextmanager
def opened(uri: str, max_inline_bytes: int = MAX_INLINE_BYTES) -> Iterator[str | BinaryIO]:
    """A local path, a `BytesIO` of an object of at most `max_inline_bytes`, or a file object that reads blocks on demand.

    What goes wrong inside the block while bytes are read is told apart too: VideoError (`missing`, `empty`) is about this
    video, StorageError about the storage.
    """
    with _read_errors(uri):
        source = _open(resolve_uri(uri), uri, max_inline_bytes)
        try:
            yield source
        finally:
            if not isinstance(source, str):
                source.close()


def _open(resolved: str, uri: str, max_inline_bytes: int) -> str | BinaryIO:
    fs, path = files.filesystem(resolved)
    info = fs.info(path)
    if info["type"] == "directory":
        raise VideoError("not_a_video", "it is a folder", where=uri)
    size_bytes = info["size"]
    if size_bytes == 0:
        raise VideoError("empty", "the file has no bytes", where=uri)
    if isinstance(fs, LocalFileSystem):
        if not os.access(path, os.R_OK):
            raise PermissionError("the file cannot be read")
        return str(path)
    if size_bytes is None or size_bytes <= max_inline_bytes:
        return io.BytesIO(fs.cat_file(path))
    handle: BinaryIO = fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="blockcache", cache_options={"maxblocks": MAX_BLOCKS})
    return handle


@contextmanager
def _read_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise VideoError("missing", "there is no such file", where=uri) from error
    except UNREACHABLE as error:
        action = "check that the storage can be reached and read, then run the same command again"
        raise StorageError(f"{type(error).__name__}: {error}", where=uri, action=action) from error
