"""A small run of a fake teacher on real clips, and its labels made without Ray by the functions that Ray's workers call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from vkd import checkpoint, models, planning, stages, worklist
from vkd.checkpoint import Position
from vkd.feeding import Feeder, open_sets
from vkd.models import ModelSpec
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.run import Run, parse
from vkd.schema import TRAIN, Columns
from vkd.stages import ITEM, STATS, Job
from vkd.store.labelset import LabelSet
from vkd.students import STUDENTS
from vkd.teaching import Teach
from vkd.worklist import Retry

Tree = dict[str, Any]
STAGED: Tree = {
    "name": "substage",
    "teacher": {"name": "fakes:Staged"},
    "student": {"name": "tiny_r3d", "num_frames": 2, "size_px": 32, "widths": [4, 4, 6, 6]},
    "substages": ["layer2", "layer4"],
    "cascade": {"warmup": 1, "per_stage": 1, "joint": 2},
}


def with_many_keyframes(source: Path, target: Path, *, backwards: bool) -> None:
    """The same video encoded anew with a keyframe every half second: clips of it decode in little time."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream("libx264", rate=30, options={"g": "15", "bf": "0", "sc_threshold": "0", "preset": "ultrafast"})
        stream.width, stream.height = old.streams.video[0].width, old.streams.video[0].height
        frames = list(old.decode(video=0))
        for index, frame in enumerate(frames[::-1] if backwards else frames):
            frame.pts, frame.time_base = index, Fraction(1, 30)
            frame.pict_type = av.video.frame.PictureType.NONE
            new.mux(stream.encode(frame))
        new.mux(stream.encode(None))


def tree_of(folder: Path) -> Tree:
    """A run of TinyTeacher and a small student: all that it reads and writes lies in `folder`."""
    return {
        "name": "small",
        "output": str(folder / "out"),
        "data": {
            "manifest": str(folder / "manifest"),
            "allow": ["/"],
            "clips": {"plan": "windows", "length_s": 0.5},
            "split": {"by": "time", "holdout": 0.26},
            "keep_frames": "raw",
        },
        "labels": {"mode": "stored", "store": str(folder / "labels"), "encodings": {"logits": "fp32", "embedding": "fp32"}},
        "recipe": {"name": "kd", "teacher": "fakes:TinyTeacher", "student": {"name": "shift_cnn", "num_frames": 2, "size_px": 32}},
        "train": {"epochs": 3, "batch_size": 8, "learning_rate": 0.002},
        "checkpoint": {"every_examples": 10},
    }


def changed(run: Run, *overrides: str) -> Run:
    """The run with `key=value` changes."""
    return parse(run.model_dump(mode="json"), overrides)


def job_of(run: Run, retry: Retry | None = None) -> Job:
    """The labelling of what the store of a run lacks, or of rejects."""
    from vkd import labelling  # imports Ray, which takes seconds

    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    specs = planning.label_specs(run, teachers)
    store, num_views = run.labels.store, run.data.views.count
    if retry is None:
        items = worklist.missing_items(store, range(num_views), specs, plan.chunks)
    else:
        items = worklist.retry_items(store, num_views, specs, plan.chunks, retry)
    if FRAMES_ALIAS in specs:
        LabelSet.create(run.labels.store, specs[FRAMES_ALIAS], {}, stages.recorded(), {})
    return labelling._job(run, plan, specs, teachers, items)


def label(run: Run, retry: Retry | None = None) -> Job:
    """Label what lacks, or rejects again, chunk by chunk in this process."""
    job = job_of(run, retry)
    for _ in execute(job):
        pass
    return job


def execute(job: Job, *_: object) -> Iterator[Tree]:
    """What Ray's workers do, in this process: the statistics of each chunk as it is committed."""
    teach = {alias: Teach(job, alias, 1, last=alias == list(job.teachers)[-1]) for alias in job.teachers}
    for number in range(len(job.items)):
        batch = decoded(job, number)
        for teacher in teach.values():
            batch = teacher(batch)
        yield stats_of(batch)


def decoded(job: Job, number: int = 0) -> Columns:
    """One item of a job after the decode stage."""
    return stages.decode(job, {ITEM: np.array([number])})


def feeder_of(run: Run, split: str = TRAIN, rank: int = 0, world_size: int = 1) -> Feeder:
    """Feeds one rank from the run's label sets."""
    plan, sets = open_sets(run, Plan.of(run))
    return Feeder(run, plan, sets, split, rank, world_size)


def copied(run: Run, folder: Path) -> Run:
    """The run with a copy of its label store, to be spoilt."""
    shutil.copytree(run.labels.store, folder / "labels")
    return changed(run, f"labels.store={folder}/labels")


def chunk_files(run: Run, alias: str) -> list[Path]:
    """The committed files of one label set, in the order of their chunks."""
    return sorted(Path(run.labels.store).glob(f"{alias}-*/view=*/*/chunk-*.parquet"))


def save_checkpoint(attempt: str, position: Position, distiller: nn.Module, optimizer: Optimizer) -> None:
    """What rank 0 saves after a round."""
    checkpoint.save(attempt, position.step, checkpoint.snapshot(position, distiller, optimizer))


def exported_student(folder: Path, seed: int = 0, name: str = "shift_cnn", heads: Mapping[str, int] | None = None) -> str:
    """The folder of a small student with two heads, or others, and random weights."""
    torch.manual_seed(seed)
    spec = ModelSpec(name=name, options={"num_frames": 4, "size_px": 32})
    student = models.build(spec, STUDENTS, "student", heads=heads or {"logits": 10, "embedding": 16})
    checkpoint.export(student, spec, str(folder), {})
    return str(folder)


def write(tree: Tree, path: Path) -> Path:
    """The tree as a run file."""
    path.write_text(yaml.safe_dump(tree))
    return path


def committed(job: Job, alias: str, number: int) -> pa.Table:
    """What is committed of one item."""
    item = job.items[number]
    return LabelSet.open(job.store, job.specs[alias]).read(item.view, item.chunk, verify=True)


def missing(job: Job, alias: str) -> list[Chunk]:
    """The chunks that one label set lacks."""
    return LabelSet.open(job.store, job.specs[alias]).missing(0, job.plan.chunks)


def stats_of(batch: Columns) -> Tree:
    """The statistics of one chunk, as the last stage gives them."""
    (text,) = batch[STATS].tolist()
    found: Tree = json.loads(text)
    return found
