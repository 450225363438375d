"""The cluster's autoscaler: whether there is one, and nodes that are called for before a run starts on them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from vkd.errors import ConfigError
from vkd.placement import Need, Node, place

LOOK_S, TELL_S = 1.0, 30.0
LEAST = {"CPU": 0.001}  # of a need that asks for nothing, since Ray wants something


def is_on() -> bool:
    """Whether nodes may come by themselves: Ray's second autoscaler runs, which alone knows labels."""
    return bool(_status().autoscaling_state.autoscaler_state_version)


def call_for_nodes(needs: Sequence[Need], nodes: Callable[[], Sequence[Node]]) -> None:
    """Where the cluster autoscales and its nodes do not hold the needs, wait for nodes that do, and tell of it now and then.

    Raises ConfigError, naming the key, as soon as the autoscaler says that no kind of node ever will.
    """
    _, lacking = place(nodes(), needs)
    if not lacking or not is_on():
        return
    called = {_reserved(need): need for need in needs}
    try:
        _wait_for(called)
    finally:
        for group in called:
            remove_placement_group(group)


def _reserved(need: Need) -> PlacementGroup:
    """Places for one need, which exist once nodes do."""
    bundle = {kind: amount for kind, amount in need.resources.items() if amount} or LEAST
    return placement_group([dict(bundle)] * need.count, bundle_label_selector=[dict(need.labels)] * need.count)


def _wait_for(called: dict[PlacementGroup, Need]) -> None:
    told_s = time.monotonic() - TELL_S + 5.0
    waiting = dict(called)
    while waiting:
        waiting = {group: need for group, need in waiting.items() if not group.wait(LOOK_S)}
        state = _status().autoscaling_state
        never = " ".join(request.details for request in state.infeasible_gang_resource_requests)
        for group, need in waiting.items():
            if group.id.hex() in never:
                what = f"needs {need}, and no kind of node of this cluster has that"
                raise ConfigError(what, where=need.key, action=f"mend {need.key}, or add such nodes to the cluster's configuration")
        if waiting and time.monotonic() - told_s > TELL_S:
            told_s = time.monotonic()
            starting = len(state.pending_instances) + sum(request.count for request in state.pending_instance_requests)
            lacking = "; ".join(str(need) for need in waiting.values())
            print(f"vkd: waiting for nodes, {starting} starting: needs {lacking}", file=sys.stderr, flush=True)


def _status() -> GetClusterStatusReply:
    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status(timeout_s=10))
    return reply
