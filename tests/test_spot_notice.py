"""The sidecar of spot nodes against a local metadata service; the slow test drains a real node."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

from vkd import spot_notice
from vkd.spot_notice import Aws, Notice, drain_in_time, gcp_notice, main, wait_for_notice

REPOSITORY = Path(__file__).parents[1]
AWS, GCP = "/latest/meta-data", "/computeMetadata/v1/instance"
LEFT_S = 120.0


class Metadata:
    """A metadata service of both clouds: `pages` by path; `tokens` handed out, of which the newest counts; status 500 while `broken`."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.tokens, self.num_asked, self.broken = 0, 0, False
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                service.tokens += 1
                self.answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, f"token {service.tokens}")

            def do_GET(self) -> None:
                service.num_asked += 1
                aws = self.headers["X-aws-ec2-metadata-token"] == f"token {service.tokens}"
                allowed = aws if self.path.startswith("/latest") else self.headers["Metadata-Flavor"] == "Google"
                if service.broken or not allowed:
                    return self.answer(500 if service.broken else 401, "")
                return self.answer(200 if self.path in service.pages else 404, service.pages.get(self.path, ""))

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def interrupt(self, left_s: float = LEFT_S) -> float:
        """Announce the end of an AWS machine; when it comes."""
        ends = (datetime.now(UTC) + timedelta(seconds=left_s)).replace(microsecond=0)
        self.pages[f"{AWS}/spot/instance-action"] = json.dumps({"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")})
        return ends.timestamp()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.server.shutdown()
    service.server.server_close()


def test_aws_announces_its_own_deadline(metadata: Metadata) -> None:
    cloud = Aws(metadata.url)
    assert cloud.notice() is None
    ends_s = metadata.interrupt()
    notice = cloud.notice()
    assert notice is not None
    assert notice.deadline_s == ends_s
    assert "terminate" in notice.what
    assert metadata.tokens == 1


def test_an_old_aws_token_is_replaced(metadata: Metadata) -> None:
    cloud = Aws(metadata.url)
    cloud.notice()
    metadata.tokens += 1  # what the service takes now
    metadata.interrupt()
    assert wait_for_notice(cloud.notice, poll_s=0.01).what.startswith("spot terminate")
    assert cloud.headers == {"X-aws-ec2-metadata-token": "token 3"}


def test_a_rebalance_recommendation_is_told_once_and_drains_nothing(metadata: Metadata, capsys: pytest.CaptureFixture[str]) -> None:
    cloud = Aws(metadata.url)
    metadata.pages[f"{AWS}/events/recommendations/rebalance"] = '{"noticeTime": "2026-11-01T08:22:00Z"}'
    assert [cloud.notice(), cloud.notice()] == [None, None]
    assert capsys.readouterr().out.count("noticeTime") == 1


@pytest.mark.parametrize(
    ("preempted", "event", "left_s"),
    [
        ("FALSE", "NONE", None),
        ("FALSE", "MIGRATE_ON_HOST_MAINTENANCE", None),
        ("TRUE", "NONE", spot_notice.PREEMPTED_S),
        ("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", spot_notice.MAINTENANCE_S),
    ],
)
def test_gcp(metadata: Metadata, preempted: str, event: str, left_s: float | None) -> None:
    metadata.pages = {f"{GCP}/preempted": preempted, f"{GCP}/maintenance-event": event}
    notice = gcp_notice(metadata.url)
    assert (notice is None) == (left_s is None)
    if notice is not None and left_s is not None:
        assert notice.deadline_s - time.time() == pytest.approx(left_s, abs=5)


def test_it_outlives_a_service_that_breaks_and_says_so_once(metadata: Metadata, capsys: pytest.CaptureFixture[str]) -> None:
    metadata.broken = True
    metadata.pages[f"{AWS}/spot/instance-action"] = "no json"

    def mend() -> None:
        until(lambda: metadata.num_asked >= 3)
        metadata.broken = False
        until(lambda: metadata.num_asked >= 9)
        metadata.interrupt()

    threading.Thread(target=mend, daemon=True).start()
    assert wait_for_notice(Aws(metadata.url).notice, poll_s=0.01).what.startswith("spot")
    assert capsys.readouterr().out.count("no answer") == 1


def test_it_outlives_a_service_that_is_not_there(metadata: Metadata, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([ConnectionRefusedError(111, "refused"), None, TimeoutError("timed out"), Notice("gone", 1.0)])

    def look() -> Notice | None:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert wait_for_notice(look, poll_s=0) == Notice("gone", 1.0)
    assert capsys.readouterr().out.count("no answer") == 2  # it answered in between


def test_a_drain_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(spot_notice, "AGAIN_S", 0.01)
    tries: list[Notice] = []

    def drain(notice: Notice) -> list[str]:
        tries.append(notice)
        if len(tries) < 3:
            raise ConnectionError("the head is busy")
        return ["c0ffee"]

    assert drain_in_time(Notice("preempted", time.time() + 30), drain) == 0
    assert len(tries) == 3
    assert capsys.readouterr().out == "vkd.spot_notice: draining c0ffee: preempted, 30 s left\n"


def test_a_drain_that_never_works_ends_with_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    def drain(_: Notice) -> list[str]:
        raise ConnectionError("no head")

    assert drain_in_time(Notice("preempted", time.time()), drain) == 1
    assert "not drained" in capsys.readouterr().out


def test_the_whole_of_it(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def drain(notice: Notice, address: str | None, node_id: str | None) -> list[str]:
        asked.append((notice.what, address, node_id))
        return ["c0ffee"]

    monkeypatch.setattr(spot_notice, "drain", drain)
    monkeypatch.setenv(spot_notice.URL_VARIABLE, metadata.url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the metadata service is never behind a proxy
    metadata.pages = {f"{GCP}/preempted": "TRUE\n"}
    assert main(["gcp", "--address", "head:6379"]) == 0
    assert asked == [("preempted", "head:6379", None)]


def test_wrong_arguments_end_with_2() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["azure"])
    assert ended.value.code == 2


def until(holds: object, timeout_s: float = 30.0) -> None:
    assert callable(holds)
    ends_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_s, "it took too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_real_node_drains(metadata: Metadata) -> None:
    """The GCS knows the deadline while the node works, and lets the node go when it is idle; the head stays."""
    import ray
    from ray._private.state import state
    from ray.cluster_utils import Cluster

    class Busy:
        def here(self) -> None: ...

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    worker = cluster.add_node(num_cpus=1, labels={"vkd-group": "teacher"})
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        busy = ray.remote(num_cpus=1, label_selector={"vkd-group": "teacher"})(Busy).remote()
        ray.get(busy.here.remote())
        command = [sys.executable, "-m", "vkd.spot_notice", "aws", "--url", metadata.url, "--poll-s", "0.2"]
        command += ["--address", cluster.address, "--node-id", worker.node_id]
        sidecar = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        until(lambda: metadata.num_asked >= 4)
        assert state.get_draining_nodes() == {}
        ends_s = metadata.interrupt()
        said, _ = sidecar.communicate(timeout=30)
        assert (sidecar.returncode, said.count("\n")) == (0, 1)
        assert f"draining {worker.node_id}" in said
        assert state.get_draining_nodes() == {worker.node_id: int(ends_s * 1000)}
        ray.kill(busy)
        until(lambda: [node["NodeID"] for node in ray.nodes() if node["Alive"]] == [cluster.head_node.node_id])
    finally:
        ray.shutdown()
        cluster.shutdown()
