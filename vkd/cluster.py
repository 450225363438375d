"""The Ray session: start, settings, figures, and errors that come back from workers."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from ray._private import internal_api, ray_logging
from ray._private.worker import filter_autoscaler_events, print_to_stdstream
from ray.data import DataContext, TaskPoolStrategy
from ray.exceptions import LocalRayletDiedError, NodeDiedError, ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import RayTrainError, UserExceptionWithTraceback
from ray.util.annotations import RayDeprecationWarning
from ray.util.metrics import Gauge

from vkd import lifeline
from vkd.compute import GROUP_LABEL, Compute
from vkd.errors import ConfigError, VkdError

NO_PROGRESS_TIMEOUT_S = 900
CONNECT_TIMEOUT_S = 5.0
MANY_CHUNKS, BLOCKS_A_CPU = 64, 4  # Ray Data takes seconds to start, in which one process does the work of as many chunks
MAX_RETRIES = 3  # Ray's own default is without end
NATIVE_STDERR = 2
HEAD_RESOURCE = "node:__internal_head__"
GAUGES: dict[str, Gauge] = {}
LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, LocalRayletDiedError)
AUTOSCALER_SAID: set[str] = set()
SILENT_ACTORS = ("TrainController", "PlacementGroupCleaner", "_Labeller")


@contextmanager
def session(compute: Compute) -> Iterator[None]:
    """One Ray session per command: the cluster of `compute.address` or RAY_ADDRESS, else a local one that ends with it."""
    if ray.is_initialized():
        yield
        return
    address = compute.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _check_answers(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True, configure_logging=True, **_local_options(address))
    except (OSError, RayError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r}", where="compute.address", action="start it, or leave the key out"
        ) from error
    quieten()
    _hide_silent_actors()
    node = ray._private.worker._global_node
    head, _, port = node.gcs_address.rpartition(":")
    try:
        with lifeline.watched(node.raylet_socket_name, (head, int(port))), _native_lines_to_log():
            yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises OSError when nothing listens at `host:port`; Ray itself tries for a quarter of an hour, deaf to Ctrl-C."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()


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


def quieten() -> None:
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are raised, and need no second telling
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _hide_silent_actors() -> None:
    """Show what workers print, but not what some actors say, for Ray: one warns every second that there is no dashboard."""
    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    dispatcher.remove_handler("ray_print_logs")  # the name that ray.shutdown removes
    dispatcher.add_handler("ray_print_logs", _show)


def _show(data: dict[str, Any]) -> None:
    if data.get("pid") == "autoscaler":
        _tell_of_nodes(data["lines"])
    elif data.get("actor_name") not in SILENT_ACTORS:
        print_to_stdstream(data, False)


def _tell_of_nodes(lines: list[str]) -> None:
    """What the autoscaler does, once each: it says all that it has to say again every second."""
    for line in filter_autoscaler_events(lines):
        if line not in AUTOSCALER_SAID and not line.startswith("Tip:"):
            AUTOSCALER_SAID.add(line)
            print(f"vkd: autoscaler: {line}", file=sys.stderr, flush=True)


def spilled_bytes() -> int:
    """What the object stores of all nodes have written to disk so far."""
    context = ray.get_runtime_context()
    reply = internal_api.get_memory_info_reply(internal_api.get_state_from_address(context.gcs_address))
    return int(reply.store_stats.spilled_bytes_total)


def nodes_by_group() -> dict[str, int]:
    """How many nodes of each group are alive; the head counts as the group `head`, and nothing before Ray is there."""
    if not ray.is_initialized():
        return {}
    groups = (
        node["Labels"].get(GROUP_LABEL) or ("head" if HEAD_RESOURCE in node["Resources"] else "") for node in ray.nodes() if node["Alive"]
    )
    return dict(Counter(groups))


def export_metrics(figures: Mapping[str, float]) -> None:
    """Show figures to Prometheus, as gauges `ray_vkd_<name>`; to nobody where there is no Ray."""
    if not ray.is_initialized():
        return
    for name, value in figures.items():
        if name not in GAUGES:
            GAUGES[name] = Gauge(f"vkd_{name.replace('.', '_')}", description=f"vkd: {name}")
        GAUGES[name].set(value)


def labelling_context(max_bytes: int, gpus: float, paced: bool) -> DataContext:
    """Settings of a labelling execution: whole chunks as blocks, bounded frames in flight, a limit without progress.

    No such limit when it is `paced` by training: it waits then as long as a round takes. `gpus` is what its actors ask for: Ray
    Data calls for one more node of every kind while its GPUs are busy, as they should be.
    """
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1 if paced else NO_PROGRESS_TIMEOUT_S
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True  # else only the text of what a worker raises comes back
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        gpu=gpus or None, object_store_memory=max_bytes
    )
    return context


def map_chunks(fn: Callable[[Any], Any], chunks: Sequence[Any]) -> list[Any]:
    """What `fn` gives for each chunk, in any order: by Ray Data when they are many and Ray is at hand, else one by one here.

    The tasks ask for no CPU. Who calls this waits for them, and so do all others of its group: the CPUs that they hold are idle,
    and in a cluster that has no others a task that asked for one would never start.
    """
    if len(chunks) < MANY_CHUNKS or not ray.is_initialized():
        return [fn(chunk) for chunk in chunks]
    num_tasks = max(1, int(ray.cluster_resources().get("CPU", 1)))
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1  # a chunk may wait for labels that are made meanwhile
    shared = ray.put((fn, tuple(chunks)))
    with DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # bounds on retries are called so
        numbers = ray.data.from_items(list(range(len(chunks))), override_num_blocks=min(len(chunks), BLOCKS_A_CPU * num_tasks))
        answers = numbers.map_batches(
            partial(_answers, shared), batch_size=None, compute=TaskPoolStrategy(num_tasks), num_cpus=0, max_retries=MAX_RETRIES
        )
        return [row["answer"].value for row in answers.take_all()]


@dataclass(frozen=True)
class _Answer:
    """Any value, which Ray Data would else take apart."""

    value: Any


def _answers(shared: ray.ObjectRef, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    fn, chunks = ray.get(shared)
    answers = np.empty(len(batch["item"]), object)
    answers[:] = [_Answer(fn(chunks[number])) for number in batch["item"]]
    return {"answer": answers}


@contextmanager
def worker_errors() -> Iterator[None]:
    """End what an error leaves running, and raise what vkd raised inside a worker as itself, not wrapped by Ray."""
    try:
        yield
    except BaseException as error:
        let_go(error)
        cause = _cause(error) if isinstance(error, RayError | RayTrainError) else None
        if isinstance(cause, VkdError):
            raise cause from None
        if isinstance(error, LOST):
            raise _lost(error) from error
        raise


def _lost(error: BaseException) -> VkdError:
    """What to tell of a process that died, and died again when Ray had started it anew, or of an actor that did not start."""
    if isinstance(error, RayActorError) and error.actor_init_failed:
        cause = str(error).strip().splitlines()[-1].strip()
        return VkdError(
            f"an actor did not start: {cause}", action="that is the cause, or Ray's logs have it; then run the same command again"
        )
    whose = "a teacher's" if "_TeachStage" in str(error) else "a worker's"
    action = "look for the cause in Ray's logs, often too little memory; what is committed is kept: run the same command again to go on"
    return VkdError(f"{whose} process died again and again, and is not started any more", action=action)


def let_go(error: BaseException | None) -> None:
    """Let go of the datasets and actors that an error's frames hold: actors end then, and ending an execution would start Ray anew."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for held, _ in traceback.walk_stack(frame):  # those of Ray's threads are held as callers only
                with suppress(RuntimeError):  # it still runs
                    held.clear()
        error = error.__context__
    gc.collect()


def _cause(error: BaseException) -> BaseException:
    """What a worker raised; Ray's wrapper of it may be an instance of both classes."""
    seen = error
    while isinstance(seen, RayTaskError) or not isinstance(seen, VkdError):
        inner = _wrapped(seen)
        if not isinstance(inner, BaseException):
            return seen
        seen = inner
    return seen


def _wrapped(error: BaseException) -> object:
    if isinstance(error, WorkerGroupError):
        return next(iter(error.worker_failures.values()), None)
    if isinstance(error, UserExceptionWithTraceback):
        return error._base_exc
    return error.cause if isinstance(error, RayTaskError) else error.__cause__
