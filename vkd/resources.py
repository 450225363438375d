"""What a labelling asks of the cluster: filled in by the profile, checked against what there is, waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from vkd.compute import Compute, TeacherPool
from vkd.errors import ConfigError
from vkd.stages import DECODE

BUSY_S = 60.0


@dataclass(frozen=True)
class Pool:
    """One teacher's actors: how many, and what each asks for."""

    actors: int
    cpus: float
    gpus: float
    threads: int


@dataclass(frozen=True)
class Resources:
    """What the stages of a labelling execution ask for: decode tasks at a time (none: as many as fit), CPUs of one, a pool a teacher."""

    decode_workers: int | None
    decode_cpus: float
    pools: Mapping[str, Pool]

    @property
    def num_workers(self) -> dict[str, int]:
        """By stage, as the cluster is now."""
        decoders = self.decode_workers or int(ray.cluster_resources()["CPU"])
        return {DECODE: decoders} | {alias: pool.actors for alias, pool in self.pools.items()}


def requested(compute: Compute, aliases: Sequence[str], beside_training: bool = False) -> Resources:
    """The requests of a run with these teachers, filled in by the profile, of what training leaves.

    Raises ConfigError, naming the key, when the cluster cannot hold them.
    """
    if unknown := sorted(set(compute.teachers) - set(aliases)):
        action = f"name one of {', '.join(aliases)}"
        raise ConfigError("the recipe has no teacher of this name", where=f"compute.teachers.{unknown[0]}", action=action)
    total, student = ray.cluster_resources(), compute.student
    workers = student.max_workers if beside_training else 0
    cpus, gpus = (total.get(kind, 0.0) - workers * each for kind, each in (("CPU", student.cpus), ("GPU", student.gpus)))
    if workers and cpus < 1e-6:
        what = f"{workers} student workers take all CPUs, and labelling beside them needs some"
        raise ConfigError(what, where="compute.student", action="lower compute.student.cpus or workers, or vkd label RUN first")
    laptop = compute.profile == "laptop" or (compute.profile == "auto" and not total.get("GPU"))
    asked = {alias: compute.teachers.get(alias, compute.teacher) for alias in aliases}
    found = _laptop(compute, asked, cpus) if laptop else _cluster(compute, asked, gpus)
    _check(found, cpus, gpus)
    return found


def _laptop(compute: Compute, asked: Mapping[str, TeacherPool], cpus: float) -> Resources:
    """Half the cores for teachers, somewhat less for decoding: both run at once, and unequal requests keep Ray from fusing them."""
    cores = max(1, int(cpus))

    def pool(of: TeacherPool) -> Pool:
        actors = of.actors or min(cores, 4)
        each = of.cpus if of.cpus is not None else 0.5 * cpus / (actors * len(asked))
        return Pool(actors, each, of.gpus or 0.0, max(1, cores // actors))

    workers = compute.decode.workers or cores
    return Resources(workers, compute.decode.cpus or 0.45 * cpus / workers, {alias: pool(of) for alias, of in asked.items()})


def _cluster(compute: Compute, asked: Mapping[str, TeacherPool], gpus: float) -> Resources:
    """One GPU an actor, as many actors as there are GPUs for each teacher; decoding takes the CPUs that are left."""

    def pool(of: TeacherPool) -> Pool:
        each = of.gpus if of.gpus is not None else (1.0 if gpus else 0.0)
        actors = of.actors or max(1, int(gpus / (each * len(asked))) if each else 1)
        cpus = of.cpus if of.cpus is not None else 1.5
        return Pool(actors, cpus, each, max(1, int(cpus)))

    return Resources(compute.decode.workers, compute.decode.cpus or 1.0, {alias: pool(of) for alias, of in asked.items()})


def wait_until_free(asked: Resources) -> None:
    """Wait while others hold what one decode task and all actors need; nothing would say so later. Raises ConfigError after a minute."""
    deadline_s, told = time.monotonic() + BUSY_S, False
    while True:
        free = ray.available_resources()
        lacking = [
            f"{need:g} {kind}, of which {free.get(kind.removesuffix('s'), 0.0):g} are free"
            for kind, need, _ in _needs(asked)
            if need > free.get(kind.removesuffix("s"), 0.0) + 1e-6
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


def _needs(asked: Resources) -> list[tuple[str, float, str]]:
    """(kind, how many at least, the keys that say so)."""
    gpus = sum(pool.actors * pool.gpus for pool in asked.pools.values())
    cpus = sum(pool.actors * pool.cpus for pool in asked.pools.values()) + asked.decode_cpus
    return [("GPUs", gpus, "compute.teacher.gpus"), ("CPUs", cpus, "compute.teacher.cpus or compute.decode.cpus")]


def _check(asked: Resources, cpus: float, gpus: float) -> None:
    for kind, need, keys in _needs(asked):
        have = gpus if kind == "GPUs" else cpus
        if need > have + 1e-6:
            what, action = f"labelling needs at least {need:g} {kind}, the cluster has {have:g}", f"lower compute.teacher.actors, {keys}"
            raise ConfigError(what, where="compute", action=action)
