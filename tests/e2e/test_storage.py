"""`vkd label` on a real S3 server that is away for a minute, killed, or gone for good: nothing is rejected for it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fault_proxy
import fsspec
import harness
import pytest
from fault_proxy import FaultProxy, S3Server

AWAY_S = 60
TIMEOUT_S = 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]


@pytest.fixture
def proxy(tiny_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before a server whose bucket holds one video of 4 s."""
    shutil.copytree(tiny_video, tmp_path / "s3" / "bucket" / "videos")
    server = S3Server(tmp_path / "s3")
    with FaultProxy(server.port) as proxy:
        proxy.server = server
        for name, value in fault_proxy.environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield proxy
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.kill()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    tree = harness.small_run(tmp_path, Path("unused"))
    tree["data"] |= {"source": "s3://bucket/videos", "manifest": "s3://bucket/manifest", "chunk_size": 2}
    tree["data"] |= {"clips": {"plan": "windows", "length_s": 1.0, "stride_s": 0.1}}
    tree["labels"]["store"] = "s3://bucket/labels"
    return harness.write(tree, tmp_path / "run.yaml")


def labels_committed(proxy: FaultProxy) -> int:
    return sum(request.method == "PUT" and "teacher-" in request.path and "chunk-" in request.path for request in proxy.seen)


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_storage_that_is_away_for_a_minute_rejects_nothing(proxy: FaultProxy, run_file: Path, how: str) -> None:
    stop, start = (proxy.down, proxy.up) if how == "refused" else (proxy.server.kill, proxy.server.start)
    with harness.vkd("label", run_file, "--json") as command:
        command.until(lambda: labels_committed(proxy))
        stop()
        time.sleep(AWAY_S)
        assert command.process.poll() is None
        start()
        code, stdout, stderr = command.finish(TIMEOUT_S)
    assert code == 0, stderr
    assert "asking again in" in stderr
    done = json.loads(stdout.splitlines()[-1])
    assert (done["labelled"], done["rejected"]) == (done["planned"], {})
    with harness.vkd("verify", run_file, "--sample", 2) as command:
        assert command.finish(TIMEOUT_S)[0] == 0


def test_when_patience_ends_it_exits_with_3_and_goes_on_later(proxy: FaultProxy, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("VKD_STORAGE_PATIENCE_S", "4")
        with harness.vkd("label", run_file) as command:
            command.until(lambda: labels_committed(proxy))
            threading.Thread(target=proxy.down).start()
            code, _, stderr = command.finish(TIMEOUT_S)
    assert code == 3, stderr
    assert "run the same command again" in stderr.splitlines()[-1]
    proxy.up()
    with harness.vkd("label", run_file, "--json") as command:
        code, stdout, stderr = command.finish(TIMEOUT_S)
    assert code == 0, stderr
    done = json.loads(stdout.splitlines()[-1])
    assert done["present"] > 0
    assert (done["present"] + done["labelled"], done["rejected"]) == (done["planned"], {})
