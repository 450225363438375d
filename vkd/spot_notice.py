"""A sidecar of cluster nodes: waits for the cloud's notice that this machine goes, then drains it, so that training saves before.

Exit codes: 0 the node is draining, 1 it goes and could not be drained, 2 a wrong argument.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from urllib.error import HTTPError

import ray
from ray._private import services
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.exceptions import RayError

URLS = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
URL_VARIABLE = "VKD_METADATA_URL"
ANSWER_TIMEOUT_S, GCS_TIMEOUT_S, AGAIN_S = 2.0, 5.0, 1.0
AWS_KEYS = ("spot/instance-action", "events/recommendations/rebalance")
TOKEN_LIFE, GOOGLE = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, {"Metadata-Flavor": "Google"}
PREEMPTED_S, MAINTENANCE_S = 30.0, 60.0  # what Google leaves between its word and the end
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # metadata is asked on the machine itself


@dataclass(frozen=True)
class Notice:
    """The machine goes at `deadline_s`, seconds since 1970."""

    what: str
    deadline_s: float


def ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """What the metadata service answers; None when it has nothing there. Raises OSError when it does not answer."""
    try:
        with NO_PROXY.open(urllib.request.Request(url, headers=headers, method=method), timeout=ANSWER_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except HTTPError as error:
        if error.code == http.HTTPStatus.NOT_FOUND:
            return None
        raise


class Aws:
    """Version 2 of the instance metadata service, which wants a token of its own."""

    def __init__(self, url: str) -> None:
        self.url, self.headers, self.risk = url, dict[str, str](), ""

    def notice(self) -> Notice | None:
        """The interruption, if it is announced; a mere recommendation to move is told."""
        if not self.headers:
            self.headers = {"X-aws-ec2-metadata-token": ask(f"{self.url}/latest/api/token", TOKEN_LIFE, "PUT") or ""}
        try:
            found, risk = (ask(f"{self.url}/latest/meta-data/{key}", self.headers) for key in AWS_KEYS)
        except HTTPError as error:
            if error.code == http.HTTPStatus.UNAUTHORIZED:
                self.headers = {}  # the token is too old
            raise
        if risk and risk != self.risk:
            say(f"an interruption is likelier than it was: {risk}")
            self.risk = risk
        if found is None:
            return None
        told = json.loads(found)
        ends = datetime.fromisoformat(told["time"])
        return Notice(f"spot {told['action']} at {told['time']}", ends.replace(tzinfo=ends.tzinfo or UTC).timestamp())


def gcp_notice(url: str) -> Notice | None:
    """The end of a machine of Google's, if it is announced; one that moves while it runs (MIGRATE_...) is left alone."""
    preempted, event = (ask(f"{url}/computeMetadata/v1/instance/{key}", GOOGLE) or "" for key in ("preempted", "maintenance-event"))
    if preempted.strip() == "TRUE":
        return Notice("preempted", time.time() + PREEMPTED_S)
    return Notice(event.strip(), time.time() + MAINTENANCE_S) if event.startswith("TERMINATE") else None


def wait_for_notice(look: Callable[[], Notice | None], poll_s: float) -> Notice:
    """Asks until there is a notice; when the metadata service does not answer, or talks nonsense, asks again."""
    trouble = ""
    while True:
        before, trouble = trouble, ""
        try:
            if notice := look():
                return notice
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            trouble = f"{type(error).__name__}: {error}"
        if trouble and not before:  # one line, not one a second
            say(f"no answer of the metadata service, asking again: {trouble}")
        time.sleep(poll_s)


def drain(notice: Notice, address: str | None, node_id: str | None) -> list[str]:
    """Tells the GCS that this machine's nodes go; their ids. Raises when it cannot be told, or says no."""
    gcs = ray._raylet.GcsClient(address=services.canonicalize_bootstrap_address_or_die(address))
    here, reason = ray.util.get_node_ip_address(), autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
    nodes = gcs.get_all_node_info(timeout=GCS_TIMEOUT_S, state_filter=gcs_pb2.GcsNodeInfo.ALIVE)
    ids = [node_id] if node_id else [key.hex() for key, node in nodes.items() if node.node_manager_address == here]
    for each in ids:
        accepted, why = gcs.drain_node(each, reason, notice.what, int(notice.deadline_s * 1000), timeout=GCS_TIMEOUT_S)
        if not accepted:
            raise ConnectionError(f"{each}: {why}")
    if not ids:
        raise ConnectionError(f"the cluster knows no node at {here}")
    return ids


def drain_in_time(notice: Notice, drain_once: Callable[[Notice], Sequence[str]]) -> int:
    """Drains, again and again until it works or the machine is gone; the exit code."""
    while True:
        try:
            ids = drain_once(notice)
            say(f"draining {', '.join(ids)}: {notice.what}, {notice.deadline_s - time.time():.0f} s left")
            return 0
        except (OSError, RayError) as error:
            if time.time() + AGAIN_S > notice.deadline_s:
                say(f"not drained: {notice.what}: {error}")
                return 1
        time.sleep(AGAIN_S)


def say(line: str) -> None:
    print(f"vkd.spot_notice: {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("vkd.spot_notice", description=__doc__)
    parser.add_argument("cloud", choices=sorted(URLS))
    parser.add_argument("--address", help="HOST:PORT of the cluster; default: RAY_ADDRESS, else the one that was started here last")
    parser.add_argument("--node-id", help="drain this node; default: every node that runs on this machine")
    parser.add_argument("--url", help=f"the metadata service; default: {URL_VARIABLE}, else the cloud's")
    parser.add_argument("--poll-s", type=float, default=2.0, help="seconds between two questions (default: 2)")
    given = parser.parse_args(arguments)
    url = (given.url or os.environ.get(URL_VARIABLE) or URLS[given.cloud]).rstrip("/")
    notice = wait_for_notice(Aws(url).notice if given.cloud == "aws" else partial(gcp_notice, url), given.poll_s)
    return drain_in_time(notice, partial(drain, address=given.address, node_id=given.node_id))


if __name__ == "__main__":
    raise SystemExit(main())
