"""How long a run will take, what it will cost, and which stage makes it slow. Pure arithmetic on measured costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vkd.compute import GROUP_LABEL
from vkd.efficiency import STUDENT

HOUR_S = 3600.0
HEAD = "head"


@dataclass(frozen=True)
class StageCost:
    """One stage: what an example costs it on one worker, how many workers it has, and the group whose cores it takes."""

    name: str
    group: str  # empty: any node
    num_workers: int
    busy_s: float
    cpu_s: float

    def seconds(self, num_examples: float, chunk_size: int = 1) -> float:
        """Of the clock, when its workers share the examples, each whole chunks of them."""
        waves = math.ceil(math.ceil(num_examples / chunk_size) / self.num_workers)
        return max(self.busy_s * num_examples / self.num_workers, self.busy_s * min(num_examples, waves * chunk_size))


@dataclass(frozen=True)
class Work:
    """How much there is to do: examples that lack labels, in chunks, examples of a training epoch, epochs left, bytes of an example."""

    to_label: int
    to_train: int
    epochs: float
    mode: str
    label_bytes: float
    frame_bytes: float
    chunk_size: int


@dataclass(frozen=True)
class Forecast:
    """What a run will take. Stages run side by side: the slowest, or all that share the cores of one group, decide the time."""

    stages: Sequence[StageCost]
    student: StageCost
    work: Work
    cores: Mapping[str, float]  # by group
    start_s: float

    @property
    def workers(self) -> Sequence[StageCost]:
        """All stages, and the student when there is anything to train."""
        return [*self.stages, *([self.student] if self.work.to_train else [])]

    @property
    def label_s(self) -> float:
        """Labelling alone."""
        return self._together(self.stages) + self._fill_s

    @property
    def epoch_s(self) -> float:
        """One epoch of training on labels that are there."""
        return self._together([self.student])

    @property
    def first_epoch_s(self) -> float:
        """One epoch of training, with labelling beside it."""
        return self._together([*self.stages, self.student]) + self._fill_s

    @property
    def _fill_s(self) -> float:
        """One chunk on its way through the stages that wait for the slowest."""
        busy_s = [stage.busy_s for stage in self.stages]
        return min(self.work.to_label, self.work.chunk_size) * (sum(busy_s) - max(busy_s, default=0.0))

    def _together(self, stages: Sequence[StageCost]) -> float:
        """Seconds of stages that run side by side: none is faster than its workers, nor all of a group than its cores."""
        work = self.work
        examples = {stage.name: work.to_train if stage.name == STUDENT else work.to_label for stage in stages}
        alone = [stage.seconds(examples[stage.name], 1 if stage.name == STUDENT else work.chunk_size) for stage in stages]
        shared = [
            sum(stage.cpu_s * examples[stage.name] for stage in stages if stage.group == group) / max(cores, 1e-9)
            for group, cores in self.cores.items()
        ]
        return max([*alone, *shared], default=0.0)

    @property
    def total_s(self) -> float:
        """From the start of the command to the exported student."""
        if self.work.to_label == 0 or self.work.mode == "stored":
            return self.start_s + self.label_s + self.work.epochs * self.epoch_s
        if self.work.mode == "live":
            return self.start_s + self.work.epochs * self.first_epoch_s
        return self.start_s + max(self.label_s, self.first_epoch_s) + max(0.0, self.work.epochs - 1) * self.epoch_s

    @property
    def bottleneck(self) -> str:
        """The stage, or the cores of a group, that decides how long labelling takes; the student's when nothing is to be labelled."""
        if self.work.to_label == 0:
            return STUDENT
        slowest = max(self.stages, key=lambda stage: stage.seconds(self.work.to_label))
        if slowest.seconds(self.work.to_label, self.work.chunk_size) >= 0.9 * self._together(self.stages):
            return slowest.name
        group = max(self.cores, key=lambda group: _cpu_s(self.stages, group, self.work.to_label) / max(self.cores[group], 1e-9))
        return f"cores{f' of {group}' if group else ''}"

    def balanced(self) -> dict[str, int]:
        """Workers of each labelling stage with which all take as long as the last of them, the dearest, does as it is; none without."""
        if not self.stages:
            return {}
        target_s = self.stages[-1].busy_s / self.stages[-1].num_workers
        return {stage.name: max(1, math.ceil(stage.busy_s / max(target_s, 1e-9))) for stage in self.stages}

    def storage_bytes(self) -> float:
        """What the label store will hold of this run: labels, and kept frames."""
        return self.work.to_label * (self.work.label_bytes + self.work.frame_bytes)


def _cpu_s(stages: Sequence[StageCost], group: str, num_examples: float) -> float:
    return sum(stage.cpu_s for stage in stages if stage.group == group) * num_examples


@dataclass(frozen=True)
class Prices:
    """What nodes cost, from a table that the user edits: see cluster/prices.yaml."""

    currency: str
    per_h: Mapping[str, Mapping[str, float]]  # group -> {"used", "on_demand", "spot"}: of one node
    instances: Mapping[str, str]
    storage_per_gb_month: float
    network_per_gb: float

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Prices:
        """Raises KeyError or TypeError for a table that lacks something."""
        per_h, instances = {}, {}
        for group, told in tree["groups"].items():
            price = tree["instances"][told["instance"]]
            both = {"on_demand": float(price["on_demand_per_h"]), "spot": float(price["spot_per_h"])}
            per_h[group] = both | {"used": both["spot" if told.get("spot") else "on_demand"]}
            instances[group] = told["instance"]
        return cls(tree["currency"], per_h, instances, float(tree["storage_per_gb_month"]), float(tree["network_per_gb"]))


@dataclass(frozen=True)
class GroupCost:
    """Nodes of one group over a run: how many, for how many hours, and what that costs as they are, on demand and on spot."""

    group: str
    instance: str
    nodes: int
    hours: float
    cost: float
    on_demand: float
    spot: float


def money(forecast: Forecast, nodes: Mapping[str, int], prices: Prices) -> list[GroupCost]:
    """Each group's nodes while their stage works: those that only label go when labels are there."""
    labelling = {stage.group for stage in forecast.stages} - {forecast.student.group}
    whole_h, label_h = forecast.total_s / HOUR_S, (forecast.start_s + forecast.label_s) / HOUR_S
    found = []
    for group, count in nodes.items():
        if group not in prices.per_h:
            continue
        hours = count * (label_h if group in labelling and forecast.work.mode != "live" else whole_h)
        price = prices.per_h[group]
        each = hours * price["used"], hours * price["on_demand"], hours * price["spot"]
        found.append(GroupCost(group, prices.instances[group], count, hours, *each))
    return found


def group_of(labels: Mapping[str, str]) -> str:
    """The group that a node belongs to, or a stage asks for; empty for none."""
    return labels.get(GROUP_LABEL, "")
