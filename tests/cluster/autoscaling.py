"""A Ray head whose autoscaler starts and ends raylets on this machine, in the groups of cluster.yaml; stopped by pid."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray  # noqa: F401  # brings psutil along
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_TYPE as HEAD_TYPE
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

import psutil  # isort: skip

OBJECT_STORE_BYTES = 200_000_000
STARTED = "Ray runtime started"
START_TIMEOUT_S = 120.0
IDLE_S = 12.0


class Provider(FakeMultiNodeProvider):  # type: ignore[misc]  # Ray is untyped
    """By this name the autoscaler finds it: the packaged configuration of Ray's own lacks a file."""


def node_type(group: str, cpus: int, max_workers: int) -> dict[str, Any]:
    """A group of at most this many nodes, none at first."""
    resources = {"CPU": cpus, "object_store_memory": OBJECT_STORE_BYTES}
    return {"resources": resources, "labels": {"vkd-group": group}, "node_config": {}, "min_workers": 0, "max_workers": max_workers}


class AutoscalingHead:
    """The head without CPUs, and the autoscaler beside it."""

    def __init__(self, node_types: dict[str, Any]) -> None:
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="vkd")), _free_port()  # Ray's sockets want a short path
        self.address = f"127.0.0.1:{self.port}"
        self.config = self.folder / "autoscaling.json"
        self.config.write_text(json.dumps(_config(self.address, node_types)))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For the head, and for all who connect to it."""
        places = [str(Path(__file__).resolve().parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
        fake |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_NODE_TYPE_NAME": HEAD_TYPE}
        return os.environ | fake | {"PYTHONPATH": os.pathsep.join(places), "RAY_AUTH_MODE": "disabled"}

    def __enter__(self) -> AutoscalingHead:
        log = self.folder / "head.log"
        words = ["start", "--head", "--block", f"--port={self.port}", "--num-cpus=0", f"--autoscaling-config={self.config}"]
        words += ["--include-dashboard=false", "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        words += ["--node-ip-address=127.0.0.1", f"--temp-dir={self.folder / 'ray'}", f"--ray-client-server-port={_free_port()}"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while STARTED not in log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"the head does not come up: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.1)
        return self

    def nodes(self) -> Counter[str]:
        """How many nodes of each group are alive, the head apart."""
        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        alive = [node for node in state.node_table() if node["Alive"]]
        state.disconnect()
        return Counter(node["Labels"]["vkd-group"] for node in alive if "vkd-group" in node["Labels"])

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        """All that the head started, the raylets of its nodes among them: they have its temporary folder in their words."""
        assert self.process is not None
        with suppress(psutil.Error):
            found = psutil.Process(self.process.pid).children(recursive=True)
            mark = str(self.folder)
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if any(mark in word for word in process.cmdline()):
                        found.append(process)
            return found
        return []


def _config(address: str, node_types: dict[str, Any]) -> dict[str, Any]:
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0, "labels": {}}
    provider = {
        "type": "external",
        "module": "autoscaling.Provider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "gcs_address": address,
        "launch_multiple": True,
        "head_node_id": HEAD,
    }
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands")
    lists += ("worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    return {
        "cluster_name": "vkd",
        "provider": provider,
        "available_node_types": {HEAD_TYPE: head, **node_types},
        "head_node_type": HEAD_TYPE,
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 100.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{name: [] for name in lists},
    }


def _free_port() -> int:
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000")
