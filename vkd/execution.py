"""One labelling execution on Ray Data: items -> decode -> one pool of actors a teacher."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.util.annotations import RayDeprecationWarning

from vkd import cluster, stages
from vkd.errors import VkdError
from vkd.resources import Resources
from vkd.schema import Columns
from vkd.stages import ITEM, STATS, Job
from vkd.teaching import Teach

MAX_RETRIES = 3  # Ray's own default is without end


def execute(job: Job, asked: Resources, paced: bool) -> Iterator[dict[str, Any]]:
    """The labelling execution; yields the statistics of each chunk as it is committed."""
    num_workers = asked.num_workers
    frame_bytes = sum(s.num_frames * s.size_px**2 * 3 for s in job.decoding.samplings) * job.plan.chunk_size
    gpus = sum(pool.actors * pool.gpus for pool in asked.pools.values())
    cluster.labelling_context(frame_bytes * 4 * sum(num_workers.values()), gpus, paced)
    with warnings.catch_warnings():
        # 2.60 knows bounds on retries only as `ray_remote_args`, which it calls deprecated, and retries without end by default
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = _dataset(replace(job, decoding=job.decoding.share(num_workers[stages.DECODE])), asked)
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        yield from (json.loads(text) for text in batch[STATS])


def _dataset(job: Job, asked: Resources) -> Dataset:
    """items -> decode -> one pool of actors a teacher; not yet started."""
    shared = ray.put(job)
    num_items = len(job.items)
    where = {"label_selector": dict(asked.decode_labels)} if asked.decode_labels else {}
    dataset = ray.data.read_datasource(
        _Items(num_items), override_num_blocks=num_items, num_cpus=asked.decode_cpus, ray_remote_args={"max_retries": MAX_RETRIES, **where}
    )
    dataset = dataset.map_batches(
        partial(_decode_stage, shared),
        batch_size=None,
        compute=TaskPoolStrategy(asked.decode_limit),
        num_cpus=asked.decode_cpus,
        max_retries=MAX_RETRIES,
        **where,
    )
    *_, last = job.teachers
    for alias, pool in asked.pools.items():
        dataset = dataset.map_batches(
            _TeachStage,
            fn_constructor_args=(shared, alias, pool.threads, alias == last),
            batch_size=None,
            compute=ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            label_selector=dict(pool.labels) or None,
            max_restarts=MAX_RETRIES,
            max_task_retries=MAX_RETRIES,
        )
    return dataset


class _Items(Datasource):  # type: ignore[misc]  # Ray is untyped
    """One block of one row per item: its number. One item stays one block from here to the store."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.num_items = num_items

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
        return [ReadTask(partial(_item_block, i), metadata) for i in range(self.num_items)]


def _item_block(number: int) -> list[pa.Table]:
    return [pa.table({ITEM: pa.array([number], pa.int64())})]


@lru_cache(maxsize=1)
def _job_of(shared: ray.ObjectRef) -> Job:
    job: Job = ray.get(shared)
    return job


def _decode_stage(shared: ray.ObjectRef, batch: Columns) -> Columns:
    return stages.decode(_job_of(shared), batch)


class _TeachStage:
    """A teacher in an actor. What its start raises is kept for the first call: of a constructor Ray hands on only the text."""

    def __init__(self, shared: ray.ObjectRef, alias: str, num_threads: int, last: bool) -> None:
        self.teach: Teach | VkdError
        try:
            self.teach = Teach(_job_of(shared), alias, num_threads, last)
        except VkdError as error:
            self.teach = error

    def __call__(self, batch: Columns) -> Columns:
        if isinstance(self.teach, VkdError):
            raise self.teach
        return self.teach(batch)
