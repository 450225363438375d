"""What a run asks for: its chunks and examples, and label sets whose names change exactly when labels would."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from vkd import planning
from vkd.clips import Sampling
from vkd.errors import ConfigError, ManifestError
from vkd.manifest import BuildOptions, build
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.run import Run
from vkd.schema import EXAMPLE_ID, GAP, LABEL, START_S, TRAIN, URI, VAL, TensorType


@pytest.fixture(scope="module")
def plan(unlabelled: Run) -> Plan:
    return Plan.of(unlabelled)


def fingerprints(run: Run) -> dict[str, str]:
    return {alias: spec.fingerprint for alias, spec in planning.label_specs(run, planning.build_teachers(run.recipe.teachers)).items()}


def test_a_plan_cuts_every_video_into_clips_and_chunks(plan: Plan) -> None:
    tables = [plan.examples(chunk) for chunk in plan.chunks]
    assert [table.num_rows for table in tables] == [5, 5, 5, 5, 4]
    assert plan.num_examples == 24
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(Path(row[URI]).name, row[START_S]) for row in rows] == [
        (f"{name}.mp4", i / 2) for name in ("a_sharp", "b_dull", "c_sharp") for i in range(8)
    ]
    assert len({row[EXAMPLE_ID] for row in rows}) == 24
    assert [chunk.index for chunk in plan.chunks] == [0, 1, 2, 3, 4]


def test_splits_cover_every_row_once(plan: Plan, unlabelled: Run) -> None:
    gapped = Plan.of(small.changed(unlabelled, "data.split.gap_s=0.5"))
    for each, sizes in ((plan, (15, 6, 3)), (gapped, (12, 6, 6))):
        by_split = {split: each.rows(split) for split in (TRAIN, VAL, GAP)}
        assert tuple(sum(map(len, rows)) for rows in by_split.values()) == sizes
        for position, chunk in enumerate(each.chunks):
            assert sorted(i for rows in by_split.values() for i in rows[position]) == list(range(each.examples(chunk).num_rows))


def test_a_plan_less_some_chunks(plan: Plan) -> None:
    less = plan.without(plan.chunks[1:3])
    assert less.chunks == [plan.chunks[0], *plan.chunks[3:]]
    assert less.rows(TRAIN) == [plan.rows(TRAIN)[i] for i in (0, 3, 4)]
    assert len(plan.chunks) == 5


def test_a_plan_travels_small(plan: Plan) -> None:
    data = pickle.dumps(plan)
    assert len(data) < 2000
    assert pickle.loads(data).examples(plan.chunks[2]).equals(plan.examples(plan.chunks[2]))


def test_no_manifest_says_how_to_make_one(unlabelled: Run, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest here -> vkd manifest"):
        Plan.of(small.changed(unlabelled, f"data.manifest={tmp_path}"))


@given(st.floats(0.0001, 1), st.floats(0.0001, 1), st.integers(0, 99), st.integers(1, 60))
def test_a_larger_sample_contains_a_smaller_one(a: float, b: float, seed: int, num_chunks: int) -> None:
    plan = Plan.__new__(Plan)
    plan.chunks = [Chunk("shard", i) for i in range(num_chunks)]
    smaller, larger = plan.sample(min(a, b), seed), plan.sample(max(a, b), seed)
    assert set(smaller) <= set(larger)
    assert 1 <= len(smaller) == max(1, round(min(a, b) * num_chunks))
    assert larger == [chunk for chunk in plan.chunks if chunk in larger]
    assert plan.sample(1.0, seed) == plan.chunks


def test_classes_and_their_numbers(plan: Plan) -> None:
    assert plan.classes() == ["dull", "sharp"]
    examples = plan.examples(plan.chunks[1])  # the last three clips of a_sharp, the first two of b_dull
    assert planning.label_numbers(examples, ["dull", "sharp"]).tolist() == [1, 1, 1, 0, 0]
    assert planning.label_numbers(examples, ["dull"]).tolist() == [-1, -1, -1, 0, 0]
    assert planning.label_numbers(examples.drop_columns([LABEL]), []).tolist() == [-1] * 5


def test_the_label_sets_of_a_run(unlabelled: Run) -> None:
    teachers = planning.build_teachers(unlabelled.recipe.teachers)
    specs = planning.label_specs(unlabelled, teachers)
    assert list(specs) == ["teacher", FRAMES_ALIAS]
    assert specs["teacher"].tensors == teachers["teacher"].emits
    assert specs["teacher"].encodings == {"logits": "fp32", "embedding": "fp32"}
    assert specs[FRAMES_ALIAS].tensors == {FRAMES_ALIAS: TensorType("uint8", (2, 32, 32, 3))}
    assert specs[FRAMES_ALIAS].encodings == {FRAMES_ALIAS: "raw"}
    assert planning.student_sampling(unlabelled) == Sampling(num_frames=2, size_px=32)
    assert list(planning.label_specs(small.changed(unlabelled, "data.keep_frames=none"), teachers)) == ["teacher"]
    defaults = planning.label_specs(small.changed(unlabelled, "labels.encodings={logits: 'topk:3'}"), teachers)
    assert defaults["teacher"].encodings == {"logits": "topk:3", "embedding": "fp16"}


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        # what decides labels
        ("recipe.teacher={name: 'fakes:TinyTeacher', seed: 1}", {"teacher"}),
        ("recipe.teacher={name: 'fakes:TinyTeacher', num_frames: 4}", {"teacher"}),
        ("recipe.teacher={name: 'fakes:TinyTeacher', size_px: 8}", {"teacher"}),
        ("recipe.teacher='fakes:NotFinite'", {"teacher"}),
        ("labels.encodings.logits=fp16", {"teacher"}),
        ("labels.encodings={embedding: fp32}", {"teacher"}),
        ("data.clips.length_s=0.25", {"teacher", "frames"}),
        ("data.clips.stride_s=0.25", {"teacher", "frames"}),
        ("data.clips={plan: whole}", {"teacher", "frames"}),
        ("data.clips={plan: count, count: 2}", {"teacher", "frames"}),
        ("data.views.seed=1", {"teacher", "frames"}),
        ("data.views.min_scale=0.25", {"teacher", "frames"}),
        ("data.views.flip=false", {"teacher", "frames"}),
        ("data.views.region=frame", {"teacher", "frames"}),
        ("data.views.decoding=keyframe", {"teacher", "frames"}),
        ("data.keep_frames=jpeg", {"frames"}),
        ("recipe.student.num_frames=4", {"frames"}),
        ("recipe.student.size_px=16", {"frames"}),
        # what does not
        ("data.views.count=3", set()),
        ("data.split={by: none}", set()),
        ("data.source=elsewhere", set()),
        ("data.max_reject_fraction=0.1", set()),
        ("recipe.student.size=medium", set()),
        ("recipe.temperature=4", set()),
        ("train.epochs=9", set()),
        ("train.seed=9", set()),
        ("compute.decode.backend=pyav", set()),
        ("output=elsewhere", set()),
        ("name=other", set()),
    ],
)
def test_a_fingerprint_changes_exactly_when_labels_would(unlabelled: Run, override: str, differs: set[str]) -> None:
    before, after = fingerprints(unlabelled), fingerprints(small.changed(unlabelled, override))
    assert {alias for alias in before if before[alias] != after[alias]} == differs


def test_every_field_of_views_and_clips_is_decided_above(unlabelled: Run) -> None:
    """A new field must be added to the test above, to one half or the other."""
    assert set(type(unlabelled.data.views).model_fields) == {"seed", "min_scale", "flip", "region", "decoding", "count"}
    assert set(type(unlabelled.data.clips).model_fields) == {"plan", "length_s", "stride_s", "count"}
    assert set(Sampling.model_fields) == {"num_frames", "size_px", "mode", "fps", "resize"}


@pytest.mark.parametrize(
    "field", [{"num_frames": 3}, {"size_px": 24}, {"mode": "segment_random"}, {"mode": "fps", "fps": 2.0}, {"resize": "bicubic"}]
)
def test_a_fingerprint_covers_every_field_of_the_sampling(unlabelled: Run, field: dict[str, object]) -> None:
    (teacher,) = planning.build_teachers(unlabelled.recipe.teachers).values()
    before = planning.teacher_spec(unlabelled, "teacher", teacher)
    teacher.sampling = Sampling.model_validate(teacher.sampling.model_dump() | field)
    assert planning.teacher_spec(unlabelled, "teacher", teacher).fingerprint != before.fingerprint


def test_a_fingerprint_covers_weights_and_version(unlabelled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.write_text("first")
    run = small.changed(unlabelled, f"recipe.teacher={{name: 'fakes:TinyTeacher', weights: {weights}}}")
    before = fingerprints(run)["teacher"]
    assert before == fingerprints(run)["teacher"] != fingerprints(unlabelled)["teacher"]
    weights.write_text("second")
    second = fingerprints(run)["teacher"]
    monkeypatch.setattr("fakes.TinyTeacher.version", 2)
    assert len({before, second, fingerprints(run)["teacher"]}) == 3


def test_an_encoding_of_a_label_that_nobody_emits_is_refused(unlabelled: Run) -> None:
    with pytest.raises(ConfigError, match=r"labels\.encodings\.logit: no teacher emits 'logit' -> name one of embedding, logits"):
        fingerprints(small.changed(unlabelled, "labels.encodings.logit=int8"))


def test_labels_that_are_not_floats_keep_their_type(unlabelled: Run) -> None:
    run = small.changed(unlabelled, "labels.encodings={}", "recipe.teacher='fakes:Counts'")
    teachers = planning.build_teachers(run.recipe.teachers)
    assert planning.label_specs(run, teachers)["teacher"].encodings == {"counts": "raw"}


def test_example_rows_do_not_depend_on_how_they_are_chunked(small_videos: Path, plan: Plan, unlabelled: Run, tmp_path: Path) -> None:
    build(str(small_videos), str(tmp_path), BuildOptions(label_from="regex:_([a-z]+)", chunk_size=7))
    other = Plan.of(small.changed(unlabelled, f"data.manifest={tmp_path}"))
    ids = [np.concatenate([p.examples(chunk)[EXAMPLE_ID].to_numpy() for chunk in p.chunks]).tolist() for p in (plan, other)]
    assert ids[0] == ids[1]
