"""Whether a cluster's nodes hold what a run asks for. Pure arithmetic: nodes and needs are tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SLACK = 1e-6  # fractions of a CPU add up to a little more than what they are fractions of


@dataclass(frozen=True)
class Node:
    """One node: what it has, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(self.labels.get(key) == value for key, value in labels.items())


@dataclass(frozen=True)
class Need:
    """`count` workers, each of which takes `resources` of one node that carries `labels`; `key` of the run file says so."""

    what: str
    key: str
    count: int
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for kind, amount in self.resources.items() if amount)
        where = "".join(f", on nodes with the label {key}={value}" for key, value in self.labels.items())
        return f"{self.count} {self.what}{'s' if self.count != 1 else ''} of {each or 'nothing'}{' each' if self.count > 1 else ''}{where}"


def matching(nodes: Iterable[Node], labels: Mapping[str, str]) -> list[Node]:
    """The nodes that carry these labels."""
    return [node for node in nodes if node.matches(labels)]


def total(nodes: Iterable[Node], kind: str) -> float:
    """How much of one kind of resource the nodes have."""
    return sum(node.resources.get(kind, 0.0) for node in nodes)


def place(nodes: Sequence[Node], needs: Iterable[Need]) -> tuple[list[Node], dict[str, int]]:
    """What is left of the nodes once each need in turn has taken its first fit, and how many workers of each `what` found no place."""
    free = [dict(node.resources) for node in nodes]
    lacking: dict[str, int] = {}
    for need in needs:
        placed = 0
        for node, has in zip(nodes, free, strict=True):
            if not node.matches(need.labels):
                continue
            while placed < need.count and all(has.get(kind, 0.0) + SLACK >= amount for kind, amount in need.resources.items()):
                for kind, amount in need.resources.items():
                    has[kind] = has.get(kind, 0.0) - amount
                placed += 1
        if placed < need.count:
            lacking[need.what] = need.count - placed
    return [Node(has, node.labels) for node, has in zip(nodes, free, strict=True)], lacking
