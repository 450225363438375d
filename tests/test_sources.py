"""Sources: what is found, how it is named, and who must act when it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vkd import sources
from vkd.errors import ConfigError, ManifestError, StorageError, VideoError
from vkd.manifest import VIDEO_SUFFIXES, BuildOptions, build
from vkd.video import listing
from vkd.video.access import Access
from vkd.video.listing import Listed
from vkd.video.sources import resolve_uri


def folder(root: Path, *names: str) -> str:
    """Empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def uris(source: str) -> list[str]:
    found: list[str] = sources.list_rows(source, None, VIDEO_SUFFIXES)[0]["uri"].to_pylist()
    return found


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "a.mp4")
    folder(tmp_path / "elsewhere", "b.mp4")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "broken.mp4").symlink_to(tmp_path / "nowhere")
    assert uris(source) == [f"{source}/a.mp4", f"{source}/broken.mp4", f"{source}/linked/b.mp4"]


def test_list_file_takes_relative_absolute_and_file_uris(tmp_path: Path) -> None:
    lines = ["# a comment", "sub/../sub/b.mp4", "", f"file://{tmp_path}/c.dat", f"{tmp_path}/a.mp4", "s3://bucket/d.mp4"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    expected = [f"{tmp_path}/a.mp4", f"{tmp_path}/c.dat", f"{tmp_path}/sub/b.mp4", "s3://bucket/d.mp4"]
    assert uris(f"{tmp_path}/list.txt") == uris(f"file://{tmp_path}/list.txt") == expected


def test_relative_sources_give_absolute_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "in", "a.mp4")
    (tmp_path / "in" / "list.txt").write_text("a.mp4")
    monkeypatch.chdir(tmp_path)
    assert uris("in") == uris("in/list.txt") == uris("in/a.mp4") == [f"{tmp_path}/in/a.mp4"]


def test_version_is_etag_then_content_then_mtime(tmp_path: Path) -> None:
    def remote(uri: str, etag: str) -> Listed:
        return listing.describe([uri], {uri: {"size": 3, "ETag": f'"{etag}"', "type": "file"}}, Access(), BuildOptions(threads=1), None)[0]

    a, b, c = remote("memory://a", "e1"), remote("memory://b", "e1"), remote("memory://a", "e2")
    assert a.content == b.content == (3, "e1") != c.content
    assert len({video.video_id for video in (a, b, c)}) == 3
    path = tmp_path / "a.mp4"
    path.write_bytes(b"abc")
    os.utime(path, ns=(1, 7))
    local, hashed = (
        listing.describe([str(path)], {}, Access(), BuildOptions(hash=hash_content), None)[0] for hash_content in (False, True)
    )
    assert (local.etag, local.content) == ("mtime:7", None)
    assert hashed.etag == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_label_from_regex_searches_the_file_name(tmp_path: Path) -> None:
    rows, _ = sources.list_rows(folder(tmp_path, "daria_bend.avi", "odd.avi"), None, VIDEO_SUFFIXES)
    assert sources.with_labels(rows, r"regex:_(\w+)\.", "")["label"].to_pylist() == ["bend", None]


@pytest.mark.parametrize("label_from", ["folders", "column:", "regex:(", "regex:nogroup"])
def test_label_from_is_checked(label_from: str) -> None:
    with pytest.raises(ConfigError, match="label_from"):
        BuildOptions(label_from=label_from)


def test_label_from_a_column_or_pattern_that_is_not_there(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", "a.mp4")
    for label_from in ("column:verb", "regex:(zzz)"):
        with pytest.raises(ManifestError, match="label_from"):
            build(source, str(tmp_path / "out"), BuildOptions(label_from=label_from))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent", "no such folder"),
        ("absent.csv", "no such folder"),
        ("hollow", "no video found"),
        ("nouri.csv", "--uri-column"),
        ("hole.jsonl", "row 1 has no uri"),
        ("bad.json", "list of objects"),
        ("lost.txt", "none of the 2 videos exists"),
        ("package://no_such_package/x", "not installed"),
        ("xyz://bucket", "xyz"),
    ],
)
def test_misuse_says_what_to_do(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "nouri.csv").write_text("file,caption\na.mp4,x\n")
    (tmp_path / "hole.jsonl").write_text('{"uri": "a.mp4"}\n{"uri": null}\n')
    (tmp_path / "bad.json").write_text('{"uri": "a.mp4"}')
    (tmp_path / "lost.txt").write_text("a.mp4\nb.mp4\n")
    with pytest.raises(ManifestError, match=words) as caught:
        build(source if "://" in source else str(tmp_path / source), str(tmp_path / "out"), BuildOptions())
    assert caught.value.action and caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_denied_storage_is_no_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", "a.mp4", "b.mp4")

    def denied(path: str, **_: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("vkd.video.listing.os.stat", denied)
    with pytest.raises(StorageError, match="denied"):
        listing.describe([f"{source}/a.mp4", f"{source}/b.mp4"], {}, Access(), BuildOptions(threads=1), None)


def test_resolve_uri() -> None:
    assert resolve_uri("file:///a/b.mp4") == resolve_uri("/a/b.mp4") == "/a/b.mp4"
    assert resolve_uri("s3://bucket/b.mp4") == "s3://bucket/b.mp4"
    for uri in ("package://no_such_package/b.mp4", "package://", "package://a.b/c", "package://os/x"):
        with pytest.raises(VideoError) as caught:
            resolve_uri(uri)
        assert caught.value.kind == "missing"
