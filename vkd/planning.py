"""What a run asks for: its chunks, their examples, and the label sets that it reads or fills."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vkd import models, schema
from vkd.clips import ClipPlan, Sampling, SplitPlan, assign_splits, plan_examples
from vkd.errors import ConfigError, LabelsMissing
from vkd.manifest import Manifest
from vkd.models import ModelSpec
from vkd.rounds import Chunk, chunks_of
from vkd.schema import FRAMES, Columns, TensorType
from vkd.store.labelset import LabelSet, LabelSetSpec
from vkd.students import STUDENTS
from vkd.teachers import TEACHERS
from vkd.video.settings import Settings

if TYPE_CHECKING:  # decode workers plan, and must not import the recipes' torch
    from vkd.run import Run
    from vkd.teachers.base import Teacher

FRAMES_ALIAS = "frames"
FRAME_ENCODINGS = {"jpeg": "jpeg:90", "raw": "raw"}


class Plan:
    """The chunks of a run in manifest order, and the examples of each; cheap to pickle, reads shards when asked."""

    def __init__(self, manifest: str, clips: ClipPlan, split: SplitPlan) -> None:
        self.manifest_path, self.clips, self.split = manifest, clips, split
        opened = Manifest.load(manifest)
        self.manifest_digest, self.chunk_size = opened.digest, opened.chunk_size
        counts = {shard: _shard_examples(manifest, shard, clips).num_rows for shard in opened.shards}
        self.chunks = [chunk for shard in opened.shards for chunk in chunks_of(shard, counts[shard], self.chunk_size)]
        self.num_examples = sum(counts.values())

    @classmethod
    def of(cls, run: Run) -> Plan:
        return cls(run.data.manifest, run.data.clips, run.data.split)

    def examples(self, chunk: Chunk) -> pa.Table:
        """The chunk's rows in manifest order, at most `chunk_size` of them."""
        table = _shard_examples(self.manifest_path, chunk.shard, self.clips)
        return table.slice(chunk.index * self.chunk_size, self.chunk_size)

    def rows(self, split: str) -> list[list[int]]:
        """For each chunk of the plan, the row numbers that belong to `train` or `val`."""
        return [[i for i, name in enumerate(assign_splits(self.examples(chunk), self.split)) if name == split] for chunk in self.chunks]

    def values(self, column: str, rows: Sequence[Sequence[int]]) -> list[list[Any]]:
        """For each chunk of the plan, what a column of the manifest has in these rows. Raises ConfigError when there is none."""
        require_columns(self, (column,), "data.manifest")
        columns = (self.examples(chunk)[column].to_pylist() for chunk in self.chunks)
        return [[values[row] for row in mine] for values, mine in zip(columns, rows, strict=True)]

    def without(self, chunks: Collection[Chunk]) -> Plan:
        """The same plan less some chunks."""
        other = copy.copy(self)
        other.chunks = [chunk for chunk in self.chunks if chunk not in chunks]
        return other

    @property
    def share(self) -> float:
        """The part of the planned examples that the chunks hold: less than 1 after `without`."""
        return float(sum(self.examples(chunk).num_rows for chunk in self.chunks) / max(self.num_examples, 1))

    def classes(self) -> list[str]:
        """Sorted names of the labels that videos carry; empty when there are none."""
        names: set[str] = set()
        for shard in dict.fromkeys(chunk.shard for chunk in self.chunks):
            table = _shard_examples(self.manifest_path, shard, self.clips)
            if schema.LABEL in table.column_names:
                names.update(name for label in table[schema.LABEL].to_pylist() for name in named(label))
        return sorted(names)

    def sample(self, fraction: float, seed: int) -> list[Chunk]:
        """A seeded sample of whole chunks, at least one, in plan order; a larger fraction contains a smaller one."""
        order = np.random.default_rng(seed).permutation(len(self.chunks))
        kept = sorted(order[: max(1, round(fraction * len(self.chunks)))].tolist())
        return [self.chunks[i] for i in kept]


@lru_cache(maxsize=32)
def _shard_examples(manifest: str, shard: str, clips: ClipPlan) -> pa.Table:
    return plan_examples(Manifest.load(manifest).read_shard(shard), clips)


def build_teachers(specs: Mapping[str, ModelSpec]) -> dict[str, Teacher]:
    """Teachers by alias, not yet loaded."""
    return {alias: models.build(spec, TEACHERS, "teacher") for alias, spec in specs.items()}


def first_teacher(run: Run) -> tuple[str, Teacher]:
    """The run's first teacher, not yet loaded, and its alias. Raises ConfigError when there is none."""
    for alias, teacher in build_teachers(run.recipe.teachers).items():
        return alias, teacher
    raise ConfigError("the recipe has no teacher", where="recipe", action="name a run whose first teacher labels videos")


def columns_for(teachers: Iterable[Teacher]) -> tuple[str, ...]:
    """Sorted names of the manifest columns that teachers need."""
    return tuple(sorted({name for teacher in teachers for name in teacher.needs} - {FRAMES}))


def require_columns(plan: Plan, names: Iterable[str], where: str) -> None:
    """Raises ConfigError, which says what is there, for the first column that the plan's examples lack."""
    there = plan.examples(plan.chunks[0]).column_names
    for name in names:
        if name not in there:
            what = f"the manifest lacks the column {name!r}; it has {', '.join(there)}"
            raise ConfigError(what, where=where, action="name one of these, or build the manifest from a table that has it")


def require_labels(run: Run, plan: Plan, label_set: LabelSet) -> None:
    """Raises LabelsMissing when nothing is stored, and when anything of the run's views lacks, unless `labels.allow_partial`."""
    lacking = {chunk for view in range(run.data.views.count) for chunk in label_set.missing(view, plan.chunks)}
    refuse_lacking(lacking, plan, label_set.uri, allowed=run.labels.allow_partial)


def refuse_lacking(lacking: Collection[Chunk], plan: Plan, where: str, *, allowed: bool) -> None:
    """Raises LabelsMissing when nothing is stored, and when anything lacks that is not allowed to."""
    if len(lacking) == len(plan.chunks) or (lacking and not allowed):
        what = f"labels of {len(lacking)} of {len(plan.chunks)} chunks are missing"
        raise LabelsMissing(what, where=where, action="vkd label RUN, or set labels.allow_partial=true")


def text_columns(examples: pa.Table, names: Iterable[str]) -> Columns:
    """Columns of examples as text, empty where there is nothing."""
    return {name: np.array(["" if v is None else str(v) for v in examples[name].to_pylist()], np.str_) for name in names}


def student_sampling(run: Run) -> Sampling | None:
    """How the run's student looks at a view; None when it reads no frames, or nothing is trained."""
    if not run.recipe.trains:
        return None
    if FRAMES not in getattr(models.find(run.recipe.student, STUDENTS, "student"), "needs", (FRAMES,)):
        models.build(run.recipe.student, STUDENTS, "student")
        return None
    sampling: Sampling = models.build(run.recipe.student, STUDENTS, "student", heads={}).sampling
    return sampling


def decoding(run: Run, samplings: Sequence[Sampling]) -> Settings:
    """How the run's videos are decoded."""
    return Settings(tuple(samplings), run.compute.decode.backend, run.data.access, run.compute.decode.limits)


def teacher_spec(run: Run, alias: str, teacher: Teacher) -> LabelSetSpec:
    """The label set of one teacher: every input that decides its labels."""
    fields = _input_fields(run, teacher.sampling) | {"teacher": teacher.identity()}
    encodings = {name: encoding for name, encoding in run.labels.encodings.items() if name in teacher.emits}
    return LabelSetSpec(alias, fields, dict(teacher.emits), encodings)


def frames_spec(run: Run, sampling: Sampling) -> LabelSetSpec:
    """The label set of kept frames: the decoded views at the student's sampling."""
    shape = (sampling.num_frames, sampling.size_px, sampling.size_px, 3)
    encoding = FRAME_ENCODINGS[run.kept_frames]
    return LabelSetSpec(FRAMES_ALIAS, _input_fields(run, sampling), {FRAMES_ALIAS: TensorType("uint8", shape)}, {FRAMES_ALIAS: encoding})


def label_specs(run: Run, teachers: Mapping[str, Teacher]) -> dict[str, LabelSetSpec]:
    """Every label set that the run needs, frames included when they are kept. Raises ConfigError for an encoding of no label."""
    emitted = {name for teacher in teachers.values() for name in teacher.emits}
    for name in run.labels.encodings:
        if name not in emitted:
            action = f"name one of {', '.join(sorted(emitted))}"
            raise ConfigError(f"no teacher emits {name!r}", where=f"labels.encodings.{name}", action=action)
    specs = {alias: teacher_spec(run, alias, teacher) for alias, teacher in teachers.items()}
    if run.kept_frames != "none":
        sampling = student_sampling(run)
        if sampling is None:
            key, value = ("data.keep_frames", "none") if run.labels.mode != "live" else ("labels.mode", "tee")  # live always keeps them
            raise ConfigError("the student reads no frames, and none can be kept", where=key, action=f"set it to {value}")
        specs[FRAMES_ALIAS] = frames_spec(run, sampling)
    return specs


def named(label: str | None) -> list[str]:
    """The classes that a label names: `walk|run` two of them."""
    return label.split("|") if label else []


def label_numbers(examples: pa.Table, classes: Sequence[str], column: str = schema.LABEL) -> np.ndarray:
    """int64 class of each example; -1 where its label names none, or several."""
    if column not in examples.column_names:
        return np.full(examples.num_rows, -1, np.int64)
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(name, -1) for name in examples[column].to_pylist()], np.int64)


def _input_fields(run: Run, sampling: Sampling | None) -> dict[str, Any]:
    data = {
        "views": run.data.views.policy(),
        "clips": run.data.clips.model_dump(mode="json"),
        "chunk_size": Manifest.load(run.data.manifest).chunk_size,  # else two manifests of the same rows would share chunk names
    }
    return {"sampling": sampling and sampling.model_dump(mode="json"), "data": data}
