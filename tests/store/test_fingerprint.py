"""Each thing that decides labels changes the fingerprint, and labels made with another one are refused by its name."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import small

from vkd import planning
from vkd.errors import LabelsMismatch, LabelsMissing
from vkd.feeding import open_sets
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import Columns, TensorType
from vkd.store import chunkfile, files
from vkd.store.labelset import LabelSet, LabelSetSpec
from vkd.teaching import Teach

FIELDS: dict[str, Any] = {
    "teacher": {
        "name": "net",
        "version": 1,
        "precision": "fp32",
        "sha256": {"weights": "a1", "config": "b2", "processor": "c3", "tokenizer": "d4"},
        "layers": [3, 6],
    },
    "sampling": {"num_frames": 8, "size_px": 224, "mode": "uniform", "fps": None, "resize": "bilinear"},
    "data": {
        "views": {"region": "square", "min_scale": 0.5, "flip": True, "decoding": "exact", "seed": 0},
        "clips": {"plan": "whole", "length_s": None, "stride_s": None, "count": None},
        "chunk_size": 64,
    },
}
TENSORS = {"logits": TensorType("float32", (20,)), "embedding": TensorType("float32", (6,))}


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    return [path] if items is None else [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


def spec_of(fields: dict[str, Any] = FIELDS, **changes: Any) -> LabelSetSpec:
    return LabelSetSpec("teacher", fields, **({"tensors": TENSORS, "encodings": {"logits": "fp16"}} | changes))


def assert_refused(store: str, ours: LabelSetSpec, told: str) -> None:
    """Refused when looked for, and when its folder holds the labels of another."""
    theirs = spec_of()
    assert ours.fingerprint != theirs.fingerprint
    with pytest.raises(LabelsMissing, match=f"which differs in {told}"):
        LabelSet.open(store, ours)
    files.put(files.join(store, ours.name, "labelset.json"), files.read(files.join(store, theirs.name, "labelset.json")))
    for opened in (lambda: LabelSet.open(store, ours), lambda: LabelSet.create(store, ours, {}, {}, {})):
        with pytest.raises(LabelsMismatch, match=told):
            opened()


@pytest.fixture
def store(tmp_path: Path) -> str:
    LabelSet.create(str(tmp_path), spec_of(), {}, {}, {})
    return str(tmp_path)


@pytest.mark.parametrize("path", leaves(FIELDS), ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_refused_by_its_name(store: str, path: tuple[Any, ...]) -> None:
    fields = copy.deepcopy(FIELDS)
    parent = fields
    for key in path[:-1]:
        parent = parent[key]
    was, parent[path[-1]] = parent[path[-1]], "other"
    assert_refused(store, spec_of(fields), re.escape(f"{'.'.join(map(str, path))}: {was} there, other here"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"encodings": {"logits": "fp32"}}, "encodings.logits: fp16 there, fp32 here"),
        ({"encodings": {"logits": "topk:4"}}, "encodings.logits: fp16 there, topk:4 here"),
        ({"tensors": TENSORS | {"embedding": TensorType("float32", (7,))}}, "tensors.embedding.shape.0: 6 there, 7 here"),
        ({"tensors": TENSORS | {"embedding": TensorType("float64", (6,))}}, "tensors.embedding.dtype: float32 there, float64 here"),
        ({"tensors": TENSORS | {"tags": TensorType("int32", (2,))}}, "tensors.tags.dtype: absent there, int32 here"),
    ],
)
def test_kind_and_encoding_of_the_output_are_refused_by_name(store: str, changes: dict[str, Any], told: str) -> None:
    assert_refused(store, spec_of(**changes), re.escape(told))


def test_another_format_is_refused_by_name(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = spec_of()
    before, document = theirs.fingerprint, files.read(files.join(store, theirs.name, "labelset.json"))
    monkeypatch.setattr(chunkfile, "FORMAT_VERSION", 99)
    ours = spec_of()
    assert ours.fingerprint != before
    files.put(files.join(store, ours.name, "labelset.json"), document)
    with pytest.raises(LabelsMismatch, match="format_version: 2 there, 99 here"):
        LabelSet.open(store, ours)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("recipe.teacher={name: 'fakes:TinyTeacher', seed: 1}", "teacher.seed: 0 there, 1 here"),
        ("recipe.teacher={name: 'fakes:TinyTeacher', num_frames: 4}", "sampling.num_frames: 2 there, 4 here"),
        ("recipe.teacher='fakes:NotFinite'", "teacher.name: TinyTeacher there, NotFinite here"),
        ("labels.encodings.logits=fp16", "encodings.logits: fp32 there, fp16 here"),
        ("data.clips.length_s=0.25", "data.clips.length_s: 0.5 there, 0.25 here"),
        ("data.views.seed=1", "data.views.seed: 0 there, 1 here"),
        ("recipe.student.size_px=16", "sampling.size_px: 32 there, 16 here"),
    ],
)
def test_training_on_other_labels_is_refused_by_name(labelled: Run, override: str, told: str) -> None:
    run = small.changed(labelled, override)
    with pytest.raises(LabelsMissing, match=re.escape(told)):
        open_sets(run, Plan.of(run))


def test_chunks_of_another_size_are_another_set(labelled: Run, small_videos: Path, tmp_path: Path) -> None:
    """The rows, and so the shard's name, may be the same: chunk 0 would not be."""
    build(str(small_videos), str(tmp_path), BuildOptions(label_from="regex:_([a-z]+)", chunk_size=7))
    run = small.changed(labelled, f"data.manifest={tmp_path}")
    assert Plan.of(run).chunks[0] == Plan.of(labelled).chunks[0]
    with pytest.raises(LabelsMissing, match=r"data\.chunk_size: 5 there, 7 here"):
        open_sets(run, Plan.of(run))


def test_the_probe_finds_what_the_fingerprint_does_not_cover(labelled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that computes something else, or a worker that still runs old code: the same fingerprint, another output."""
    run = small.copied(labelled, tmp_path)
    for path in small.chunk_files(run, "teacher")[:1]:
        path.unlink()
    job, answer = small.job_of(run), fakes.TinyTeacher.labels

    def other(self: fakes.TinyTeacher, frames: np.ndarray) -> Columns:
        labels = answer(self, frames)
        return labels | {"embedding": labels["embedding"][:, ::-1]}

    monkeypatch.setattr(fakes.TinyTeacher, "labels", other)
    (teacher,) = planning.build_teachers(run.recipe.teachers).values()
    assert planning.teacher_spec(run, "teacher", teacher).fingerprint == job.specs["teacher"].fingerprint
    with pytest.raises(LabelsMismatch, match="probe of 'embedding' differs"):
        Teach(job, "teacher", 1, last=True)
    assert len(small.chunk_files(run, "teacher")) == 4


def test_the_document_says_all_that_is_hashed(store: str) -> None:
    document = json.loads(files.read(files.join(store, spec_of().name, "labelset.json")))
    assert spec_of().hashed.items() <= document.items()
