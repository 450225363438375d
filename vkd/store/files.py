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
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import fsspec
from aiohttp import ClientTimeout
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from vkd.errors import StorageError, redact
from vkd.store import faults
from vkd.store.faults import UNREACHABLE

TEMPORARY = ".tmp"
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 15  # the second between two arrivals of bytes, not for all of them
# botocore tries a request twice, quickly and in silence; all longer waiting is done by `patiently`
S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "retries": {"mode": "standard", "total_max_attempts": 2},
        # S3-compatible servers answer a range with the checksum of the whole object; label files carry digests of their own
        "response_checksum_validation": "when_required",
    },
    "max_concurrency": 1,  # more would ask for the size before each read
    "use_listings_cache": False,  # others write too
}
# aiohttp's own limit is 300 s for all of a file, and none for silence
HTTP_OPTIONS = {"client_kwargs": {"timeout": ClientTimeout(sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)}}
OPTIONS: dict[str, dict[str, Any]] = {"s3": S3_OPTIONS, "s3a": S3_OPTIONS, "http": HTTP_OPTIONS, "https": HTTP_OPTIONS}
NUM_S3FS_TRIES = 1  # of s3fs around those of botocore

PATIENCE_S = float(os.environ.get("VKD_STORAGE_PATIENCE_S", "300"))  # how long storage may stay away
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
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
        told = f"{where}: {failed.what}; asking again in {wait_s:.0f} s, for at most {left_s:.0f} s"
        print(redact(told), file=sys.stderr, flush=True)
        time.sleep(wait_s * random.uniform(0.5, 1.0))  # not all workers at once
        wait_s, failed = min(2 * wait_s, LONGEST_WAIT_S), None


def patient(operation: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """An operation on a uri (its first argument) whose errors are told as StorageError, tried again while they pass."""

    @wraps(operation)
    def asked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        def once() -> Result:
            with storage_errors(str(args[0])):
                return operation(*args, **kwargs)

        return patiently(once, str(args[0]))

    return asked


def join(root: str, *parts: str) -> str:
    """`root/part/part`, for paths and uris alike."""
    return "/".join([root.rstrip("/"), *parts])


@patient
def put(uri: str, data: bytes, *, new: bool = False, changed_s: int | None = None) -> bool:
    """Write a whole file so that readers see all of it or nothing; with `new`, only when there is none. Whether it was written.

    `changed_s`: when a local file says that it was changed last, in seconds since 1970.

    Locally: a temporary name in the same folder, fsync, rename, or link when `new`. On object stores: one PUT, conditional when
    `new`; a server that knows no conditions overwrites.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        try:
            return _put_object(fs, path, data, new)
        except FileNotFoundError as error:
            raise StorageError(str(error), where=uri, action="make the bucket, or name another place") from error
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        if changed_s is not None:  # before it has its name: nobody sees it with another time
            os.utime(temporary, (changed_s, changed_s))
        if new:
            return _link(temporary, path)
        os.replace(temporary, path)
        return True
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _link(temporary: str, path: str) -> bool:
    """Give a finished file a second name; False when that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.exists(path):  # a file system without links
            return False
        os.replace(temporary, path)
    return True


def _put_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes, new: bool) -> bool:
    try:
        fs.pipe_file(path, data, **({"mode": "create"} if new else {}))
    except FileExistsError:
        return False
    except OSError as error:
        if not new or error.errno not in (errno.EINVAL, errno.ENOSYS):  # how servers refuse a condition, or say that it failed
            raise
        fs.invalidate_cache()
        if fs.exists(path):
            return False
        fs.pipe_file(path, data)
    return True


@patient
def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes of a file, all or a range (a negative start counts from the end). Raises FileNotFoundError when there is none."""
    fs, path = filesystem(uri)
    try:
        data: bytes = fs.cat_file(path, start=start, end=end)
    except UNREACHABLE as error:
        if start is None or start >= 0 or not faults.is_out_of_range(error):
            raise
        data = fs.cat_file(path)  # shorter than the range: most servers then give all of it, some refuse
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


@patient
def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    try:
        info(fs, path)  # `fs.exists` takes some failures for a no
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, FileNotFoundError) and not faults.is_missing(error):
            raise
        return False
    return True


@patient
def list_names(folder: str) -> list[str]:
    """Sorted names of what lies directly in a folder; empty when there is no such folder. Temporary files are left out."""
    names = (entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in _entries(folder))
    return sorted(name for name in names if not name.startswith(".") and name)


@patient
def list_infos(folder: str) -> list[tuple[str, int, float]]:
    """(name, size in bytes, modification time in seconds since 1970) of the files directly in a folder, by name; as `list_names`."""
    found = []
    for entry in _entries(folder):
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        time: Any = entry.get("mtime") or entry.get("LastModified") or entry.get("created")
        if entry["type"] == "file" and name and not name.startswith("."):
            found.append((name, int(entry["size"]), float(time.timestamp() if hasattr(time, "timestamp") else time or 0)))
    return sorted(found)


def _entries(folder: str) -> list[dict[str, Any]]:
    """What lies directly in a folder; nothing when there is no such folder. That a bucket is lost is another matter."""
    fs, path = filesystem(folder)
    fs.invalidate_cache()
    try:
        entries: list[dict[str, Any]] = fs.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, FileNotFoundError) and not faults.is_missing(error):
            raise
        return []
    return entries


@patient
def temporaries(folder: str) -> list[tuple[str, float]]:
    """(uri, modification time in seconds since 1970) of what interrupted writes left in a folder and below; object stores have none."""
    fs, path = filesystem(folder)
    if not isinstance(fs, LocalFileSystem):
        return []
    found = []
    for parent, _, names in os.walk(path):
        for name in names:
            if name.startswith(".") and name.endswith(TEMPORARY):
                with suppress(FileNotFoundError):  # its writer has finished
                    found.append((os.path.join(parent, name), os.stat(os.path.join(parent, name)).st_mtime))
    return sorted(found)


@patient
def delete(uri: str) -> None:
    """Remove a file or a folder with all that is in it; nothing happens when it is not there."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a uri, and the path in it."""
    protocol = uri.partition("://")[0]
    fs, path = fsspec.core.url_to_fs(uri, **OPTIONS.get(protocol, {}))
    if protocol in ("s3", "s3a"):
        fs.retries = NUM_S3FS_TRIES
    return fs, path


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """The same for those who want one of pyarrow's; its own S3 puts empty objects in the place of folders, which some servers refuse."""
    fs, path = filesystem(uri)
    return PyFileSystem(FSSpecHandler(fs)), path


def info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """What a file system tells of a file; what it raises says why."""
    try:
        told: dict[str, Any] = fs.info(path)
    except UNREACHABLE as error:
        if faults.hides_its_reason(error):
            fs.cat_file(path, start=0, end=1)  # raises the same with its reason
        raise
    return told


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn what a file system raises into a StorageError that says what to do; a missing file stays FileNotFoundError."""
    try:
        yield
    except UNREACHABLE as error:
        if not faults.is_missing(error):
            raise faults.told(uri, error) from error
        if isinstance(error, FileNotFoundError):
            raise
        raise FileNotFoundError(uri) from error
