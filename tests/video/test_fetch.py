"""Where a video's bytes come from, and who is to blame when they do not."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from clipmaker import make_clip
from fault_proxy import INTERNAL_ERROR, RESET, SLOW_DOWN, Fault, FaultProxy, free_port
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from vkd.clips import Clip, Sampling, View
from vkd.errors import StorageError, VideoError
from vkd.video import fetch
from vkd.video.access import Access
from vkd.video.decode import decode_clip


@pytest.fixture
def memory_uri() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/fetch/clip.bin", bytes(range(256)) * 40)
    fs.pipe_file("/fetch/empty.bin", b"")
    yield "memory://fetch/clip.bin"
    fs.rm("/fetch", recursive=True)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_local_files_are_read_in_place(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "clip.bin"
    path.write_bytes(b"x")
    with fetch.opened(f"{prefix}{path}") as source:
        assert source == str(path)


def test_package_uris_are_local_files() -> None:
    with fetch.opened("package://numpy/__init__.py") as source:
        assert Path(str(source)).is_file()


def test_small_objects_come_whole(memory_uri: str) -> None:
    with fetch.opened(memory_uri) as source:
        assert isinstance(source, io.BytesIO)
        assert source.read() == bytes(range(256)) * 40
    assert source.closed


class RangeFile(AbstractBufferedFile):
    """A remote file that notes which ranges are asked for."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.ranges.append((start, end))
        return self.fs.data[start:end]


class RangeFileSystem(AbstractFileSystem):
    """One remote object, `ranges://clip`, that can be read whole or in ranges."""

    protocol, cachable, data = "ranges", False, b""
    ranges: ClassVar[list[tuple[int, int]]] = []

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "size": len(self.data), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **given: object) -> RangeFile:
        return RangeFile(self, path, mode, **{k: v for k, v in given.items() if k not in ("autocommit",)})


@pytest.mark.parametrize("decoding", ["exact", "keyframe"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_large_objects_are_decoded_from_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, decoding: str) -> None:
    path = make_clip(tmp_path / f"clip.{suffix}", np.arange(120) / 25, options={"qp": "8"}, size_px=(640, 480))
    fsspec.register_implementation("ranges", RangeFileSystem, clobber=True)
    monkeypatch.setattr(RangeFileSystem, "data", path.read_bytes())
    monkeypatch.setattr(RangeFileSystem, "ranges", [])
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 1 << 16)
    view = View("frame", decoding=decoding)  # type: ignore[arg-type]
    sampling = Sampling(num_frames=2, size_px=64)
    from_ranges = decode_clip(Clip("ranges://clip", 2.0, 2.4, view, "key"), [sampling], access=Access(max_inline_bytes=9))
    np.testing.assert_array_equal(from_ranges, decode_clip(Clip(str(path), 2.0, 2.4, view, "key"), [sampling], "pyav"))
    num_bytes = sum(end - start for start, end in RangeFileSystem.ranges)
    assert len(RangeFileSystem.ranges) > 2
    assert num_bytes < 0.6 * len(RangeFileSystem.data)


def test_a_video_is_to_blame_for_being_missing_empty_or_a_folder(tmp_path: Path, memory_uri: str) -> None:
    (tmp_path / "empty.mp4").touch()
    expected = {
        f"{tmp_path}/nothing.mp4": "missing",
        "memory://fetch/nothing.bin": "missing",
        "package://no_such_package/clip.mp4": "missing",
        f"{tmp_path}/empty.mp4": "empty",
        "memory://fetch/empty.bin": "empty",
        f"{tmp_path}": "not_a_video",
    }
    for uri, kind in expected.items():
        with pytest.raises(VideoError) as caught, fetch.opened(uri):
            pass
        assert (caught.value.kind, caught.value.where, caught.value.permanent) == (kind, uri, True)


@pytest.mark.parametrize("error", [ConnectionError("refused"), TimeoutError("slow"), OSError(5, "input/output")])
def test_the_storage_is_to_blame_for_the_rest(memory_uri: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise error

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", broken)
    with pytest.raises(StorageError, match=r"clip\.bin"), fetch.opened(memory_uri):
        pass


def test_a_file_that_is_refused_is_a_reject(memory_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError("403")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", refused)
    with pytest.raises(VideoError, match="may not be read") as raised, fetch.opened(memory_uri):
        pass
    assert (raised.value.kind, raised.value.permanent) == ("forbidden", False)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(Fault("answer", 404), "missing"), (Fault("answer", 410), "missing"), (Fault("answer", 403), "forbidden")],
)
def test_what_a_web_server_says_of_one_video_is_a_reject(fault: Fault, kind: str) -> None:
    with (
        FaultProxy(free_port(), lambda _: fault) as server,
        pytest.raises(VideoError) as raised,
        fetch.opened(f"http://127.0.0.1:{server.port}/video.mp4"),
    ):
        pass
    assert raised.value.kind == kind


@pytest.mark.parametrize("fault", [INTERNAL_ERROR, SLOW_DOWN, Fault("answer", 429), RESET])
def test_a_web_server_in_trouble_is_the_storage(fault: Fault) -> None:
    with (
        FaultProxy(free_port(), lambda _: fault) as server,
        pytest.raises(StorageError) as raised,
        fetch.opened(f"http://127.0.0.1:{server.port}/video.mp4"),
    ):
        pass
    assert raised.value.passing


def test_errors_while_reading_are_told_apart_too(memory_uri: str) -> None:
    with pytest.raises(StorageError), fetch.opened(memory_uri):
        raise ConnectionResetError("in the middle of a range read")
    with pytest.raises(VideoError, match="no such file"), fetch.opened(memory_uri):
        raise FileNotFoundError("deleted while it was read")


def test_an_unreachable_s3_endpoint_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    fs = fsspec.filesystem("s3", endpoint_url="http://127.0.0.1:9", config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 1})
    fs.retries = 1
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda uri, **_: (fs, uri.removeprefix("s3://")))
    with pytest.raises(StorageError, match=r"s3://bucket/clip\.mp4"), fetch.opened("s3://bucket/clip.mp4"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_reject(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(VideoError, match="may not be read"), fetch.opened(str(path)):
        pass
