"""The run of chaos_label.py, and what is found in its store in the end: counts against the plan, labels against those of a quiet run."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measure import corpus

from vkd import labelling, planning, stages
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import EXAMPLE_ID, LABELLED, REJECTED, STATUS
from vkd.stages import ITEM, Item
from vkd.store.encodings import cosine, decode
from vkd.store.labelset import LabelSet
from vkd.teaching import Teach

DECODE_WORKERS, TEACHER_ACTORS = 2, 1
CHUNK_SIZE = 8


def notes_of(folder: Path) -> Path:
    """Where the teachers of the run note what they begin."""
    return folder / "noted.txt"


def tree_of(folder: Path) -> dict[str, Any]:
    """A run of small chunks: one second of each clip, two frames for the teacher."""
    return {
        "name": "chaos",
        "output": str(folder / "out"),
        "data": {
            "manifest": str(folder / "manifest"),
            "allow": [str(corpus())],
            "clips": {"plan": "windows", "length_s": 1.0},
            "keep_frames": "jpeg",
        },
        "labels": {"store": str(folder / "labels")},
        "recipe": {
            "name": "kd",
            "teacher": {"name": "chaos_teacher:NotedTeacher", "notes": str(notes_of(folder))},
            "student": {"name": "shift_cnn", "num_frames": 2, "size_px": 32},
        },
        "compute": {"decode": {"workers": DECODE_WORKERS}, "teacher": {"actors": TEACHER_ACTORS}},
    }


def counts(run: Run) -> dict[str, int]:
    """Planned examples against those in the winning attempts of the teacher's set."""
    plan, label_set = Plan.of(run), sets_of(run)["teacher"]
    planned: Counter[tuple[int, str]] = Counter()
    found: Counter[tuple[int, str]] = Counter()
    statuses: Counter[str] = Counter()
    for view in range(run.data.views.count):
        planned.update((view, key) for chunk in plan.chunks for key in plan.examples(chunk)[EXAMPLE_ID].to_pylist())
        for chunk in label_set.committed(view):
            table = label_set.read(view, chunk, verify=True)
            found.update((view, key) for key in table[EXAMPLE_ID].to_pylist())
            statuses.update(table[STATUS].to_pylist())
    return {
        "chunks": len(plan.chunks) * run.data.views.count,
        "planned": planned.total(),
        "labelled": statuses[LABELLED],
        "rejected": statuses[REJECTED],
        "lost": (planned - found).total(),
        "duplicates": (found - planned).total(),
    }


def compared(run: Run, store: Path, num_threads: int, count: int) -> dict[str, Any]:
    """Chunks (all, or a sample of `count`) made again in this process by the functions that workers call.

    How many are equal to the bit, and the lowest cosine.
    """
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    specs, old = planning.label_specs(run, teachers), sets_of(run)
    here = run.model_copy(update={"labels": run.labels.model_copy(update={"store": str(store)})})
    items = [Item(view, chunk, tuple(specs)) for view in range(run.data.views.count) for chunk in plan.chunks]
    random.Random(0).shuffle(items)
    items = items[: count or None]
    job = labelling._job(here, plan, specs, teachers, items)
    LabelSet.create(str(store), specs["frames"], {}, {}, {})
    teach = Teach(job, "teacher", num_threads, last=True)
    new = sets_of(here)
    equal, lowest = Counter[str](), 1.0
    for number, item in enumerate(items):
        teach(stages.decode(job, {ITEM: np.array([number])}))
        tables = {alias: (old[alias].read(item.view, item.chunk), new[alias].read(item.view, item.chunk)) for alias in specs}
        equal.update(alias for alias, (a, b) in tables.items() if a.equals(b))
        a, b = tables["teacher"]
        lowest = min(lowest, *(_cosine(a, b, name) for name in specs["teacher"].tensors))
    return {f"bit_equal, {alias}": f"{equal[alias]} of {len(items)} chunks" for alias in specs} | {"cosine_min": lowest}


def sets_of(run: Run) -> dict[str, LabelSet]:
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    return {alias: LabelSet.open(run.labels.store, spec) for alias, spec in specs.items()}


def _cosine(a: pa.Table, b: pa.Table, name: str) -> float:
    """Of the labels of two tables, rejected rows being zeros in both."""
    first, second = (np.asarray(decode(table, name), np.float64).ravel() for table in (a, b))
    return 1.0 if np.array_equal(first, second) else cosine(first, second)
