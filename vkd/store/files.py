"""Files anywhere fsspec reaches: whole reads, atomic writes, listings. Nothing else writes results to storage."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import fsspec
from aiohttp import ClientError
from botocore.exceptions import BotoCoreError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError
from fsspec.implementations.local import LocalFileSystem

from vkd.errors import StorageError

UNREACHABLE = (OSError, BotoCoreError, ClientError)  # s3fs and http raise the last two, which are no OSError
# S3-compatible servers answer a range with the checksum of the whole object; label files carry digests of their own
TEMPORARY = ".tmp"
S3_OPTIONS = {"config_kwargs": {"response_checksum_validation": "when_required"}}


PATIENCE_S = float(os.environ.get("VKD_STORAGE_PATIENCE_S", "300"))  # how long storage may stay away
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
# what object stores say when asking again cannot help; refused keys come as PermissionError
FINAL_ERRNOS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def patiently(do: Callable[[], Result], where: str, failed: StorageError | None = None) -> Result:
    """What `do` returns, tried again while storage does not answer, with growing waits that are told on stderr.

    `failed` is the error of a first try that was already made. Raises the last StorageError when it is not passing, or after
    PATIENCE_S.
    """
    give_up_s, wait_s = time.monotonic() + PATIENCE_S, FIRST_WAIT_S
    while True:
        if failed is None:
            try:
                return do()
            except StorageError as error:
                failed = error
        left_s = give_up_s - time.monotonic()
        if not failed.passing or wait_s > left_s:
            raise failed
        print(f"{where}: {failed.what}; asking again in {wait_s:.0f} s, for at most {left_s:.0f} s", file=sys.stderr, flush=True)
        time.sleep(wait_s * random.uniform(0.5, 1.0))  # not all workers at once
        wait_s, failed = min(2 * wait_s, LONGEST_WAIT_S), None


def _patient(operation: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """An operation on a uri (its first argument) whose errors are told as StorageError, tried again while they pass."""

    @wraps(operation)
    def patient(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        def once() -> Result:
            with storage_errors(str(args[0])):
                return operation(*args, **kwargs)

        return patiently(once, str(args[0]))

    return patient


def join(root: str, *parts: str) -> str:
    """`root/part/part`, for paths and uris alike."""
    return "/".join([root.rstrip("/"), *parts])


@_patient
def put(uri: str, data: bytes) -> None:
    """Write a whole file so that readers see all of it or nothing.

    Locally: a temporary name in the same folder, fsync, rename. On object stores: one PUT.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        try:
            fs.pipe_file(path, data)
        except FileNotFoundError as error:
            raise StorageError(str(error), where=uri, action="make the bucket, or name another place") from error
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
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


@_patient
def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes of a file, all or a range (a negative start counts from the end). Raises FileNotFoundError when there is none."""
    fs, path = filesystem(uri)
    data: bytes = fs.cat_file(path, start=start, end=end)
    return data


def read_json(uri: str, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object that has these keys. Raises StorageError when the file holds something else, FileNotFoundError as `read`."""
    action = "restore this file, or delete its folder and make it again"
    try:
        found = json.loads(read(uri))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"is not JSON: {error}", where=uri, action=action) from error
    lacking = [key for key in keys if not isinstance(found, dict) or key not in found]
    if lacking or not isinstance(found, dict):
        raise StorageError(f"lacks {lacking[0]!r}" if lacking else "holds no object", where=uri, action=action)
    return found


@_patient
def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


@_patient
def list_names(folder: str) -> list[str]:
    """Sorted names of what lies directly in a folder; empty when there is no such folder. Temporary files are left out."""
    fs, path = filesystem(folder)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return sorted(name for name in names if not name.startswith(".") and name)


@_patient
def list_infos(folder: str) -> list[tuple[str, int, float]]:
    """(name, size in bytes, modification time in seconds since 1970) of the files directly in a folder, by name; as `list_names`."""
    fs, path = filesystem(folder)
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


@_patient
def delete(uri: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens when it is not there."""
    fs, path = filesystem(uri)
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
        action = f"{action}, then run the same command again"
        raise StorageError(f"{type(error).__name__}: {error}", where=uri, action=action, passing=passes(uri, error)) from error


def passes(uri: str, error: BaseException) -> bool:
    """Whether what a file system raised may pass: a remote store that does not answer, is busy, or cut its answer short."""
    remote = "://" in uri and not uri.startswith(("file://", "memory://"))
    if not remote or isinstance(error, PermissionError) or getattr(error, "errno", None) in FINAL_ERRNOS:
        return False
    return not isinstance(error, BotoCoreError) or isinstance(error, HTTPClientError | BotoConnectionError)
