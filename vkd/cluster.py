"""The Ray session: start, settings, what a run may ask for, and errors that come back from workers."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.data import DataContext
from ray.exceptions import RayError, RayTaskError

from vkd.errors import ConfigError, VkdError
from vkd.run import Compute

NO_PROGRESS_TIMEOUT_S = 900
NATIVE_STDERR = 2


@dataclass(frozen=True)
class Resources:
    """What the stages of a labelling execution ask for: counts, and CPUs / GPUs / threads of one task or actor."""

    decode_workers: int | None
    decode_cpus: float
    teacher_actors: int
    teacher_cpus: float
    teacher_gpus: float
    teacher_threads: int


@contextmanager
def session(compute: Compute) -> Iterator[None]:
    """One Ray session per command: the cluster of `compute.address` or RAY_ADDRESS, else a local one that ends with it."""
    if ray.is_initialized():
        yield
        return
    address = compute.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True, configure_logging=True, **_local_options(address))
    except (ConnectionError, RayError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r}", where="compute.address", action="start it, or leave the key out"
        ) from error
    _quieten()
    try:
        with _native_lines_to_log():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _native_lines_to_log() -> Iterator[None]:
    """Send what Ray's C++ writes to the terminal (a line for each actor that may restart) to Ray's log folder.

    Python's own stderr stays where it is.
    """
    node = ray._private.worker._global_node
    if node is None or sys.__stderr__ is None or sys.stderr is not sys.__stderr__ or sys.stderr.fileno() != NATIVE_STDERR:
        yield
        return
    python_stderr = os.fdopen(os.dup(NATIVE_STDERR), "w", buffering=1)
    kept = os.dup(NATIVE_STDERR)
    with open(os.path.join(node.get_logs_dir_path(), "vkd-driver-native.log"), "w") as log:
        os.dup2(log.fileno(), NATIVE_STDERR)
    sys.stderr = python_stderr
    try:
        yield
    finally:
        sys.stderr = sys.__stderr__
        os.dup2(kept, NATIVE_STDERR)
        os.close(kept)
        python_stderr.close()


def _local_options(address: str) -> dict[str, object]:
    return {"include_dashboard": False} if address == "local" else {}


def _quieten() -> None:
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def labelling_context(max_bytes: int) -> DataContext:
    """Settings of a labelling execution: whole chunks as blocks, bounded frames in flight, a limit without progress."""
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    context.max_errored_blocks = 0
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(object_store_memory=max_bytes)
    return context


def resources(compute: Compute, num_teachers: int) -> Resources:
    """The run's requests, filled in by the profile. Raises ConfigError, naming the key, when the cluster cannot hold them."""
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
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


def _check(asked: Resources, cpus: float, gpus: float, num_teachers: int) -> None:
    actors = asked.teacher_actors * num_teachers
    for kind, need, have, key in (
        ("GPUs", actors * asked.teacher_gpus, gpus, "compute.teacher.gpus or compute.teacher.actors"),
        ("CPUs", actors * asked.teacher_cpus + asked.decode_cpus, cpus, "compute.teacher.cpus or compute.decode.cpus"),
    ):
        if need > have + 1e-6:
            raise ConfigError(f"labelling needs at least {need:g} {kind}, the cluster has {have:g}", where="compute", action=f"lower {key}")


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise what vkd raised inside a worker as itself, not wrapped by Ray."""
    try:
        yield
    except RayError as error:
        cause = _cause(error)
        if isinstance(cause, VkdError):
            raise cause from None
        raise


def _cause(error: BaseException) -> BaseException:
    seen = error
    while True:
        inner = getattr(seen, "cause", None) if isinstance(seen, RayTaskError) else seen.__cause__
        if not isinstance(inner, BaseException) or isinstance(seen, VkdError):
            return seen
        seen = inner
