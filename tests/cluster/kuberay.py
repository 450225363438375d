"""The structure of KubeRay's custom resources, as its API reference has it (docs/reference/api.md), and the part of Kubernetes' own
objects that our files use. Written by hand, since no package ships it: unknown keys are refused, as the API server refuses them.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}  # "map of string": a number here is an error


def fields(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def many(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = fields(requests=QUANTITIES, limits=QUANTITIES)
CONTAINER = fields(
    "name image resources",
    name=TEXT,
    image=TEXT,
    env=many(fields("name value", name=TEXT, value={"type": "string"})),
    ports=many(fields("containerPort", containerPort=COUNT, name=TEXT)),
    resources=RESOURCES,
    volumeMounts=many(fields("name mountPath", name=TEXT, mountPath=TEXT)),
)
VOLUME = fields("name emptyDir", name=TEXT, emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY))
TOLERATION = fields("key operator", key=TEXT, operator=one_of("Exists", "Equal"), effect=one_of("NoSchedule", "NoExecute"))
POD = fields(
    "containers",
    serviceAccountName=TEXT,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=TEXTS,
    tolerations=many(TOLERATION),
    containers=many(CONTAINER),
    volumes=many(VOLUME),
)
POD_TEMPLATE = fields("spec", spec=POD)
GROUP: dict[str, Schema] = {"labels": TEXTS, "resources": TEXTS, "rayStartParams": TEXTS, "template": POD_TEMPLATE}
HEAD_GROUP = fields("template", **GROUP, serviceType=one_of("ClusterIP"))  # the others open it to outside
WORKER_GROUP = fields(
    "groupName template",
    **GROUP,
    groupName={"type": "string", "pattern": "^[a-z0-9-]+$"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
)
AUTOSCALER = fields(
    version=one_of("v1", "v2"),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    resources=RESOURCES,
)
CLUSTER_SPEC = fields(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    authOptions=fields("mode", mode=one_of("disabled", "token")),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=many(WORKER_GROUP),
)
JOB_SPEC = fields(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER_SPEC,
)
SELECTOR = fields(
    matchLabels=TEXTS,
    matchExpressions=many(fields("key operator", key=TEXT, operator=one_of("In", "NotIn", "Exists", "DoesNotExist"), values=many(TEXT))),
)
PEER = fields(podSelector=SELECTOR, namespaceSelector=SELECTOR)  # no ipBlock: nothing outside the Kubernetes cluster
POLICY_SPEC = fields(
    "podSelector policyTypes",
    podSelector=SELECTOR,
    policyTypes=many(one_of("Ingress", "Egress")),
    ingress=many(fields("from", **{"from": many(PEER)})),
)


def _resource(api: str, kind: str, spec: Schema) -> Schema:
    return fields(
        "apiVersion kind metadata spec",
        apiVersion=one_of(api),
        kind=one_of(kind),
        metadata={**fields(name=TEXT, generateName=TEXT), "minProperties": 1},
        spec=spec,
    )


KINDS = {
    "RayCluster": _resource("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": _resource("ray.io/v1", "RayJob", JOB_SPEC),
    "NetworkPolicy": _resource("networking.k8s.io/v1", "NetworkPolicy", POLICY_SPEC),
}
