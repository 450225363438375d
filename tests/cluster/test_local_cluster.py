"""cluster/local.sh on this machine: nodes of every group, one that is killed, and nothing left in the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

SCRIPT = Path(__file__).parents[2] / "cluster" / "local.sh"


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def settings() -> Iterator[dict[str, str]]:
    """The script's environment; its folder is short, because sockets lie in it."""
    folder = tempfile.mkdtemp(prefix="vkd", dir="/tmp")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ports = {"VKD_LOCAL_PORT": free_port(), "VKD_LOCAL_DASHBOARD_PORT": free_port()}
    yield {**os.environ, **ports, "PATH": path, "VKD_LOCAL_DIR": folder, "RAY_AUTH_MODE": "disabled"}
    shutil.rmtree(folder, ignore_errors=True)


def processes(folder: str) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if folder in line]


@pytest.mark.slow
def test_every_group_is_there_until_it_is_stopped(settings: dict[str, str]) -> None:
    import ray

    def script(*arguments: str) -> str:
        return subprocess.run([str(SCRIPT), *arguments], env=settings, capture_output=True, text=True, check=True).stdout

    def groups() -> set[str]:
        return {node["Labels"]["vkd-group"] for node in ray.nodes() if node["Alive"]}

    try:
        assert f"address 127.0.0.1:{settings['VKD_LOCAL_PORT']}" in script("start")
        ray.init(f"127.0.0.1:{settings['VKD_LOCAL_PORT']}", logging_level="ERROR", log_to_driver=False)
        assert groups() == {"head", "decode", "teacher", "student"}
        assert {node["Labels"]["vkd-group"]: node["Resources"].get("CPU", 0) for node in ray.nodes()}["head"] == 0
        task = ray.remote(num_cpus=1, label_selector={"vkd-group": "teacher"})(lambda: ray.get_runtime_context().get_node_labels())
        assert ray.get(task.remote())["vkd-group"] == "teacher"
        script("kill", "teacher")
        ends_s = time.monotonic() + 60
        while groups() != {"head", "decode", "student"}:
            assert time.monotonic() < ends_s
            time.sleep(0.2)
        assert script("status").split()[::2] == ["head", "decode", "student"]
    finally:
        ray.shutdown()
        script("stop")
    time.sleep(1)
    assert processes(settings["VKD_LOCAL_DIR"]) == []
