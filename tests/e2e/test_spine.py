"""The whole path on real clips: manifest, labels by Ray, a student trained in this process, its evaluation, its use as a teacher."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import harness
import numpy as np
import pytest
import torch

from vkd import execution, labelling, pipeline, planning, stages, verification
from vkd.checkpoint import load_student
from vkd.label_report import LabelReport
from vkd.manifest import Manifest
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import FRAMES
from vkd.stages import Item
from vkd.store.labelset import LabelSet
from vkd.teachers.base import probe_frames
from vkd.teaching import Teach

NUM_THREADS = 2  # what one teacher actor gets of two cores; another number may round sums in another order
pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def student(run: Run, report: LabelReport) -> str:
    trained = pipeline.distill(run, Mock())
    assert (trained.skipped, trained.resumed_from) == (False, 0)
    assert trained.num_examples == run.train.epochs * sum(len(rows) for rows in Plan.of(run).rows("train"))
    return trained.student


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "execute", lambda *_: pytest.fail("labelling was started"))


def sets_of(run: Run) -> dict[str, LabelSet]:
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    return {alias: LabelSet.open(run.labels.store, spec) for alias, spec in specs.items()}


def test_each_clip_is_labelled_or_rejected_with_its_reason(run: Run, report: LabelReport) -> None:
    assert report.planned == 4 + 10 + 4  # one-second clips of the whole videos, and of the one that is cut
    assert report.labelled + report.rejected.total() == report.planned
    assert dict(report.rejected) == {"truncated": 2}
    rejects = verification.list_rejects(run)
    found = [(Path(r.clip).name, r.stage, r.kind) for r in rejects]
    assert found == [("text.mp4", "manifest", "not_a_video"), *[("half.mp4", "decode", "truncated")] * 2]
    assert "frames end at" in rejects[-1].message
    (unusable,) = Manifest.load(run.data.manifest).rejects().to_pylist()
    assert (Path(unusable["uri"]).name, unusable["kind"]) == ("text.mp4", "not_a_video")
    assert verification.verify(run, num_sampled=4).ok


@pytest.mark.usefixtures("report", "no_ray")
def test_second_label_starts_nothing(run: Run) -> None:
    again = pipeline.label(run, Mock())
    assert (again.done, again.present) == (0, again.planned)


@pytest.mark.usefixtures("report")
def test_labels_are_bit_equal_to_those_made_without_ray(run: Run, tmp_path: Path) -> None:
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    specs = planning.label_specs(run, teachers)
    here = run.model_copy(update={"labels": run.labels.model_copy(update={"store": str(tmp_path)})})
    items = [Item(0, chunk, tuple(specs)) for chunk in plan.chunks]
    job = labelling._job(here, plan, specs, teachers, items)
    LabelSet.create(str(tmp_path), specs[FRAMES], {}, {}, {})
    teach = Teach(job, "teacher", NUM_THREADS, True)
    for number in range(len(items)):
        teach(stages.decode(job, {stages.ITEM: np.array([number])}))
    torch.set_num_threads(1)
    for alias, label_set in sets_of(run).items():
        for chunk in plan.chunks:
            assert label_set.read(0, chunk).equals(LabelSet.open(str(tmp_path), specs[alias]).read(0, chunk)), (alias, chunk)


def test_student_is_evaluated_on_held_out_clips(run: Run, student: str) -> None:
    measured = pipeline.evaluate(run, Mock())
    assert json.loads(Path(run.output, "evaluation.json").read_text()) == measured
    assert measured["num_clips"] == 2
    assert {name for name, value in measured["fidelity"].items() if math.isfinite(value)} == {
        "teacher.logits.top1_agreement",
        "teacher.logits.kl_nats",
        "teacher.embedding.cosine",
    }
    assert 0 < measured["cost"]["student"]["parameters"] < measured["cost"]["teacher"]["parameters"]
    assert measured["probes"]["counts"]["classes"] == 3


def test_finished_training_is_not_repeated(run: Run, student: str) -> None:
    before = Path(student, "model.safetensors").stat().st_mtime_ns
    assert pipeline.distill(run, Mock()).skipped
    assert Path(student, "model.safetensors").stat().st_mtime_ns == before


def test_kept_frames_are_not_needed_to_train(tree: harness.Tree, run: Run, student: str, no_ray: None, tmp_path: Path) -> None:
    other = harness.parsed(tree, "data.keep_frames=none", f"output={tmp_path / 'out'}", "train.epochs=1")
    assert pipeline.label(other, Mock()).done == 0  # the teacher's labels are the same, and all there
    trained = pipeline.distill(other, Mock())
    assert trained.num_examples == 13
    frames = {"none": {}, "jpeg": {FRAMES}}
    for each in (run, other):
        assert sets_of(each).keys() - {"teacher"} == set(frames[each.data.keep_frames])


@pytest.mark.usefixtures("report")
def test_second_view_is_added_beside_the_first(tree: harness.Tree, tmp_path: Path) -> None:
    other = harness.parsed(tree, "data.views.count=2", f"output={tmp_path / 'out'}")
    added = pipeline.label(other, Mock())
    assert (added.planned, added.present, added.done) == (36, 18, 18)
    for label_set in sets_of(other).values():
        assert label_set.views() == [0, 1]
        first, second = (label_set.read(view, Plan.of(other).chunks[0]) for view in (0, 1))
        assert first["example_id"].equals(second["example_id"])
        assert not first.equals(second)
    seen: list[int] = []
    watch = Mock()
    watch.trained = lambda trained: seen.append(trained.epoch)
    assert pipeline.distill(other, watch).num_examples == 2 * 13
    assert set(seen) == {0, 1}


def test_exported_student_needs_no_ray(student: str) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import numpy, torch; from vkd.checkpoint import load_student\n"
        "torch.set_num_threads(1)\n"
        "with torch.inference_mode():\n"
        "    said = load_student(sys.argv[1])(torch.from_numpy(numpy.load(sys.argv[2])))\n"
        "numpy.savez(sys.argv[3], **{name: value.numpy() for name, value in said.items()})\n"
    )
    here = load_student(student)
    frames = probe_frames(here.sampling)[None]
    place = Path(student).parent
    np.save(place / "frames.npy", frames)
    subprocess.run([sys.executable, "-c", code, student, place / "frames.npy", place / "said.npz"], check=True, timeout=60)
    with torch.inference_mode():
        expected: dict[str, Any] = here(torch.from_numpy(frames))
    with np.load(place / "said.npz") as said:
        assert set(said) == {"features", "logits", "embedding"} == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(said[name], value.numpy())


def test_student_is_the_next_teacher(tree: harness.Tree, student: str, tmp_path: Path) -> None:
    recipe = {**tree["recipe"], "teacher": {"name": "student", "path": student}}
    second = harness.parsed({**tree, "recipe": recipe}, f"output={tmp_path / 'out'}", "train.epochs=1")
    labelled = pipeline.label(second, Mock())
    assert (labelled.labelled, labelled.rejected.total()) == (16, 2)
    trained = pipeline.distill(second, Mock())
    assert set(load_student(trained.student).heads) == {"logits", "embedding"}
