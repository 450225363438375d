"""What a run may read videos from, and how: allowed places, whole objects or ranges, requests a second."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vkd.errors import VideoError
from vkd.video.sources import PACKAGE, resolve_uri

MAX_INLINE_BYTES = 64 << 20
MAX_URI_CHARS = 4096
# others of fsspec's file systems reach local files (local://, dir://, generic://) or unpack what they are given
REMOTE = {"s3", "s3a", "gs", "gcs", "http", "https", "abfs", "abfss", "az", "oss", "oci", "hf", "hdfs", "webhdfs", "sftp", "memory"}


@dataclass(frozen=True)
class Access:
    """`allow`: folders whose local files may be read; None allows all. Remote uris need no permission, chained ones never get it.

    Objects of at most `max_inline_bytes` are read whole; `max_requests_per_s` bounds one process.
    """

    allow: tuple[str, ...] | None = None
    max_inline_bytes: int = MAX_INLINE_BYTES
    max_requests_per_s: float | None = None

    @classmethod
    def to(cls, source: str | None, allow: Sequence[str] = (), **how: Any) -> Access:
        """Access to the local files in a source folder (beside it, when it is a list file) and in other folders."""
        roots = list(allow)
        if source is not None and "://" not in source:
            path = os.path.abspath(os.path.expanduser(source))
            roots.append(path if os.path.isdir(path) else os.path.dirname(path))
        return cls(tuple(roots), **how)

    def resolve(self, uri: str) -> str:
        """A local path, or a remote uri. Raises VideoError `not_allowed` for a place that the run does not permit."""
        if "::" in uri:
            raise VideoError("not_allowed", "a chained uri could open anything", where=uri)
        if "\0" in uri or len(uri) > MAX_URI_CHARS:
            raise VideoError("missing", "no file can have such a name", where=uri[:MAX_URI_CHARS])
        path = resolve_uri(uri)
        if "://" in path:
            if self.allow is not None and path.partition("://")[0] not in REMOTE:
                raise VideoError("unknown_protocol", f"videos are read from {', '.join(sorted(REMOTE))} and local files", where=uri)
            return path
        path = os.path.abspath(path)  # fsspec takes file:x and ~ at the start of a path for more than names
        if self.allow is None:
            return path
        package = uri.removeprefix(PACKAGE).partition("/")[0]
        roots = (resolve_uri(PACKAGE + package),) if uri.startswith(PACKAGE) else self.allow
        if not any(_is_inside(os.path.realpath(path), os.path.realpath(root)) for root in roots):
            raise VideoError("not_allowed", "the file lies outside data.source and data.allow", where=uri)
        return path


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


@dataclass
class Meter:
    """What one process asked of storage: requests, bytes, and a clock of [seconds waited, since when it waits now or 0]."""

    num_requests: int = 0
    num_bytes: int = 0
    clock: MutableSequence[float] = field(default_factory=lambda: [0.0, 0.0])
    _next_s: float = 0.0

    @contextmanager
    def request(self, max_per_s: float | None) -> Iterator[None]:
        """Around one request; waits first when the last one was too recent."""
        self.clock[1] = started_s = time.monotonic()
        if max_per_s is not None:
            time.sleep(max(0.0, self._next_s - started_s))
            self._next_s = max(started_s, self._next_s) + 1 / max_per_s
        self.num_requests += 1
        try:
            yield
        finally:
            self.clock[0] += time.monotonic() - started_s
            self.clock[1] = 0.0


METER = Meter()
