"""Students as teachers of pairs: what they answer is what the students say of the stored features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paired
import pytest
import torch

from vkd import models
from vkd.checkpoint import load_similarity
from vkd.errors import ConfigError, LabelsMismatch, LabelsMissing, StorageError, TeacherError
from vkd.manifest import Manifest
from vkd.models import ModelSpec
from vkd.region_store import RegionStore
from vkd.regions import tiled
from vkd.schema import Columns
from vkd.similarity_layers import chamfer
from vkd.store.chunkfile import LabelSetSpec
from vkd.store.labelset import LabelSet
from vkd.students.base import SimilarityStudent
from vkd.teachers import TEACHERS
from vkd.teachers.pair_scores import Kept, PairScoresTeacher

STUDENTS: dict[str, dict[str, Any]] = {
    "attention": {"name": "vkd.students.visil:FineStudent"},
    "binary": {"name": "vkd.students.visil:FineStudent", "kind": "binary", "num_bits": 32},
    "visil": {"name": "vkd.students.visil:VisilHead"},
    "coarse": {"name": "vkd.students.coarse:CoarseStudent"},
}
NUM_VIDEOS = 10


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> LabelSet:
    """Features of videos of 1 to 9 frames; the last was rejected. Read only."""
    folder = tmp_path_factory.mktemp("features")
    run = paired.run_of(folder, [paired.table_of([{"video_id": f"v{i:03d}"} for i in range(NUM_VIDEOS)])])
    return paired.store(run, paired.random_videos(NUM_VIDEOS) | {f"v{NUM_VIDEOS - 1:03d}": None})


@pytest.fixture(scope="module")
def names(features: LabelSet) -> list[str]:
    (shard,) = Manifest.load(str(Path(features.uri).parents[1] / "videos")).shards
    return [f"{shard}/{row}" for row in range(NUM_VIDEOS)]


@pytest.fixture(scope="module", params=STUDENTS)
def exported(request: pytest.FixtureRequest, features: LabelSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    return paired.exported(tmp_path_factory.mktemp("student"), features=features.spec.name, **STUDENTS[request.param])


def folder_of(features: LabelSet) -> str:
    return str(Path(features.uri).parent)


def loaded(features: LabelSet, **options: Any) -> PairScoresTeacher:
    spec = ModelSpec(name="pair_scores", options={"store": folder_of(features), **options})
    teacher: PairScoresTeacher = models.build(spec, TEACHERS, "teacher")
    teacher.load("cpu")
    return teacher


def batch_of(rows: list[tuple[str, list[str]]], features: str) -> Columns:
    columns = [anchor for anchor, _ in rows], [" ".join(others) for _, others in rows], [features] * len(rows)
    return {name: np.array(column, np.str_) for name, column in zip(("anchor", "others", "features"), columns, strict=True)}


def scores(teacher: PairScoresTeacher, rows: list[tuple[str, list[str]]], features: str) -> list[list[float]]:
    return [row.tolist() for row in teacher(batch_of(rows, features))["scores"]]


def test_they_are_what_the_student_says_of_each_pair(features: LabelSet, names: list[str], exported: str) -> None:
    teacher, student = loaded(features, path=exported), load_similarity(exported)
    assert isinstance(student, SimilarityStudent)
    rows, read = [(names[0], names[1:4]), (names[3], [names[0]]), (names[5], [])], RegionStore(features.uri).read
    batch = batch_of(rows, features.spec.name)
    out = teacher(batch)
    assert [(row.dtype, row.shape) for row in out["scores"]] == [(np.float32, (3,)), (np.float32, (1,)), (np.float32, (0,))]
    assert all(out[name] is batch[name] for name in batch)
    with torch.inference_mode():
        index = {name: student.index(tiled(torch.tensor(read(name)))[None])[0] for name in names[:-1]}
        expected = [[student.pair(index[anchor], index[other]).item() for other in others] for anchor, others in rows]
    assert all(len(x) >= 4 for x in index.values())
    for got, wanted in zip(out["scores"], expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert teacher.module.state_dict().keys() == student.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert teacher({name: column[:0] for name, column in batch.items()})["scores"] == []


@pytest.mark.parametrize("kind", ["attention", "binary", "visil"])
def test_the_direction_is_from_the_anchor_to_the_candidate(features: LabelSet, names: list[str], tmp_path: Path, kind: str) -> None:
    teacher = loaded(features, path=paired.exported(tmp_path, features=features.spec.name, **STUDENTS[kind]))
    pairs = [(names[i], [names[j]]) for i in range(8) for j in range(i)]
    forth = np.array(scores(teacher, pairs, features.spec.name))
    back = np.array(scores(teacher, [(others[0], [anchor]) for anchor, others in pairs], features.spec.name))
    assert np.abs(forth - back).max() > 1e-3


def test_raw_features_are_compared_without_a_network(features: LabelSet, names: list[str]) -> None:
    by_chamfer, by_mean = (loaded(features, kind=kind) for kind in ("chamfer", "mean"))
    read = RegionStore(features.uri).read
    x = [torch.tensor(read(name)) for name in names[:6]]
    (found,), (means,) = (scores(teacher, [(names[0], names[:6])], features.spec.name) for teacher in (by_chamfer, by_mean))
    for other, score, mean in zip(x, found, means, strict=True):
        loop = [[chamfer(frame @ against.T).item() for against in other] for frame in x[0]]
        assert score == pytest.approx(np.max(loop, axis=1).mean(), abs=1e-6)
        assert mean == pytest.approx(torch.cosine_similarity(x[0].mean((0, 1)), other.mean((0, 1)), dim=0).item(), abs=1e-6)
    assert means[0] == pytest.approx(1)
    assert len(list(by_chamfer.module.parameters())) == 0
    assert len({json.dumps(teacher.identity()) for teacher in (by_chamfer, by_mean)}) == 2


def test_other_features_are_refused(features: LabelSet, names: list[str], exported: str) -> None:
    with pytest.raises(TeacherError, match=rf"trained on features {features.spec.name}, this row is of regions-0123456789ab"):
        scores(loaded(features, path=exported), [(names[0], names[1:3])], "regions-0123456789ab")
    with pytest.raises(LabelsMissing):
        scores(loaded(features, kind="mean"), [(names[0], names[1:3])], "regions-0123456789ab")
    with pytest.raises(LabelsMissing):
        scores(loaded(features, path=exported), [(names[0], names[-1:])], features.spec.name)


def test_what_is_kept_is_bounded(features: LabelSet, names: list[str], exported: str) -> None:
    rows = [(names[0], names[1:9]), (names[1], names[:9])]
    roomy, tight, none = (loaded(features, path=exported, cache_bytes=size) for size in (1 << 20, 3000, 0))
    assert scores(roomy, rows, features.spec.name) == scores(tight, rows, features.spec.name) == scores(none, rows, features.spec.name)
    assert 3000 < roomy._indexed.num_bytes <= 1 << 20
    assert tight._indexed.num_bytes <= 3000
    assert none._indexed.num_bytes == 0


def test_what_was_not_asked_for_the_longest_time_goes() -> None:
    kept, made = Kept(32), list[str]()

    def get(name: str) -> None:
        kept.get(name, lambda: made.append(name) or torch.zeros(3))  # type: ignore[func-returns-value]

    for name in "abacab":
        get(name)
    assert made == ["a", "b", "c", "b"]
    assert kept.num_bytes == 24


def test_identity(features: LabelSet, exported: str, tmp_path: Path) -> None:
    identity = loaded(features, path=exported).identity()
    assert json.loads(json.dumps(identity)) == identity == loaded(features, path=exported, cache_bytes=7).identity()
    assert (identity["name"], identity["version"], identity["precision"]) == ("pair_scores", 1, "fp32")
    assert set(identity["sha256"]) == {"config.json", "model.safetensors"}
    assert exported not in json.dumps(identity)
    config = Path(exported, "config.json").read_text()
    for name, change in (("config.json", config + " "), ("model.safetensors", None)):
        (tmp_path / name).mkdir()
        other = paired.exported(tmp_path / name, features=features.spec.name, seed=1, **_spec(config))
        if change is not None:
            Path(other, "config.json").write_text(change)
        assert loaded(features, path=other).identity() != identity


def _spec(config: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(config)["student"].items() if name not in ("num_dims", "size")}


@pytest.mark.parametrize("kind", STUDENTS)
def test_other_weights_are_told_by_the_probe(features: LabelSet, tmp_path: Path, kind: str) -> None:
    first, second = (paired.exported(tmp_path / str(seed), features=features.spec.name, seed=seed, **STUDENTS[kind]) for seed in (0, 1))
    teacher, other = loaded(features, path=first), loaded(features, path=second)
    probe = teacher.probe_batch()
    assert set(probe) == set(teacher.needs)
    answers, again, others = ({"scores": each(probe)["scores"]} for each in (teacher, loaded(features, path=first), other))
    (found,) = answers["scores"]
    assert len(found) == 17 and found.std() > 1e-4
    spec = LabelSetSpec("teacher", {"teacher": "pair_scores"}, dict(teacher.emits))
    label_set = LabelSet.create(str(tmp_path), spec, answers, {}, {})
    label_set.check_probe(again)
    with pytest.raises(LabelsMismatch, match="probe of 'scores' differs"):
        label_set.check_probe(others)


def test_the_probe_without_a_student(features: LabelSet) -> None:
    by_chamfer, by_mean = (loaded(features, kind=kind) for kind in ("chamfer", "mean"))
    (found,), (means,) = (teacher(teacher.probe_batch())["scores"] for teacher in (by_chamfer, by_mean))
    assert found[0] == pytest.approx(1)
    assert found[0] > found[4] > found[10] > found[16]
    assert means[0] == pytest.approx(1)
    assert means[1] > means[16]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_a_broken_export_is_refused(features: LabelSet, tmp_path: Path, name: str, damage: str) -> None:
    file = Path(paired.exported(tmp_path / "student", features=features.spec.name, **STUDENTS["coarse"]), name)
    data = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises((TeacherError, StorageError), match=name):
        loaded(features, path=str(file.parent))


def test_what_cannot_score_pairs_is_refused(features: LabelSet, tmp_path: Path) -> None:
    selector = paired.exported(tmp_path, "vkd.students.selector:Selector", features.spec.name)
    with pytest.raises(TeacherError, match="Selector scores no pairs"):
        loaded(features, path=selector)
    for options in ({}, {"kind": "dtw"}, {"kind": "mean", "path": selector}):
        with pytest.raises(ConfigError, match=r"'pair_scores': .*path and kind"):
            loaded(features, **options)
    with pytest.raises(TeacherError, match="not loaded"):
        PairScoresTeacher(folder_of(features), kind="mean")(batch_of([], features.spec.name))
