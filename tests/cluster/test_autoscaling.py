"""A cluster that is a head alone grows to the groups that a run asks for, and shrinks again when they are idle."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from autoscaling import AutoscalingHead, node_type

GROUPS = {"decode": 2, "teacher": 2, "student": 1}
LIMIT_S = 150.0


@pytest.fixture(scope="module")
def head() -> Iterator[AutoscalingHead]:
    types = {group: node_type(group, 2 if group == "decode" else 1, most) for group, most in GROUPS.items()}
    with AutoscalingHead(types) as started:
        yield started


@pytest.fixture(scope="module")
def videos(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    shutil.copy(clips_dir / "carphone_pristine.mp4", folder)
    return folder


def run_file(folder: Path, videos: Path, **groups: str) -> Path:
    tree = harness.small_run(folder, videos)
    tree["data"]["chunk_size"] = 1
    tree["labels"]["mode"] = "tee"
    tree["compute"] = {
        "profile": "cluster",
        "decode": {"group": groups.get("decode", "decode"), "cpus": 1},
        "teacher": {"group": groups.get("teacher", "teacher"), "actors": 2, "cpus": 1},
        "student": {"group": "student", "workers": 1, "cpus": 1},
    }
    return harness.write(tree, folder / "run.yaml")


def vkd(head: AutoscalingHead, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen([str(harness.VKD), *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_group_that_no_node_has_is_refused(head: AutoscalingHead, videos: Path, tmp_path: Path) -> None:
    started = vkd(head, "label", str(run_file(tmp_path, videos, teacher="nobody")))
    said, _ = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 2, said
    assert "compute.teacher: needs 1 teacher actor" in said and "no kind of node of this cluster has that" in said
    assert "Traceback" not in said


@pytest.mark.slow  # a minute
def test_nodes_come_for_a_run_and_go_after_it(head: AutoscalingHead, videos: Path, tmp_path: Path) -> None:
    started, began_s, seen = vkd(head, "distill", str(run_file(tmp_path, videos))), time.monotonic(), list[Counter[str]]()
    said = ""
    while time.monotonic() - began_s < LIMIT_S and not (started.poll() is not None and not head.nodes()):
        if (now := head.nodes()) != (seen[-1] if seen else None):
            seen.append(now)
        time.sleep(0.2)
    said, _ = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 0, said
    assert "4 labelled, 0 rejected of 4 clips" in said
    most = {group: max(count[group] for count in seen) for group in GROUPS}
    assert most["teacher"] == 2 and most["student"] == 1 and 1 <= most["decode"] <= 2, seen
    assert not head.nodes(), f"idle nodes stay: {seen}"
