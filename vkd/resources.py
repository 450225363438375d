"""What a run asks of the cluster: filled in by the profile, checked against its nodes, waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from vkd import autoscaler
from vkd.compute import Compute, StudentGroup, TeacherPool
from vkd.errors import ConfigError
from vkd.placement import Need, Node, matching, place, total
from vkd.stages import DECODE

BUSY_S = 60.0
TEACH_SHARE, DECODE_SHARE = 0.5, 0.45  # of the cores of nodes on which both run; unequal, which keeps Ray from fusing them


@dataclass(frozen=True)
class Pool:
    """One teacher's actors: how many, what each asks for, and the labels of the nodes that they run on."""

    actors: int
    cpus: float
    gpus: float
    threads: int
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Resources:
    """What the stages of a labelling execution ask for: decode tasks at a time, CPUs of one, their nodes' labels, a pool a teacher.

    `decode_limit` is None when there may be more of them as nodes come.
    """

    decode_workers: int
    decode_limit: int | None
    decode_cpus: float
    decode_labels: Mapping[str, str]
    pools: Mapping[str, Pool]

    @property
    def num_workers(self) -> dict[str, int]:
        """By stage."""
        return {DECODE: self.decode_workers} | {alias: pool.actors for alias, pool in self.pools.items()}

    def needs(self) -> list[Need]:
        """All actors, and one decode task: what must have a place before anything can be labelled."""
        actors = [
            Need(f"{alias} actor", "compute.teacher", pool.actors, {"CPU": pool.cpus, "GPU": pool.gpus}, pool.labels)
            for alias, pool in self.pools.items()
        ]
        return [*actors, Need("decode task", "compute.decode", 1, {"CPU": self.decode_cpus}, self.decode_labels)]


def student_need(student: StudentGroup, workers: int) -> Need:
    """A group of this many student workers."""
    return Need("student worker", "compute.student", workers, {"CPU": student.cpus, "GPU": student.gpus}, student.labels)


def cluster_nodes() -> list[Node]:
    """The nodes that are alive."""
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def requested(compute: Compute, aliases: Sequence[str], beside_training: bool = False) -> Resources:
    """The requests of a run with these teachers, filled in by the profile, of what training leaves.

    Calls nodes of groups that have none yet, where the cluster autoscales, and waits for them. Raises ConfigError, naming the
    key, for what the cluster can never hold.
    """
    if unknown := sorted(set(compute.teachers) - set(aliases)):
        action = f"name one of {', '.join(aliases)}"
        raise ConfigError("the recipe has no teacher of this name", where=f"compute.teachers.{unknown[0]}", action=action)
    students = [student_need(compute.student, compute.student.min_workers)] if beside_training and compute.student.max_workers else []
    autoscaler.call_for_nodes([*students, *_least(compute, aliases)], cluster_nodes)
    free = _less_students(cluster_nodes(), compute.student) if students else cluster_nodes()
    asked = {alias: compute.teachers.get(alias, compute.teacher) for alias in aliases}
    laptop = compute.profile == "laptop" or (compute.profile == "auto" and not total(free, "GPU"))
    found = _laptop(compute, asked, free) if laptop else _cluster(compute, asked, free)
    _, lacking = place(free, found.needs())
    if lacking and not autoscaler.is_on():
        refuse(found.needs(), lacking, free)
    return found


def check_students(student: StudentGroup) -> None:
    """Raises ConfigError when the cluster can never hold the smallest student group; calls nodes for it where the cluster autoscales."""
    require(student_need(student, student.min_workers))


def require(need: Need) -> None:
    """Raises ConfigError when the cluster can never hold this; calls nodes for it where the cluster autoscales."""
    autoscaler.call_for_nodes([need], cluster_nodes)
    nodes = cluster_nodes()
    _, lacking = place(nodes, [need])
    if lacking:
        refuse([need], lacking, nodes)


def refuse(needs: Sequence[Need], lacking: Mapping[str, int], nodes: Sequence[Node]) -> None:
    """Raises ConfigError that names the first need without a place, what its nodes have, and the key."""
    need = next(need for need in needs if need.what in lacking)
    there = matching(nodes, need.labels)
    kinds = [kind for kind, amount in need.resources.items() if amount]
    have = " and ".join(f"{total(there, kind):g} {kind}s" for kind in kinds)
    count = f"{lacking[need.what]} of them find no place" if need.count > 1 else "it finds no place"
    what = f"needs {need}; {count}: the cluster has {len(there)} such node{'s' if len(there) != 1 else ''}, with {have or 'nothing'} in all"
    raise ConfigError(what, where=need.key, action=f"lower what {need.key} asks for, mend its group, or start nodes")


def _least(compute: Compute, aliases: Sequence[str]) -> list[Need]:
    """One actor of each teacher and one decode task, as far as the run file says what they ask for."""
    pools = [compute.teachers.get(alias, compute.teacher) for alias in aliases]
    actors = [
        Need(f"{alias} actor", "compute.teacher", 1, {"CPU": pool.cpus or 0.0, "GPU": _gpus(pool)}, pool.labels)
        for alias, pool in zip(aliases, pools, strict=True)
    ]
    return [*actors, Need("decode task", "compute.decode", 1, {"CPU": compute.decode.cpus or 0.01}, compute.decode.labels)]


def _gpus(pool: TeacherPool) -> float:
    return pool.gpus if pool.gpus is not None else 1.0 if pool.accelerator else 0.0


def _less_students(nodes: Sequence[Node], student: StudentGroup) -> list[Node]:
    """The nodes less as many student workers as find a place. Raises ConfigError when nothing is left for labels."""
    left, _ = place(nodes, [student_need(student, student.max_workers)])
    if total(left, "CPU") < 1e-6:
        what = f"{student.max_workers} student workers take all CPUs, and labelling beside them needs some"
        raise ConfigError(what, where="compute.student", action="lower compute.student.cpus or workers, or vkd label RUN first")
    return left


def _laptop(compute: Compute, asked: Mapping[str, TeacherPool], nodes: Sequence[Node]) -> Resources:
    """Half the cores for teachers, somewhat less for decoding: both run at once. Groups of their own take all of theirs."""

    def cores(labels: Mapping[str, str], share: float, others: Mapping[str, str]) -> tuple[float, float]:
        """What the nodes have for this, together and at most on one."""
        mine = matching(nodes, labels)
        alone = not any(node.matches(others) for node in mine)
        part = 2 * share if alone else share
        return part * total(mine, "CPU"), part * max((node.resources.get("CPU", 0.0) for node in mine), default=0.0)

    def pool(of: TeacherPool) -> Pool:
        cpus, on_one = cores(of.labels, TEACH_SHARE, compute.decode.labels)
        whole = max(1, int(total(matching(nodes, of.labels), "CPU")))
        actors = of.actors or min(whole, 4)
        each = of.cpus if of.cpus is not None else min(cpus / (actors * len(asked)), on_one)
        return Pool(actors, each, of.gpus or 0.0, max(1, whole // actors), of.labels)

    first = next(iter(asked.values()))
    cpus, on_one = cores(compute.decode.labels, DECODE_SHARE, first.labels)
    workers = compute.decode.workers or max(1, int(total(matching(nodes, compute.decode.labels), "CPU")))
    each = compute.decode.cpus or min(cpus / workers, on_one)
    return Resources(workers, workers, each, compute.decode.labels, {alias: pool(of) for alias, of in asked.items()})


def _cluster(compute: Compute, asked: Mapping[str, TeacherPool], nodes: Sequence[Node]) -> Resources:
    """One GPU an actor, as many actors as there are GPUs for each teacher; decoding takes the CPUs that are left."""

    def pool(of: TeacherPool) -> Pool:
        gpus = total(matching(nodes, of.labels), "GPU")
        each = of.gpus if of.gpus is not None else (1.0 if gpus else 0.0)
        actors = of.actors or max(1, int(gpus / (each * len(asked))) if each else 1)
        cpus = of.cpus if of.cpus is not None else 1.5
        return Pool(actors, cpus, each, max(1, int(cpus)), of.labels)

    pools = {alias: pool(of) for alias, of in asked.items()}
    each = compute.decode.cpus or 1.0
    workers = compute.decode.workers or max(1, int(total(matching(nodes, compute.decode.labels), "CPU") / each))
    return Resources(workers, compute.decode.workers, each, compute.decode.labels, pools)


def wait_until_free(asked: Resources) -> None:
    """Wait while others hold what one decode task and all actors need; nothing would say so later. Raises ConfigError after a minute.

    A cluster that autoscales may start nodes for it: there nothing is waited for.
    """
    deadline_s, told = time.monotonic() + BUSY_S, False
    while not autoscaler.is_on():
        free = ray.available_resources()
        lacking = [
            f"{amount:g} {kind}s, of which {free.get(kind, 0.0):g} are free"
            for kind, amount in _sums(asked.needs()).items()
            if amount > free.get(kind, 0.0) + 1e-6
        ]
        if not lacking:
            return
        if time.monotonic() > deadline_s:
            action = "wait for the job that holds them, or lower compute.teacher.actors"
            raise ConfigError(f"the cluster is busy: labelling needs {' and '.join(lacking)}", where="compute", action=action)
        if not told and deadline_s - time.monotonic() < BUSY_S - 5.0:
            print(f"the cluster is busy: labelling needs {' and '.join(lacking)}; waiting for a minute", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)


def _sums(needs: Sequence[Need]) -> dict[str, float]:
    kinds = dict.fromkeys(kind for need in needs for kind in need.resources)
    return {kind: sum(need.count * need.resources.get(kind, 0.0) for need in needs) for kind in kinds}
