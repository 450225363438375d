"""A real small run of `substage`: killed anywhere it goes on bit for bit, and what it leaves is whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import small
import torch

from vkd import checkpoint, phased, teacher_use
from vkd.checkpoint import Position
from vkd.errors import LabellingEnded
from vkd.feeding import Feeder, open_sets
from vkd.label_table import LabelTable
from vkd.loop import Loop, RoundReport
from vkd.phases import Between
from vkd.planning import Plan
from vkd.run import Run
from vkd.teachers.student import StudentTeacher
from vkd.window import Awaited, Key, Link, Taken

NUM_EPOCHS, NUM_ROUNDS = 5, 10  # warm-up, two substages, two epochs of all: each of two rounds


class Crash(Exception): ...


def train(run: Run, told: list[RoundReport], num_rounds: int = NUM_ROUNDS + 1) -> Any:
    """Train in this process; killed once so many more rounds were told."""
    from vkd import training  # imports Ray, which takes seconds

    before = len(told)

    def on_round(report: RoundReport) -> None:
        told.append(report)
        if len(told) == before + num_rounds:
            raise Crash

    return training.train(run, on_round)


@pytest.fixture(scope="module")
def whole(staged: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[RoundReport]]:
    """The run without an interruption, with all checks, and what it told."""
    run, told = small.changed(staged, f"output={tmp_path_factory.mktemp('whole')}"), list[RoundReport]()
    report = train(run, told)
    assert (report.skipped, report.resumed_from, report.num_examples) == (False, 0, NUM_EPOCHS * 15)
    return run, told


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def labels_of(run: Run) -> dict[str, bytes]:
    """What was said and every version of the labels, by chunk."""
    return {name: data for name, data in contents(f"{run.output}/refined").items() if name.endswith(".parquet")}


def test_all_phases_are_trained(whole: tuple[Run, list[RoundReport]]) -> None:
    run, told = whole
    assert [(report.epoch, report.round) for report in told] == [(epoch, i) for epoch in range(NUM_EPOCHS) for i in range(2)]
    first = {"resp/1", "fd/1", "rel/1"}
    both = first | {"resp/2", "fd/2", "rel/2"}
    assert [set(report.losses) for report in told[::2]] == [{"resp/2"}, first, both, both | {"resp/fused"}, both | {"resp/fused"}]
    versions = {name.split("/")[1] for name in labels_of(run) if name.startswith("refined-")}
    assert versions == {f"view={number}" for number in range(4)}  # of epochs 0 and 1 the weak labels
    assert {name.split("/")[1] for name in labels_of(run) if name.startswith("said-")} == {f"view={epoch}" for epoch in (1, 2, 3, 4)}
    found = teacher_use.load(run.output)
    assert found is not None and [finding["kind"] for finding in found["findings"]] == []
    assert "refined.omega" not in found["columns"]


def test_killed_after_every_round_it_is_bit_equal(staged: Run, whole: tuple[Run, list[RoundReport]], tmp_path: Path) -> None:
    """Also where a phase ends: its last round is trained, and neither validated nor followed by the next phase."""
    run, told = small.changed(staged, f"output={tmp_path}", "train.check_every_steps=0"), list[RoundReport]()
    for number in range(NUM_ROUNDS):
        with pytest.raises(Crash):
            train(run, told, 1)
        assert len(told) == number + 1
    report = train(run, told)
    assert (report.resumed_from, report.num_steps) == (15, 15)
    assert [each.losses for each in told] == [each.losses for each in whole[1]]
    assert [each.learning_rate for each in told] == [each.learning_rate for each in whole[1]]
    assert labels_of(run) == labels_of(whole[0])
    assert contents(f"{run.output}/student") == contents(f"{whole[0].output}/student")
    assert train(run, told).skipped


def test_killed_once_inside_a_phase_it_is_bit_equal(staged: Run, whole: tuple[Run, list[RoundReport]], tmp_path: Path) -> None:
    run, told = small.changed(staged, f"output={tmp_path}", "checkpoint.keep=1"), list[RoundReport]()
    with pytest.raises(Crash):
        train(run, told, 7)
    train(run, told)
    assert [each.losses for each in told] == [each.losses for each in whole[1]]
    assert contents(f"{run.output}/student") == contents(f"{whole[0].output}/student")


def test_refining_again_changes_nothing(whole: tuple[Run, list[RoundReport]]) -> None:
    run, _ = whole
    plan, sets = open_sets(run, Plan.of(run))
    table, before = cast(LabelTable, phased.table_of(run, plan, sets["teacher"])), labels_of(run)
    assert [table.prepare(epoch) for epoch in (4, *range(NUM_EPOCHS), 4)] == [3, 0, 0, 1, 2, 3, 3]
    assert labels_of(run) == before
    labels = phased.EpochLabels(table)
    labels.prepare(4)
    assert labels.metrics() == {"labels/unused": table.share_unused(3)}
    assert labels.version.number == 3 and set(labels.spec.tensors) == {"q", "omega"}


def test_what_is_exported_is_the_student_alone(whole: tuple[Run, list[RoundReport]]) -> None:
    run, _ = whole
    folder = Path(run.output) / "student"
    student = checkpoint.load_student(str(folder))
    assert set(safetensors.torch.load_file(folder / checkpoint.WEIGHTS)) == set(student.state_dict())
    assert json.loads((folder / checkpoint.CONFIG).read_text())["heads"] == {"logits": 2}
    assert {name.split(".")[0] for name in student.state_dict()} == {"stem", "layer1", "layer2", "layer3", "layer4", "heads"}
    teacher = StudentTeacher(str(folder), substages=True)
    teacher.load("cpu")
    answers = teacher(teacher.probe_batch())
    assert answers["logits"].shape == (1, 2) and answers["stage4"].shape == (1, 6, 128)


def test_export_gives_what_training_exported(whole: tuple[Run, list[RoundReport]], tmp_path: Path) -> None:
    """The best weights of the last phase, which are not those of its newest checkpoint."""
    from vkd import training

    run, _ = whole
    assert training.export_newest(run, str(tmp_path)) == 15
    assert contents(str(tmp_path)) == contents(f"{run.output}/student")


def equipped(run: Run, link: Link | None = None) -> tuple[Loop, Feeder]:
    """A loop as a rank makes it, and its feeder; with a link, of labels that are made beside it."""
    plan, sets = open_sets(run, Plan.of(run))
    torch.manual_seed(0)
    loop = Loop(run.recipe.distiller({alias: s.spec.tensors for alias, s in sets.items()}, len(plan.classes())), run.train, "cpu")
    feeder = small.feeder_of(run)
    if link is not None:
        feeder = replace(feeder, sets={alias: Awaited(run.store, s.spec, link) for alias, s in sets.items()})
    return loop, phased.equip(loop, feeder)


def note(reports: list[RoundReport], report: RoundReport, position: Position) -> None:
    reports.append(report)


class Committed:
    """A labelling that has committed everything already."""

    def take(self, key: Key) -> tuple[Taken, bytes | None]:
        return Taken(True, (), False), None

    def commit(self, key: Key, round_number: int, data: bytes) -> None: ...
    def wait_for_turn(self, round_number: int) -> None: ...
    def trained(self, round_number: int) -> None: ...


def test_labels_that_are_made_beside_are_refined_too(staged: Run, tmp_path: Path) -> None:
    """Between epochs nobody reads what is awaited any more, but for the label table."""
    told: list[Sequence[dict[str, float]]] = []
    for name, link in (("stored", None), ("beside", Committed())):
        run, reports = small.changed(staged, f"output={tmp_path}/{name}"), list[RoundReport]()
        loop, feeder = equipped(run, link)
        loop.fit(feeder, run.checkpoint.every_examples, Position(), partial(note, reports))
        told.append([report.losses for report in reports])
    assert told[0] == told[1]
    stopped = Awaited(staged.store, feeder.sets["teacher"].spec, Committed())
    stopped.stopped.set()
    with pytest.raises(LabellingEnded):
        stopped.read(0, feeder.plan.chunks[0])


def test_validation_compares_answers_and_not_labels(staged: Run, tmp_path: Path) -> None:
    loop, _ = equipped(small.changed(staged, f"output={tmp_path}"))
    between = cast(Between, loop.between)
    held_out = cast(Feeder, between.held_out)
    assert held_out.split == "val" and sum(held_out.sizes) == 6
    loop.distiller.enter(3)
    first = between.score("cpu")
    assert first == between.score("cpu") > 0
    assert cast(phased.EpochLabels, between.notes).version.number == 0
    assert loop.distiller.training and loop.metrics()["labels/unused"] == 0


def test_without_held_out_clips_all_are_trained_on(staged: Run, tmp_path: Path) -> None:
    run, told = small.changed(staged, f"output={tmp_path}", "data.split={by: none}"), list[RoundReport]()
    assert train(run, told, 3 * NUM_EPOCHS + 1).num_examples == NUM_EPOCHS * 24
    newest = checkpoint.newest(run.output)
    assert newest is not None
    weights = safetensors.torch.load_file(f"{newest}/{checkpoint.WEIGHTS}")
    student = checkpoint.load_student(f"{run.output}/student").state_dict()
    assert all(weights[f"student.{name}"].equal(tensor) for name, tensor in student.items())
