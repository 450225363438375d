"""Videos that are only region features: their manifest, their label set, and a run of a teacher that might have made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import small
import torch
from torch import nn

from vkd import checkpoint, derived, models, planning, schema
from vkd.clips import Sampling
from vkd.models import ModelSpec
from vkd.planning import Plan
from vkd.run import Run, parse
from vkd.schema import Columns, TensorType
from vkd.similarity_layers import NetVLAD
from vkd.store.labelset import ChunkRows, LabelSet, Reject
from vkd.students import STUDENTS
from vkd.teachers.base import Teacher

NUM_REGIONS, NUM_DIMS = 2, 16
CHUNK_SIZE = 3
Videos = Mapping[str, np.ndarray | None]  # video_id -> [t, r, d], or None where it was rejected


class Regions(Teacher):
    """Says what it would emit."""

    version = 1
    sampling = Sampling(num_frames=1, size_px=8)

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"regions": TensorType("float32", (None, NUM_REGIONS, NUM_DIMS))}

    def identity(self) -> dict[str, Any]:
        return {"name": "regions", "version": self.version}

    def load(self, device: str) -> None:
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        raise NotImplementedError

    def __call__(self, batch: Columns) -> Columns:
        raise NotImplementedError


def random_videos(num_videos: int, seed: int = 0, max_frames: int = 9) -> dict[str, np.ndarray]:
    """Unit vectors, rounded to half precision, as they are stored."""
    rng = np.random.default_rng(seed)
    found = {}
    for i in range(num_videos):
        x = rng.normal(size=(int(rng.integers(1, max_frames + 1)), NUM_REGIONS, NUM_DIMS))
        found[f"v{i:03d}"] = (x / np.linalg.norm(x, axis=2, keepdims=True)).astype(np.float16).astype(np.float32)
    return found


def table_of(rows: Sequence[Mapping[str, str | None]]) -> pa.Table:
    """A shard of these videos."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds = dict.fromkeys(names, pa.string()) | {schema.DURATION_S: pa.float64()}
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(kinds))


def run_of(folder: Path, shards: Sequence[pa.Table], *overrides: str) -> Run:
    """A run of these videos; all that it reads and writes lies in `folder`."""
    derived.write(f"{folder}/videos", shards, CHUNK_SIZE, ["test"])
    tree = small.tree_of(folder) | {"labels": {"mode": "stored", "store": f"{folder}/labels"}}
    tree["data"] = {"manifest": f"{folder}/videos"}
    tree["recipe"]["teacher"] = "paired:Regions"
    return parse(tree, overrides)


def store(run: Run, videos: Videos) -> LabelSet:
    """Write the label set of a run, as its teacher might have."""
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    label_set = LabelSet.create(run.store, planning.label_specs(run, teachers)["teacher"], {}, {}, {})
    for chunk in plan.chunks:
        examples = plan.examples(chunk)
        regions = [videos[video_id] for video_id in examples[schema.VIDEO_ID].to_pylist()]
        rejects = {row: Reject("decode", "test", "", True) for row, x in enumerate(regions) if x is None}
        label_set.write(0, chunk, ChunkRows(examples[schema.EXAMPLE_ID].to_pylist(), rejects, {"regions": regions}))
    return label_set


def with_drawn_weights(network: nn.Module) -> Any:
    """The network, weights drawn as if it were trained: as networks start, any two give nearly the same, and many pairs tie."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, NetVLAD):
            nn.init.normal_(module.reduce.weight)
            nn.init.zeros_(module.norm.bias)
    return network


def exported(folder: Path, name: str, features: str, seed: int = 0, **options: object) -> str:
    """The folder of a similarity student with random weights that knows these features."""
    torch.manual_seed(seed)
    spec = ModelSpec(name=name, options={"num_dims": NUM_DIMS, "size": "small", **options})
    student = with_drawn_weights(models.build(spec, STUDENTS, "student"))
    checkpoint.export(student, spec, str(folder), {"features": features})
    return str(folder)
