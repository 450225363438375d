"""`vkd probe`: what it fits, what it refuses, and how clips are then answered by the classifier that never saw their group."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import small
import yaml

from vkd import labelling, planning, trial
from vkd.errors import ConfigError
from vkd.manifest import BuildOptions, Manifest, build
from vkd.metrics.probes import fit_linear, linear_probe
from vkd.planning import Plan
from vkd.probing import Rows, cross_fit
from vkd.run import Run, dump
from vkd.schema import FRAMES, LABELLED, REJECTED, STATUS
from vkd.stages import REJECT, Job, carried
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.teachers.probe import Probe
from vkd.teaching import Teach
from vkd.verification import verify

Main = Callable[..., tuple[int, str, str]]
NO_LABEL, NO_PERSON = 0, 1


def moments(videos: Path) -> dict[str, list[Any]]:
    """24 clips of three persons, each in two classes; one clip has no label, one no person; six are held out."""
    number = range(24)
    return {
        "uri": [str(videos / ("a_sharp.mp4", "b_dull.mp4", "c_sharp.mp4")[i // 8]) for i in number],
        "start_s": [0.5 * (i % 8) for i in number],
        "end_s": [0.5 * (i % 8) + 0.5 for i in number],
        "label": [None if i == NO_LABEL else ("bend", "walk")[(i // 3) % 2] for i in number],
        "person": [None if i == NO_PERSON else 7 + i % 3 for i in number],
        "alone": ["one" if (i // 3) % 2 else f"other{i % 2}" for i in number],
        "split": ["val" if i % 4 == 3 else "train" for i in number],
    }


def clusters(num_rows: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of 8 values around a centre for each class, and their classes."""
    rng, number = np.random.default_rng(0), np.arange(num_rows) // 4 % num_classes
    return (np.eye(num_classes, 8)[number] * 2 + rng.normal(size=(num_rows, 8))).astype(np.float32), number


def manifest_of(rows: dict[str, list[Any]], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    pa.csv.write_csv(pa.table(rows), folder / "moments.csv")
    build(str(folder / "moments.csv"), str(folder / "manifest"), BuildOptions(chunk_size=5, allow=("/",)))
    return str(folder / "manifest")


@pytest.fixture(scope="module")
def stored(unlabelled: Run, small_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of these clips, labelled in two views by TinyTeacher. Read only."""
    folder = tmp_path_factory.mktemp("moments")
    manifest = f"data.manifest={manifest_of(moments(small_videos), folder)}"
    places = (f"labels.store={folder}/labels", f"output={folder}/out")
    run = small.changed(unlabelled, manifest, *places, "data.split={by: column}", "data.keep_frames=none", "data.views.count=2")
    small.label(run)
    return run


@pytest.fixture
def probe_of(main: Main, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`vkd probe` of a run with these options."""

    def call(run: Run, *options: object) -> tuple[int, str, str]:
        (tmp_path / "run.yaml").write_text(dump(run))
        return main("probe", tmp_path / "run.yaml", tmp_path / "probe.safetensors", *options)

    return call


def test_it_tells_what_it_fitted_and_what_to_do_next(stored: Run, probe_of: Main, tmp_path: Path) -> None:
    code, out, err = probe_of(stored, "--by", "person", "--json")
    told = json.loads(out)
    assert (code, told["clips"], told["rows"], told["groups"], told["classes"]) == (0, 16, 32, 3, ["bend", "walk"])
    assert 0 <= told["accuracy"] <= 1 and f"{told['accuracy']:.3f}" in err
    expected = {"name": "probe", "path": str(tmp_path / "probe.safetensors"), "of": {"name": "fakes:TinyTeacher"}}
    assert yaml.safe_load(told["yaml"]) == {"teacher": expected}
    assert told["yaml"] in err
    first = (tmp_path / "probe.safetensors").read_bytes()
    assert probe_of(stored, "--by", "person")[0] == 0
    assert (tmp_path / "probe.safetensors").read_bytes() == first
    code, out, _ = probe_of(stored)
    assert code == 0 and "give --by" in out
    assert Probe.from_bytes((tmp_path / "probe.safetensors").read_bytes()).groups == []


def test_it_fits_all_stored_views_of_the_train_split(stored: Run, probe_of: Main, tmp_path: Path) -> None:
    """Against embeddings that the teacher gives here, of rows chosen here."""
    probe_of(stored, "--by", "person", "--json")
    probe = Probe.from_bytes((tmp_path / "probe.safetensors").read_bytes())
    job, x, y, people = small.job_of(small.changed(stored, f"labels.store={tmp_path}/none")), [], [], []
    for number, item in enumerate(job.items):
        said = fakes.TinyTeacher()({FRAMES: small.decoded(job, number)[f"{FRAMES}.0"]})["embedding"]
        for row, example in enumerate(job.plan.examples(item.chunk).to_pylist()):
            if example["split"] == "train" and example["label"] and example["person"]:
                x.append(said[row])
                y.append(("bend", "walk").index(example["label"]))
                people.append(example["person"])
    rows, classes, person = np.array(x), np.array(y), np.array(people)
    for entry, kept in enumerate([person > 0, *(person != p for p in (7, 8, 9))]):
        fitted = fit_linear(rows[kept].astype(np.float64), classes[kept])
        for name in ("weight", "bias", "mean", "scale"):
            np.testing.assert_allclose(getattr(probe, name)[entry], getattr(fitted, name), rtol=1e-3, atol=1e-3)
    assert (probe.by, list(probe.groups)) == ("person", ["7", "8", "9"])


def test_a_groups_labels_decide_nothing_of_what_it_is_answered() -> None:
    (x, number), group = clusters(60, 3), np.array([f"p{i % 4}" for i in range(60)])
    changed = np.where(group == "p2", (number + 1) % 3, number)
    probe, other = (cross_fit(Rows(x, each, group, 60), ["a", "b", "c"], "person") for each in (number, changed))
    entries = probe.entries(group.tolist())
    told, again = probe.logits(x, entries), other.logits(x, entries)
    np.testing.assert_array_equal(told[group == "p2"], again[group == "p2"])
    assert (told[group != "p2"] != again[group != "p2"]).any(axis=1).all()


@pytest.mark.parametrize("num_classes", [2, 3])
def test_it_answers_what_the_linear_probe_answers(num_classes: int) -> None:
    x, number = clusters(80, num_classes)
    probe = cross_fit(Rows(x, number, np.full(len(x), ""), len(x)), ["a", "b", "c"][:num_classes], None)
    answers = probe.logits(x, np.zeros(len(x), np.int64))
    assert float((answers.argmax(axis=1) == number).mean()) == linear_probe(x, number, x, number).accuracy
    assert probe.weight.shape == (1, num_classes, 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--by", "alone"], "--by: only alone 'one' has clips of class 'walk'"),
        (["--by", "persons"], "lacks the column 'persons'; it has .*person.* -> name one of these"),
        (["--label", "none"], "lacks the column 'none'; it has .*label"),
        (["--label", "codec"], "--label: a probe needs two classes; there is one"),
        (["--label", "split"], "--label: no labelled clip of the train split is of class 'val'"),
        (["--by", "duplicate_of"], "is of class 'bend' and has a duplicate_of"),
        (["labels.mode=live"], "labels.mode: mode live keeps no labels"),
        (
            ["recipe.teacher=fakes:Counts", "labels.encodings={}", "recipe.weights={kl: 0, cosine: 0, cross_entropy: 1}"],
            "no 1-D 'embedding'",
        ),
        (["labels.store=/nowhere"], "no labels teacher-.* -> vkd label .*run.yaml"),
        (["data.views.count=3"], "labels of 5 of 5 chunks are missing -> vkd label"),
    ],
)
def test_what_cannot_be_fitted_is_told_in_one_line(stored: Run, probe_of: Main, tmp_path: Path, options: list[str], says: str) -> None:
    code, _, err = probe_of(stored, *options)
    assert code == 2 and err.count("\n") == 1
    assert re.search(says, err), err
    assert not (tmp_path / "probe.safetensors").exists()


def test_part_of_the_labels_is_taken_when_that_is_allowed(stored: Run, probe_of: Main, tmp_path: Path) -> None:
    run = small.copied(stored, tmp_path)
    small.chunk_files(run, "teacher")[0].unlink()
    code, _, err = probe_of(run, "--json")
    assert code == 2 and "labels of 1 of 5 chunks are missing" in err
    code, out, _ = probe_of(run, "labels.allow_partial=true", "--json")
    assert code == 0 and json.loads(out)["rows"] < 34


@pytest.fixture
def probed(stored: Run, probe_of: Main, tmp_path: Path) -> Run:
    """The run with the probe as its teacher, as the verb says to write it, and an empty store."""
    line = json.loads(probe_of(stored, "--by", "person", "--json")[1])["yaml"]
    teacher = yaml.safe_load(line)["teacher"]
    return small.changed(
        stored,
        f"recipe.teacher={json.dumps(teacher)}",
        f"labels.store={tmp_path}/labels",
        "data.views.count=1",
        "labels.encodings={logits: fp32}",
    )


def stored_logits(run: Run, job: Job, number: int) -> np.ndarray:
    return np.asarray(decode(LabelSet.open(run.labels.store, job.specs["teacher"]).read(0, job.items[number].chunk), "logits"))


def test_a_clip_is_labelled_by_the_classifier_that_never_saw_its_group(probed: Run, tmp_path: Path) -> None:
    job = small.label(probed)
    probe = Probe.from_bytes((tmp_path / "probe.safetensors").read_bytes())
    blind = small.job_of(small.changed(probed, f"labels.store={tmp_path}/none"))
    for number, item in enumerate(job.items):
        embedding = fakes.TinyTeacher()({FRAMES: small.decoded(blind, number)[f"{FRAMES}.0"]})["embedding"]
        people = ["" if p is None else str(p) for p in job.plan.examples(item.chunk)["person"].to_pylist()]
        np.testing.assert_allclose(stored_logits(probed, job, number), probe.logits(embedding, probe.entries(people)), rtol=1e-4, atol=1e-4)
    assert probe.entries(["", "7", "8"]).tolist() == [0, 1, 2]
    found = verify(probed, 10)
    assert found.ok and found.agreement["teacher.logits"] > 0.999


def test_columns_travel_beside_rejects_and_chunks_that_others_labelled(probed: Run) -> None:
    job = small.job_of(probed)
    assert job.columns == ("person",)
    batch = small.decoded(job)
    assert batch[carried("person")].tolist() == ["7", "", "9", "7", "8"]
    spoilt = json.dumps({"stage": "decode", "kind": "crash", "message": "", "permanent": True, "attempts": 1})
    rejecting = batch | {REJECT: np.array(["", spoilt, "", "", ""]), carried("person"): batch[carried("person")].astype(object)}
    teach = Teach(job, "teacher", 1, last=True)
    assert small.stats_of(teach(rejecting))["labelled"] == 4
    table = small.committed(job, "teacher", 0)
    assert table[STATUS].to_pylist() == [LABELLED, REJECTED, *[LABELLED] * 3]
    expected = teach.teacher({FRAMES: batch[f"{FRAMES}.0"], "person": batch[carried("person")]})["logits"]
    np.testing.assert_allclose(np.asarray(decode(table, "logits"))[[0, 2, 3, 4]], expected[[0, 2, 3, 4]], rtol=1e-5, atol=1e-5)
    late = small.decoded(job)  # another driver was faster
    assert {len(column) for column in late.values()} == {1}
    assert small.stats_of(teach(late))["elsewhere"] == 5


def test_a_sample_of_a_plan_keeps_the_columns(probed: Run) -> None:
    sample = trial.drawn(Plan.of(probed), 1.0)
    people = [name for chunk in sample.chunks for name in planning.text_columns(sample.examples(chunk), ["person"])["person"].tolist()]
    assert sorted(people) == sorted(["" if p is None else str(p) for p in moments(Path())["person"]])


def test_a_manifest_without_the_column_is_refused_before_labelling(probed: Run, labelled: Run) -> None:
    other = small.changed(probed, f"data.manifest={labelled.data.manifest}", "data.split={by: none}")
    with pytest.raises(
        ConfigError, match=r"^recipe\.teacher: the manifest lacks the column 'person'; it has example_id, .*label"
    ) as raised:
        labelling.checked(other)
    assert "table that has it" in str(raised.value)


def test_other_groups_are_other_chunks(stored: Run, small_videos: Path, tmp_path: Path) -> None:
    """A label set's fingerprint does not know its rows' groups; the shard's name does, and chunks lie under it."""
    rows = moments(small_videos)
    rows["person"][4] = 9
    other = small.changed(stored, f"data.manifest={manifest_of(rows, tmp_path / 'other')}")
    spec, same = (planning.label_specs(run, planning.build_teachers(run.recipe.teachers))["teacher"] for run in (stored, other))
    assert spec.fingerprint == same.fingerprint
    assert not set(Manifest.load(stored.data.manifest).shards) & set(Manifest.load(other.data.manifest).shards)
    label_set = LabelSet.open(stored.labels.store, spec)
    assert label_set.missing(0, Plan.of(stored).chunks) == []
    assert label_set.missing(0, Plan.of(other).chunks) == Plan.of(other).chunks


def test_another_probe_is_another_label_set(probed: Run, tmp_path: Path) -> None:
    def fingerprint() -> str:
        return planning.label_specs(probed, planning.build_teachers(probed.recipe.teachers))["teacher"].fingerprint

    before, path = fingerprint(), tmp_path / "probe.safetensors"
    probe = Probe.from_bytes(path.read_bytes())
    path.write_bytes(probe._replace(bias=probe.bias + 1).to_bytes())
    assert fingerprint() != before
