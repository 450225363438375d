"""The whole data path on a real S3 server: videos, manifest, labels, frames, training, export. Without Ray."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import small

from vkd import training, verification
from vkd.checkpoint import load_student
from vkd.errors import StorageError
from vkd.manifest import BuildOptions, build
from vkd.run import parse
from vkd.store import files
from vkd.video import guard

KEYS = "AKVKD", "SKVKD"
START_TIMEOUT_S = 20


@pytest.fixture(scope="module")
def bucket(small_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://bucket` with three videos under `videos/`, on a server that ends with this file."""
    root = tmp_path_factory.mktemp("s3")
    shutil.copytree(small_videos, root / "bucket" / "videos")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rclone = Path(sys.executable).with_name("rclone")
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", ",".join(KEYS), "--vfs-cache-mode", "off"]
    server = subprocess.Popen([rclone, "serve", "s3", *options, root], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", KEYS[0])
        patch.setenv("AWS_SECRET_ACCESS_KEY", KEYS[1])
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        _wait_for(port)
        guard._HERE.__dict__.clear()  # a child that runs has the environment of before
        yield "s3://bucket"
    guard._HERE.__dict__.clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # else a later test gets a client of this server
    server.terminate()
    server.wait()


def _wait_for(port: int) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("the S3 server does not answer")


def test_the_data_path_on_a_bucket(bucket: str) -> None:
    report = build(f"{bucket}/videos", f"{bucket}/manifest", BuildOptions(label_from="regex:_([a-z]+)", chunk_size=5))
    assert (report.videos, report.rejected) == (3, {})
    tree = small.tree_of(Path("unused"))
    tree["output"], tree["labels"]["store"], tree["data"]["manifest"] = f"{bucket}/out", f"{bucket}/labels", f"{bucket}/manifest"
    run = parse(tree)
    small.label(run)
    assert verification.verify(run, num_sampled=2).ok
    trained = training.train(run, lambda _: None)
    assert trained.num_steps > 0
    assert load_student(f"{bucket}/out/student").heads.keys() == {"logits", "embedding"}
    assert training.train(run, lambda _: None).skipped


def test_a_whole_object_is_one_put_and_a_missing_bucket_is_a_storage_error(bucket: str) -> None:
    files.put(f"{bucket}/a/b.bin", b"0123456789")
    assert files.read(f"{bucket}/a/b.bin", start=-3) == b"789"
    assert files.list_names(f"{bucket}/a") == ["b.bin"]
    files.delete(f"{bucket}/a")
    assert not files.exists(f"{bucket}/a/b.bin")
    with pytest.raises(StorageError, match="make the bucket"):
        files.put("s3://no-such-bucket/x", b"x")
