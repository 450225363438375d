"""Secrets in uris, messages and the environment are neither printed nor stored."""

from __future__ import annotations

import json
import pickle
import re
import string
from pathlib import Path

import pytest
import small
from hypothesis import assume, given
from hypothesis import strategies as st

from vkd import claim
from vkd import run as run_files
from vkd.console import Screen
from vkd.errors import SECRET_VARIABLES, ConfigError, StorageError, VideoError, redact
from vkd.manifest import BuildOptions, Manifest, build
from vkd.store import files

NAME = st.text(string.ascii_letters + string.digits + "-_.~", min_size=1, max_size=12)
PASSWORD = st.text(string.ascii_letters + string.digits + "-_.~%+/=!$:", min_size=8, max_size=40)
SIGNATURE = st.text(string.ascii_letters + string.digits + "-_.~%+/=", min_size=8, max_size=60)
IN_QUERY = (
    "X-Amz-Signature",
    "X-Amz-Credential",
    "X-Amz-Security-Token",
    "X-Goog-Signature",
    "Signature",
    "AWSAccessKeyId",
    "token",
    "access_token",
    "sig",
    "api_key",
    "auth",
    "password",
)
AROUND = ("{}", "cannot open {}: 403", "GET '{}' failed", '{{"uri": "{}", "ok": false}}', "<Resource>{}</Resource>", "({}) -> try again")
PLAIN = (
    "s3://bucket/videos/a.mp4",
    "http://localhost:9000/bucket/a@b.mp4",
    "http://user.example.com/v.mp4?versionId=3&t=10#at",
    "/data/some folder/a@b?c=d.mp4",
    "s3://bucket/x: OSError: [Errno 5] broken -> check that the place can be reached, then run the same command again",
    "labels: 20 labelled, 1 rejected of 21 clips -> s3://bucket/labels",
)


@given(st.sampled_from(["s3", "http", "https", "ftp"]), NAME, PASSWORD, st.sampled_from(AROUND))
def test_a_password_in_a_uri_is_taken_out(scheme: str, user: str, password: str, around: str) -> None:
    assume(not re.match(r"\d+/", password))
    told = redact(around.format(f"{scheme}://{user}:{password}@host/video.mp4"))
    assert told == around.format(f"{scheme}://***@host/video.mp4")


@given(st.sampled_from(IN_QUERY), SIGNATURE, st.sampled_from(AROUND), st.sampled_from(["?", "?a=b&", "?a=b&amp;"]))
def test_a_signature_in_a_query_is_taken_out(name: str, signature: str, around: str, before: str) -> None:
    told = redact(around.format(f"https://host/video.mp4{before}{name}={signature}&end=1"))
    assert told == around.format(f"https://host/video.mp4{before}{name}=***&end=1")


@given(st.sampled_from(SECRET_VARIABLES), SIGNATURE)
def test_the_keys_of_the_environment_are_taken_out(variable: str, secret: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, secret)
        assert redact(f"signed with ({secret})") == "signed with (***)"


@given(st.text() | st.text("h:/@?&;=*.1 sigtokenAKIA'\""))
def test_taking_out_twice_is_as_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("kind", [ConfigError, StorageError])
def test_no_error_holds_a_secret(kind: type[ConfigError] | type[StorageError]) -> None:
    secret = "https://me:hunter22@host/a?sig=abcdef0123"
    error = kind(f"no answer from {secret}", where=secret, action=f"look at {secret}")
    video = VideoError("missing", f"nothing at {secret}", where=secret)
    for each in (error, video, pickle.loads(pickle.dumps(error))):
        for told in (str(each), repr(each), repr(vars(each)), repr(each.args)):
            assert "hunter22" not in told
            assert "abcdef0123" not in told


def test_neither_waiting_nor_a_screen_prints_a_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(files, "PATIENCE_S", 0.05)
    monkeypatch.setattr(files, "FIRST_WAIT_S", 0.02)
    uri = "s3://me:hunter22@bucket/a"

    def away() -> None:
        raise StorageError(f"no answer from {uri}", where=uri, passing=True)

    with pytest.raises(StorageError):
        files.patiently(away, uri)
    screen = Screen()
    screen.line(f"next: vkd label {uri}")
    screen.table(uri, ("clip",), [(uri,)])
    out, err = capsys.readouterr()
    assert "asking again" in err
    assert "hunter22" not in out + err


def test_a_stored_run_holds_no_secret_and_loads(tmp_path: Path) -> None:
    tree = small.tree_of(tmp_path)
    tree["data"]["source"] = "https://me:hunter22@host/list.csv?token=abcdef0123"
    run = run_files.parse(tree)
    claim.claim_output(run)
    stored = tmp_path / "out" / "run.yaml"
    assert not re.search("hunter22|abcdef0123", stored.read_text())
    (loaded,) = run_files.load(stored)
    assert loaded.data.source == "https://***@host/list.csv?token=***"
    claim.claim_output(small.changed(run, "data.source=https://me:changed0@host/list.csv?token=another012"))  # the same place
    with pytest.raises(ConfigError, match=r"data\.source"):
        claim.claim_output(small.changed(run, "data.source=https://me:changed0@elsewhere/list.csv"))


def test_a_stored_manifest_holds_no_secret_but_where_videos_are(tmp_path: Path) -> None:
    source, out = tmp_path / "videos?token=abcdef0123", str(tmp_path / "manifest")
    source.mkdir()
    (source / "a.mp4").write_text("no video\n")
    build(str(source), out, BuildOptions())
    manifest = Manifest.load(out)
    assert manifest.index.sources == [f"{tmp_path}/videos?token=***"]
    assert "abcdef0123" not in json.dumps(manifest.rejects().to_pylist())
