"""Whole files or nothing, and errors that say that the storage is to blame."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vkd.errors import StorageError
from vkd.store import files


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_put_is_read_whole_or_in_ranges(folder: str) -> None:
    place = files.join(folder, "deep", "er", "file")
    files.put(place, b"0123456789")
    assert files.read(place) == b"0123456789"
    assert files.read(place, start=2, end=5) == b"234"
    assert files.read(place, start=7) == b"789"
    assert files.read(place, end=3) == b"012"
    assert files.read(place, start=-4) == b"6789"
    assert files.read(place, start=-400) == b"0123456789"
    files.put(place, b"")
    assert files.read(place) == b""


def test_the_first_of_two_new_files_stays(folder: str) -> None:
    place = files.join(folder, "sub", "file")
    assert files.put(place, b"first", new=True)
    assert not files.put(place, b"second", new=True)
    assert files.read(place) == b"first"
    assert files.list_names(files.join(folder, "sub")) == ["file"]
    assert files.put(place, b"third")
    assert files.read(place) == b"third"


def test_a_new_file_where_links_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert files.put(str(tmp_path / "file"), b"first", new=True)
    assert not files.put(str(tmp_path / "file"), b"second", new=True)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOSYS])
def test_a_new_object_where_conditions_are_unknown(monkeypatch: pytest.MonkeyPatch, answer: int) -> None:
    place, pipe_file = f"memory://{uuid.uuid4().hex}/file", MemoryFileSystem.pipe_file

    def picky(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(answer, os.strerror(answer))
        pipe_file(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", picky)
    assert files.put(place, b"first", new=True)
    assert not files.put(place, b"second", new=True)
    assert files.read(place) == b"first"


def test_names_and_infos_are_sorted_and_leave_temporary_files_out(folder: str) -> None:
    for name, data in (("b", b"22"), ("a", b"1"), (".a.1234.tmp", b""), ("sub/c", b"333")):
        files.put(files.join(folder, name), data)
    assert files.list_names(folder) == ["a", "b", "sub"]
    infos = files.list_infos(folder)
    assert [(name, size) for name, size, _ in infos] == [("a", 1), ("b", 2)]
    assert all(1.6e9 < time_s < 1e10 for _, _, time_s in infos)
    assert files.list_names(files.join(folder, "gone")) == []
    assert files.list_infos(files.join(folder, "gone")) == []


def test_a_listing_sees_what_was_written_since_the_last_one(folder: str) -> None:
    assert files.list_names(folder) == []
    files.put(files.join(folder, "a"), b"")
    assert files.list_names(folder) == ["a"]


def test_delete_removes_files_and_folders_and_nothing_is_fine(folder: str) -> None:
    files.put(files.join(folder, "sub", "a"), b"")
    files.put(files.join(folder, "b"), b"")
    files.delete(files.join(folder, "sub"))
    files.delete(files.join(folder, "b"))
    files.delete(files.join(folder, "never"))
    assert files.list_names(folder) == []
    assert not files.exists(files.join(folder, "b"))


def test_a_missing_file_stays_a_missing_file(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        files.read(files.join(folder, "gone"))


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), MemoryError()])
def test_an_interrupted_write_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    place = tmp_path / "file"
    files.put(str(place), b"before")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(files, "open", fail, raising=False)
        else:
            patch.setattr(os, step, fail)
        with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
            files.put(str(place), b"after")
    assert os.listdir(tmp_path) == ["file"]
    assert place.read_bytes() == b"before"


def test_readers_never_see_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "file"
    files.put(str(place), b"before")
    seen: list[bytes] = []
    rename = os.replace

    def look(source: str, target: str) -> None:
        seen.append(files.read(target))
        assert os.path.dirname(source) == os.path.dirname(target)
        rename(source, target)
        seen.append(files.read(target))

    monkeypatch.setattr(os, "replace", look)
    files.put(str(place), b"after")
    assert seen == [b"before", b"after"]


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match=r"No space left.*free space or name another place, then run the same command again") as raised:
        files.put(str(tmp_path / "file"), b"data")
    assert raised.value.exit_code == 3
    assert raised.value.where == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "makedirs", read_only)
    with pytest.raises(StorageError, match=r"Read-only.*check that the place can be reached and written") as raised:
        files.put(str(tmp_path / "file"), b"")
    assert raised.value.exit_code == 3


def test_a_file_in_the_place_of_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="check that the place can be reached and written"):
        files.put(str(tmp_path / "file" / "x"), b"")
    assert not files.exists(str(tmp_path / "file" / "x"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="IsADirectoryError"):
        files.read(str(tmp_path))
