"""Files anywhere fsspec reaches: whole reads, atomic writes, listings. Nothing else writes results to storage."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from aiohttp import ClientError
from botocore.exceptions import BotoCoreError
from fsspec.implementations.local import LocalFileSystem

from vkd.errors import StorageError

UNREACHABLE = (OSError, BotoCoreError, ClientError)  # s3fs and http raise the last two, which are no OSError
# S3-compatible servers answer a range with the checksum of the whole object; label files carry digests of their own
S3_OPTIONS = {"config_kwargs": {"response_checksum_validation": "when_required"}}


def join(root: str, *parts: str) -> str:
    """`root/part/part`, for paths and uris alike."""
    return "/".join([root.rstrip("/"), *parts])


def put(uri: str, data: bytes) -> None:
    """Write a whole file so that readers see all of it or nothing.

    Locally: a temporary name in the same folder, fsync, rename. On object stores: one PUT.
    """
    fs, path = filesystem(uri)
    with storage_errors(uri):
        if not isinstance(fs, LocalFileSystem):
            try:
                fs.pipe_file(path, data)
            except FileNotFoundError as error:
                raise StorageError(str(error), where=uri, action="make the bucket, or name another place") from error
            return
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise


def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes of a file, all or a range (a negative start counts from the end). Raises FileNotFoundError when there is none."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        data: bytes = fs.cat_file(path, start=start, end=end)
        return data


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        return bool(fs.exists(path))


def list_names(folder: str) -> list[str]:
    """Sorted names of what lies directly in a folder; empty when there is no such folder. Temporary files are left out."""
    fs, path = filesystem(folder)
    with storage_errors(folder):
        fs.invalidate_cache()
        try:
            entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return sorted(name for name in names if not name.startswith(".") and name)


def list_infos(folder: str) -> list[tuple[str, int, float]]:
    """(name, size in bytes, modification time in seconds since 1970) of the files directly in a folder, by name; as `list_names`."""
    fs, path = filesystem(folder)
    with storage_errors(folder):
        fs.invalidate_cache()
        try:
            entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    found = []
    for entry in entries:
        name, time = entry["name"].rstrip("/").rsplit("/", 1)[-1], entry.get("mtime") or entry.get("LastModified") or entry.get("created")
        if entry["type"] == "file" and name and not name.startswith("."):
            found.append((name, int(entry["size"]), float(time.timestamp() if hasattr(time, "timestamp") else time or 0)))
    return sorted(found)


def delete(uri: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a uri, and the path in it."""
    fs, path = fsspec.core.url_to_fs(uri, **(S3_OPTIONS if uri.startswith("s3://") else {}))
    return fs, path


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn what a file system raises into a StorageError that says what to do; a missing file stays FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UNREACHABLE as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        action = "free space or name another place" if full else "check that the place can be reached and written"
        raise StorageError(f"{type(error).__name__}: {error}", where=uri, action=f"{action}, then run the same command again") from error
