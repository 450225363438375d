"""The Kubernetes files: the structure of KubeRay's resources, and what Ray's autoscaler makes of them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import jsonschema
import kuberay
import pytest
import yaml

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as autoscaling_config

FOLDER = Path(__file__).parents[2] / "cluster"
KINDS = {"raycluster.yaml": ["RayCluster", "NetworkPolicy"], "rayjob.yaml": ["RayJob"]}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def check(document: dict[str, Any]) -> None:
    jsonschema.validate(document, kuberay.KINDS[document["kind"]])


def cluster_spec(name: str) -> dict[str, Any]:
    spec = documents(name)[0]["spec"]
    found = spec.get("rayClusterSpec", spec)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_its_structure_is_that_of_the_resource(name: str) -> None:
    assert [document["kind"] for document in documents(name)] == KINDS[name]
    for document in documents(name):
        check(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("enableInTreeAutoscalling", True),
        ("enableInTreeAutoscaling", "yes"),
        ("rayVersion", 2.6),
        ("autoscalerOptions.version", 2),
        ("autoscalerOptions.idleTimeoutMinutes", 10),
        ("authOptions.mode", "basic"),
        ("headGroupSpec.serviceType", "LoadBalancer"),
        ("headGroupSpec.resources.CPU", 0),
        ("workerGroupSpecs.1.label", {"vkd-group": "teacher"}),
        ("workerGroupSpecs.1.maxReplicas", "8"),
        ("workerGroupSpecs.1.rayStartParams.object-store-memory", 8589934592),
        ("workerGroupSpecs.1.template.spec.containers.0.resources.limits.cpu", "seven"),
        ("workerGroupSpecs.1.template.containers", []),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_key_is_refused(name: str, path: str, value: object) -> None:
    document = copy.deepcopy(documents(name)[0])
    place: Any = document["spec"].get("rayClusterSpec", document["spec"])
    *parents, key = path.split(".")
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    place[key] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_a_job_has_the_clusters_groups() -> None:
    assert cluster_spec("rayjob.yaml") == cluster_spec("raycluster.yaml")


def test_a_job_ends_and_leaves_nothing_that_costs() -> None:
    spec = documents("rayjob.yaml")[0]["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["activeDeadlineSeconds"] > 0


def test_the_autoscaler_reads_groups_labels_and_time_outs() -> None:
    """Ray's own translation of the resource; it validates what it makes."""
    resource = documents("raycluster.yaml")[0]
    resource["metadata"]["namespace"] = "default"
    config = autoscaling_config(resource)
    kinds = config["available_node_types"]
    assert {name: kind["labels"]["vkd-group"] for name, kind in kinds.items()} == {
        "headgroup": "head",
        "decode": "decode",
        "teacher": "teacher",
        "student": "student",
    }
    assert (kinds["headgroup"]["resources"]["CPU"], kinds["headgroup"]["resources"]["GPU"]) == (0, 0)
    assert {name: kind["resources"].get("GPU", 0) for name, kind in kinds.items() if name != "headgroup"} == {
        "decode": 0,
        "teacher": 1,
        "student": 1,
    }
    assert kinds["teacher"]["labels"]["ray.io/accelerator-type"] == "L4"
    assert (config["idle_timeout_minutes"], kinds["teacher"]["idle_timeout_s"], kinds["student"]["idle_timeout_s"]) == (10, 180, 300)


def test_groups_and_labels_are_those_of_cluster_yaml() -> None:
    ours = yaml.safe_load((FOLDER.parent / "cluster.yaml").read_text())["available_node_types"]
    for group in cluster_spec("raycluster.yaml")["workerGroupSpecs"]:
        other = ours[group["groupName"]]
        assert (group["labels"], group["maxReplicas"]) == (other["labels"], other["max_workers"])
        assert int(group["rayStartParams"]["object-store-memory"]) == other["resources"]["object_store_memory"]
        assert group.get("idleTimeoutSeconds") == other.get("idle_timeout_s")


def test_a_token_is_asked_for() -> None:
    assert cluster_spec("raycluster.yaml")["authOptions"] == {"mode": "token"}
