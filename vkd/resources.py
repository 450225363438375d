"""What a labelling asks of the cluster: filled in by the profile, checked against what there is, waited for."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import ray

from vkd.compute import Compute
from vkd.errors import ConfigError

BUSY_S = 60.0


@dataclass(frozen=True)
class Resources:
    """What the stages of a labelling execution ask for: counts, and CPUs / GPUs / threads of one task or actor."""

    decode_workers: int | None
    decode_cpus: float
    teacher_actors: int
    teacher_cpus: float
    teacher_gpus: float
    teacher_threads: int


def requested(compute: Compute, num_teachers: int, beside_training: bool = False) -> Resources:
    """The run's requests, filled in by the profile, of what training leaves.

    Raises ConfigError, naming the key, when the cluster cannot hold them.
    """
    total, student = ray.cluster_resources(), compute.student
    workers = student.max_workers if beside_training else 0
    cpus, gpus = (total.get(kind, 0.0) - workers * each for kind, each in (("CPU", student.cpus), ("GPU", student.gpus)))
    if workers and cpus < 1e-6:
        what = f"{workers} student workers take all CPUs, and labelling beside them needs some"
        raise ConfigError(what, where="compute.student", action="lower compute.student.cpus or workers, or vkd label RUN first")
    laptop = compute.profile == "laptop" or (compute.profile == "auto" and gpus == 0)
    found = _laptop(compute, cpus, num_teachers) if laptop else _cluster(compute, gpus, num_teachers)
    _check(found, cpus, gpus, num_teachers)
    return found


def _laptop(compute: Compute, cpus: float, num_teachers: int) -> Resources:
    """Half the cores for teachers, somewhat less for decoding: both run at once, and unequal requests keep Ray from fusing them."""
    cores = max(1, int(cpus))
    actors = compute.teacher.actors or min(cores, 4)
    teacher_cpus = compute.teacher.cpus if compute.teacher.cpus is not None else 0.5 * cpus / (actors * max(1, num_teachers))
    workers = compute.decode.workers or cores
    decode_cpus = compute.decode.cpus or 0.45 * cpus / workers
    threads = max(1, cores // actors)
    return Resources(workers, decode_cpus, actors, teacher_cpus, compute.teacher.gpus or 0.0, threads)


def _cluster(compute: Compute, gpus: float, num_teachers: int) -> Resources:
    """One GPU an actor, as many actors as there are GPUs for each teacher; decoding takes the CPUs that are left."""
    gpus_each = compute.teacher.gpus if compute.teacher.gpus is not None else (1.0 if gpus else 0.0)
    fitting = int(gpus / (gpus_each * max(1, num_teachers))) if gpus_each else 1
    actors = compute.teacher.actors or max(1, fitting)
    teacher_cpus = compute.teacher.cpus if compute.teacher.cpus is not None else 1.5
    threads = max(1, int(teacher_cpus))
    return Resources(compute.decode.workers, compute.decode.cpus or 1.0, actors, teacher_cpus, gpus_each, threads)


def wait_until_free(asked: Resources, num_teachers: int) -> None:
    """Wait while others hold what one decode task and all actors need; nothing would say so later. Raises ConfigError after a minute."""
    deadline_s, told = time.monotonic() + BUSY_S, False
    while True:
        free = ray.available_resources()
        lacking = [
            f"{need:g} {kind}, of which {free.get(kind.removesuffix('s'), 0.0):g} are free"
            for kind, need, _ in _needs(asked, num_teachers)
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


def _needs(asked: Resources, num_teachers: int) -> list[tuple[str, float, str]]:
    """(kind, how many at least, the keys that say so)."""
    actors = asked.teacher_actors * num_teachers
    return [
        ("GPUs", actors * asked.teacher_gpus, "compute.teacher.gpus"),
        ("CPUs", actors * asked.teacher_cpus + asked.decode_cpus, "compute.teacher.cpus or compute.decode.cpus"),
    ]


def _check(asked: Resources, cpus: float, gpus: float, num_teachers: int) -> None:
    for kind, need, keys in _needs(asked, num_teachers):
        have = gpus if kind == "GPUs" else cpus
        if need > have + 1e-6:
            what, action = f"labelling needs at least {need:g} {kind}, the cluster has {have:g}", f"lower compute.teacher.actors, {keys}"
            raise ConfigError(what, where="compute", action=action)
