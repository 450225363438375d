"""Labelling, and then training beside labelling, on four worker nodes of which one is lost every 20 seconds.

    python bench/chaos_cluster.py --json

Nodes are raylets of the groups decode (two), teacher and student. In a seeded order one of them, with all its processes, is killed by
SIGKILL and replaced by a new one of its group; a driver that ends is started again. First `vkd label`, then `vkd distill` in mode
tee into another store. `lost` is planned less labelled and rejected clips of both stores, `miscounted` how many examples the final
weights saw another number of times than there are epochs. Both are run in peace first: `lost_s_per_kill` is what a kill cost.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from measure import arguments, corpus  # isort: skip  # before torch: it says how OpenMP's threads wait

from chaos_check import counts
from chaos_driver import Driver, under_fire
from chaos_train import miscounted, tree_of
from raylets import Cluster

from vkd import run as run_files
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.run import Run

GROUPS = {"decode": 1, "decode 2": 1, "teacher": 1, "student": 1}  # CPUs of each node
LIMIT_S = 900.0


class Groups(Cluster):
    """A head and the four nodes."""

    def start(self) -> None:
        self.start_head()
        self.nodes = {name: self.new_node(cpus, name.split()[0]) for name, cpus in GROUPS.items()}

    def replace(self, name: str) -> None:
        """Lose a node, and get another of its group."""
        self.kill_node(self.nodes[name])
        self.nodes[name] = self.new_node(GROUPS[name], name.split()[0])


def main() -> None:
    options = arguments("vkd on nodes that are lost", every_s=20.0, seed=0, clips="wagon", keep=0)
    under_fire(chaos, options)


def chaos(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    build(str(corpus() / options.clips), str(folder / "manifest"), BuildOptions(chunk_size=8))
    cluster = Groups(folder)
    try:
        cluster.start()
        found: dict[str, Any] = {}
        for verb in ("label", "distill"):
            peace_s, _ = _until_done(cluster, _run_file(folder, f"peace-{verb}"), verb, None)
            kills = Kills(cluster, options.every_s, options.seed)
            path = _run_file(folder, f"fire-{verb}")
            fire_s, driver = _until_done(cluster, path, verb, kills)
            found |= {f"{verb}: {name}": value for name, value in _told(path, verb, kills, driver).items()}
            cost = (fire_s - peace_s) / max(1, kills.made.total())
            found |= {f"{verb}: in peace, s": peace_s, f"{verb}: under fire, s": fire_s, f"{verb}: lost_s_per_kill": cost}
    finally:
        cluster.kill_all()
    lost = sum(found[f"{verb}: lost"] for verb in ("label", "distill"))
    return {**found, "lost": lost, "miscounted": found["distill: miscounted"]}


class Kills:
    """Loses one node after another, each after a while."""

    def __init__(self, cluster: Groups, every_s: float, seed: int) -> None:
        self.cluster, self.every_s, self.random = cluster, every_s, random.Random(seed)
        self.made, self._order = Counter[str](), list[str]()

    def next(self) -> None:
        if not self._order:
            self._order = self.random.sample(list(GROUPS), len(GROUPS))
        name = self._order.pop()
        self.made[name] += 1
        print(f"    lost: {name}", flush=True)
        self.cluster.replace(name)


def _until_done(cluster: Cluster, path: Path, verb: str, kills: Kills | None) -> tuple[float, Driver]:
    """Seconds until the command has ended with success, whatever was lost meanwhile."""
    driver, started_s = Driver(cluster, [verb, str(path)], path.with_suffix(".log")), time.monotonic()
    due_s = started_s + (kills.every_s if kills else LIMIT_S)
    while not driver.keep_going():
        if time.monotonic() - started_s > LIMIT_S:
            raise RuntimeError(f"{verb} does not end; the driver said {driver.last_words()}")
        if kills is not None and time.monotonic() > due_s:
            kills.next()
            due_s += kills.every_s
        time.sleep(0.05)
    return time.monotonic() - started_s, driver


def _told(path: Path, verb: str, kills: Kills, driver: Driver) -> dict[str, Any]:
    run = run_files.load_one(path)
    found = counts(run)
    kept: Sequence[str] = ("planned", "labelled", "rejected", "lost", "duplicates")
    told: dict[str, Any] = {"kills": dict(kills.made), **{name: found[name] for name in kept}, "driver_starts": driver.starts}
    told |= {"driver_ends": dict(driver.ends), "tracebacks": driver.tracebacks}
    return told | ({"miscounted": miscounted(run)} if verb == "distill" else {})


def _run_file(folder: Path, name: str) -> Path:
    tree = tree_of(folder, workers=1)
    tree["output"], tree["labels"] = str(folder / name), {"mode": "tee", "store": str(folder / f"{name}-labels")}
    tree["data"]["clips"] = {"plan": "windows", "length_s": 2.0}
    tree["train"]["epochs"] = 3
    tree["compute"] = {
        "profile": "cluster",
        "decode": {"group": "decode", "workers": 2, "cpus": 1},
        "teacher": {"group": "teacher", "actors": 1, "cpus": 1},
        "student": {"group": "student", "workers": 1, "cpus": 1},
    }
    tree["recipe"]["num_examples"] = Plan.of(_parsed(tree)).num_examples
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _parsed(tree: dict[str, Any]) -> Run:
    return run_files.parse(yaml.safe_load(yaml.safe_dump(tree)))


if __name__ == "__main__":
    main()
