"""List videos and ask what they are: files under a place, their size and version, and what a probe says.

A listing gives each video's id without opening it; a video that cannot be used carries the VideoError that says why.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import pyarrow as pa

from vkd import schema
from vkd.errors import ManifestError, StorageError, VideoError
from vkd.pools import Progress, map_in
from vkd.store import faults, files
from vkd.store.faults import UNREACHABLE
from vkd.video import guard
from vkd.video.access import Access
from vkd.video.container import VideoInfo
from vkd.video.settings import Settings
from vkd.video.sources import PACKAGE, resolve_uri

ProbeLevel = Literal["none", "header", "full"]
Info = dict[str, Any]  # what fsspec tells of one file


@dataclass(frozen=True)
class Listed:
    """One video as a listing shows it; `etag` is the store's, or `sha256:...` of the content, or `mtime:...` in ns."""

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    fault: VideoError | None = None

    @property
    def video_id(self) -> str:
        """Changed content is a new video; a file that could not be found is another one than the file that later is."""
        return schema.digest(self.uri, self.size_bytes, self.etag, *([] if self.fault is None else [self.fault.kind]))

    @property
    def content(self) -> tuple[int, str] | None:
        """Equal for equal content; None when the listing cannot tell."""
        if self.size_bytes is None or self.etag is None or self.etag.startswith("mtime:"):
            return None
        return self.size_bytes, self.etag


class Listing(Protocol):
    """How to list: whether contents are hashed, and with how many threads."""

    @property
    def hash(self) -> bool: ...
    @property
    def threads(self) -> int: ...


@dataclass(frozen=True)
class Probed:
    """One video and what probing said; without both nothing was asked."""

    video: Listed
    info: VideoInfo | None = None
    fault: VideoError | None = None


def find(source: str, extensions: Sequence[str]) -> dict[str, Info]:
    """Every file under a folder or prefix that looks like a video; local ones without information."""
    path = resolve_uri(source)
    if "://" in path:
        found = _find_remote(path)
    else:
        found = {name: {} for name in _walk(os.path.abspath(path))}
        if source.startswith(PACKAGE):
            found = {f"{source.rstrip('/')}/{os.path.relpath(name, path)}": {} for name in found}
    return {uri: info for uri, info in found.items() if _is_video(uri, extensions)}


@files.patient
def _find_remote(uri: str) -> dict[str, Info]:
    fs, root = files.filesystem(uri)
    fs.invalidate_cache()
    found = {fs.unstrip_protocol(name): info for name, info in fs.find(root, detail=True).items()}
    if not found and not fs.exists(root):
        raise FileNotFoundError(uri)
    return found


@files.patient
def _remote_info(uri: str) -> Info:
    fs, path = files.filesystem(uri)
    return files.info(fs, path)


def _walk(path: str) -> Iterator[str]:
    """Files under a local folder, through links to folders but never twice through one."""
    if os.path.isfile(path):
        yield path
        return
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (os.path.join(folder, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def _is_video(uri: str, extensions: Sequence[str]) -> bool:
    name = PurePosixPath(uri).name
    return name.lower().endswith(tuple(extensions)) and not name.startswith(".")


def describe(uris: Sequence[str], infos: dict[str, Info], access: Access, how: Listing, progress: Progress | None) -> list[Listed]:
    """Size and version of each uri, in order. StorageError when the store refuses or cannot be reached."""

    def one(uri: str) -> Listed:
        return _describe(uri, infos.get(uri, {}), access, how.hash or uri.startswith(PACKAGE))

    listed = map_in(ThreadPoolExecutor(how.threads), one, uris, progress if how.hash else None)
    if listed and all(video.fault is not None and video.fault.kind in ("missing", "forbidden") for video in listed):
        if any(video.fault is not None and video.fault.kind == "forbidden" for video in listed):
            raise StorageError(f"access denied to all {len(listed)} videos", where=uris[0], action="check the credentials, then run again")
        raise ManifestError(f"none of the {len(listed)} videos exists", where=uris[0], action="mend the paths in the source")
    return listed


def probe(videos: Sequence[Listed], level: ProbeLevel, access: Access, threads: int, progress: Progress | None) -> list[Probed]:
    """What each video is, in order; a VideoError becomes its fault. StorageError stops."""
    settings = Settings(access=access)
    if level != "none":
        threads = min(threads, 2 * (os.cpu_count() or 1))  # each has a child process that decodes
    return map_in(ThreadPoolExecutor(threads), lambda video: _probe(video, level, settings), videos, progress)


def shifted(progress: Progress | None, offset: int, total: int) -> Progress | None:
    """`progress` of a part that begins at `offset` of `total`."""
    return None if progress is None else lambda done, _: progress(offset + done, total)


def _probe(video: Listed, level: ProbeLevel, settings: Settings) -> Probed:
    """What a video is; a VideoError becomes its fault."""
    if video.fault is not None or level == "none":
        return Probed(video, fault=video.fault)
    try:
        return Probed(video, guard.here(settings).probe(video.uri, full=level == "full"))
    except VideoError as error:
        return Probed(video, fault=error.with_traceback(None))


@contextmanager
def reaching(source: str) -> Iterator[None]:
    """Turn what file systems raise while listing into the error of whoever must act."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, VideoError) as error:
        what = error.what if isinstance(error, VideoError) else "no such folder, bucket or file"
        raise ManifestError(what, where=source, action="mend SOURCE") from error
    except ImportError as error:
        raise ManifestError(str(error), where=source, action="install that package, then run again") from error
    except UNREACHABLE as error:
        raise faults.told(source, error) from error
    except (ValueError, pa.ArrowException) as error:  # ValueError: json, unicode and fsspec's unknown protocols
        raise ManifestError(str(error), where=source, action="mend SOURCE") from error


def _describe(uri: str, info: Info, access: Access, hash_content: bool) -> Listed:
    try:
        path = access.resolve(uri)
        if "://" not in path:
            status = os.stat(path)  # follows links, as decoding does
            kind = "directory" if stat.S_ISDIR(status.st_mode) else "file"
            info = {"size": status.st_size, "mtime": status.st_mtime_ns, "type": kind}
        elif not info:
            info = _remote_info(path)
        size_bytes = None if info.get("size") is None else int(info["size"])
        fault = VideoError("not_a_file", "a folder, not a video", where=uri) if info.get("type") == "directory" else None
        fault = VideoError("empty", "the file has no bytes", where=uri) if size_bytes == 0 else fault
        etag = None if fault is not None else _sha256(path) if hash_content else _version(info)
        return Listed(uri, size_bytes, etag, fault)
    except VideoError as error:
        return Listed(uri, fault=error)
    except (FileNotFoundError, NotADirectoryError):
        return Listed(uri, fault=VideoError("missing", "no such file", where=uri))
    except (ValueError, ImportError) as error:
        return Listed(uri, fault=VideoError("unknown_protocol", str(error), where=uri))
    except (StorageError, *UNREACHABLE) as error:
        if faults.is_refused(error):
            return Listed(uri, fault=VideoError("forbidden", str(error), where=uri, permanent=False))
        if isinstance(error, StorageError):
            raise
        if getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP):
            return Listed(uri, fault=VideoError("missing", f"no file can be there: {error}", where=uri))
        raise faults.told(uri, error) from error


def _version(info: Info) -> str | None:
    for key in ("ETag", "etag"):
        if info.get(key):
            return str(info[key]).strip('"')
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        if info.get(key):
            return f"mtime:{info[key]}"
    return None


@files.patient
def _sha256(path: str) -> str:
    fs, name = files.filesystem(path)
    with fs.open(name, "rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"
