"""The table of refined labels: versions that come out the same whoever makes them, in whatever order, and after a crash."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vkd import label_table, refinement
from vkd.clips import ClipPlan, SplitPlan
from vkd.errors import ConfigError, LabelsMismatch, LabelsMissing
from vkd.feeding import Feeder, open_sets
from vkd.label_table import LabelTable
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.refinement import Evidence, Form, Refinement
from vkd.rounds import Chunk, Round, rounds_of_epoch
from vkd.run import Run
from vkd.schema import EXAMPLE_ID, LABELLED, STATUS, TRAIN, TensorType
from vkd.store.encodings import decode
from vkd.store.labelset import ChunkRows, LabelSet, LabelSetSpec, Reject

pytestmark = pytest.mark.timeout(60)
CLASSES = ["jump", "run", "walk"]
NUM_VIDEOS, NUM_VIEWS, CHUNK_SIZE = 26, 2, 4
REJECTED = {(0, 5), (1, 5), (1, 6)}  # (view, video): one in all views, one in some
HELD_OUT = (*range(8, 12), 14, 20)  # the third chunk is held out as a whole
Answers = dict[str, dict[str, np.ndarray]]


def rows() -> list[dict[str, str]]:
    """Videos of known truth whose weak label is wrong for every third, absent for every fifth, and of two classes for every seventh."""
    found = []
    for i in range(NUM_VIDEOS):
        truth = CLASSES[i % 3]
        label = CLASSES[(i + 1) % 3] if i % 3 == 1 else "" if i % 5 == 0 else f"{truth}|{CLASSES[(i + 1) % 3]}" if i % 7 == 0 else truth
        split = "val" if i in HELD_OUT else "train"
        found.append({"label": label, "truth": truth, "split": split, "anchor": truth if i % 4 == 0 else ""})
    return found


def plan_of(folder: Path, columns: Sequence[str]) -> Plan:
    """A plan of those videos with some of their columns; no video is opened."""
    lines = [",".join(["uri", *columns]), *(",".join([f"{i:02d}.mp4", *(row[name] for name in columns)]) for i, row in enumerate(rows()))]
    for i in range(NUM_VIDEOS):
        (folder / f"{i:02d}.mp4").write_bytes(bytes([i]))
    (folder / "videos.csv").write_text("\n".join(lines))
    build(str(folder / "videos.csv"), str(folder / "manifest"), BuildOptions(probe="none", chunk_size=CHUNK_SIZE))
    return Plan(str(folder / "manifest"), ClipPlan(), SplitPlan(by="column"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(tmp_path_factory.mktemp("plan"), ["label", "truth", "split", "anchor"])


def silent(plan: Plan, folder: Path) -> LabelSet:
    """A teacher of the plan's classes that says nothing."""
    spec = LabelSetSpec("teacher", {}, {"logits": TensorType("float32", (3,))}, {"logits": "fp32"})
    label_set = LabelSet.create(str(folder), spec, {}, {}, {})
    for chunk in plan.chunks:
        ids = plan.examples(chunk)[EXAMPLE_ID].to_pylist()
        label_set.write(0, chunk, ChunkRows(ids, {}, {"logits": np.zeros((len(ids), 3), np.float32)}))
    return label_set


@pytest.fixture(scope="module")
def taught(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> LabelSet:
    """A teacher that is right and fairly sure."""
    spec = LabelSetSpec("teacher", {"teacher": "a"}, {"logits": TensorType("float32", (3,))}, {"logits": "fp32"})
    label_set, rng = LabelSet.create(str(tmp_path_factory.mktemp("store")), spec, {}, {}, {}), np.random.default_rng(0)
    for position, chunk in enumerate(plan.chunks):
        examples = plan.examples(chunk)
        truth = np.array([CLASSES.index(name) for name in examples["truth"].to_pylist()])
        for view in range(NUM_VIEWS):
            logits = (3 * np.eye(3)[truth] + rng.normal(size=(len(truth), 3))).astype(np.float32)
            bad = [row for row in range(len(truth)) if (view, position * CHUNK_SIZE + row) in REJECTED]
            rejects = {row: Reject("decode", "gone", "gone", True) for row in bad}
            label_set.write(view, chunk, ChunkRows(examples[EXAMPLE_ID].to_pylist(), rejects, {"logits": logits}))
    return label_set


@pytest.fixture
def table_of(plan: Plan, taught: LabelSet, tmp_path: Path) -> Callable[..., LabelTable]:
    def table(folder: str = "table", form: Form = "closed", **changes: Any) -> LabelTable:
        map_chunks = changes.pop("map_chunks", map)
        return LabelTable(str(tmp_path / folder), plan, taught, NUM_VIEWS, Refinement(form=form, **changes), map_chunks)

    return table


def rounds_of(plan: Plan, epoch: int) -> list[Round]:
    return rounds_of_epoch([len(part) for part in plan.rows(TRAIN)], epoch, every_examples=9, seed=0)


def said_in(epoch: int, numbers: np.ndarray) -> torch.Tensor:
    """What a student says of examples: a function of their numbers and the epoch."""
    logits = np.stack([np.random.default_rng([epoch, number]).normal(size=3) for number in numbers.tolist()])
    return torch.from_numpy(refinement.softmax(logits)).float()


def numbers_of(plan: Plan, round_: Round) -> np.ndarray:
    """The train rows of a round, out of order."""
    numbers = [chunk * CHUNK_SIZE + row for chunk in round_.chunks for row in plan.rows(TRAIN)[chunk]]
    return np.random.default_rng(round_.index).permutation(numbers)


def train(table: LabelTable, epoch: int) -> None:
    """Note what the student says in one epoch, with a masked row here and there."""
    for round_ in rounds_of(table.plan, epoch):
        numbers = numbers_of(table.plan, round_)
        probs = torch.cat([said_in(epoch, numbers), torch.full((1, 3), torch.nan)])
        table.note(round_, torch.from_numpy(np.append(numbers, -1)), probs)


def train_all(table: LabelTable, epochs: int) -> list[int]:
    versions = []
    for epoch in range(epochs):
        versions.append(table.prepare(epoch))
        train(table, epoch)
    return [*versions, table.prepare(epochs)]


def column(table: LabelTable, version: int, name: str) -> np.ndarray:
    """A column of a version, all rows in the order of the plan."""
    return np.concatenate([np.asarray(decode(table.at(version).label_set.read(version, chunk), name)) for chunk in table.plan.chunks])


def chunk_files(table: LabelTable) -> dict[str, bytes]:
    root = Path(table.sets.refined.uri)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.parquet")}


def in_disorder(fn: Callable[[Chunk], Any], chunks: Sequence[Chunk]) -> list[Any]:
    return list(map(fn, random.Random(len(chunks)).sample(chunks, len(chunks))))


def in_threads(fn: Callable[[Chunk], Any], chunks: Sequence[Chunk]) -> list[Any]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(fn, chunks))


def test_weak_labels_may_name_several_classes() -> None:
    examples = pa.table({"label": ["walk", "walk|run", None, "swim"]})
    assert label_table.weak_sets(examples, CLASSES) == [{2}, {1, 2}, set(), set()]
    assert label_table.weak_sets(pa.table({"x": [1, 2]}), CLASSES) == [set(), set()]


def test_version_0_is_the_weak_labels(table_of: Callable[..., LabelTable]) -> None:
    table = table_of()
    assert table.prepare(0) == 0
    sets = [{CLASSES.index(name) for name in row["label"].split("|") if name} for row in rows()]
    np.testing.assert_allclose(column(table, 0, "q"), refinement.initial(sets, 3)[0], atol=1e-7)
    trained = [i for i in range(NUM_VIDEOS) if i not in HELD_OUT]
    assert table.share_unused(0) == sum(len(sets[i]) != 1 for i in trained) / len(trained)  # 0.95 / 2 is less than 1.5 / 3


def test_an_update_is_the_arithmetic_on_all_rows_at_once(table_of: Callable[..., LabelTable], plan: Plan, taught: LabelSet) -> None:
    table = table_of(momentum=0.5)
    assert train_all(table, 3) == [0, 1, 2, 3]
    views = []
    for view in range(NUM_VIEWS):
        tables = [taught.read(view, chunk) for chunk in plan.chunks]
        logits = np.concatenate([np.asarray(decode(each, "logits"), np.float64) for each in tables])
        labelled = np.concatenate([np.array(each[STATUS].to_pylist()) == LABELLED for each in tables])
        views.append(np.where(labelled[:, None], refinement.softmax(logits), np.nan))
    p_t = np.where(np.isnan(views[1]), views[0], np.where(np.isnan(views[0]), views[1], (views[0] + views[1]) / 2))
    sets = [{CLASSES.index(name) for name in row["label"].split("|") if name} for row in rows()]
    state = refinement.first_state(*refinement.initial(sets, 3), "closed")
    train_rows = np.array([i not in HELD_OUT for i in range(NUM_VIDEOS)])
    for epoch in range(3):
        said = np.where(train_rows[:, None], said_in(epoch, np.arange(NUM_VIDEOS)).numpy(), np.nan)
        evidence = Evidence(epoch, said, p_t, np.full(NUM_VIDEOS, -1))
        g, _ = refinement.proposed(refinement.weigh(state, evidence, table.config), evidence, None)
        mean = g[train_rows & ~np.isnan(p_t).any(axis=1)].mean(axis=0)
        state = refinement.refine(state, evidence, mean, table.config)
        for name, expected in state.items():
            np.testing.assert_allclose(column(table, epoch + 1, name), expected, atol=1e-6, err_msg=name)


def test_a_row_without_a_teacher_keeps_its_weak_label(table_of: Callable[..., LabelTable]) -> None:
    table = table_of()
    train_all(table, 2)
    moved = np.abs(column(table, 2, "q") - column(table, 2, "q0")).max(axis=1) > 0
    assert not moved[5] and moved.sum() == NUM_VIDEOS - 1


def test_labels_get_better_by_a_teacher(table_of: Callable[..., LabelTable]) -> None:
    table = table_of(momentum=0.3)
    train_all(table, 6)
    before, after = table.accuracy(0), table.accuracy(6)
    assert before is not None and after is not None and after > before + 0.15
    assert table.share_unused(6) < table.share_unused(0)


def test_without_truth_there_is_no_accuracy(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["label", "split"])
    table = LabelTable(str(tmp_path / "table"), plan, silent(plan, tmp_path), 1, Refinement(form="none"))
    assert table.prepare(7) == 0
    assert table.accuracy(0) is None


def test_a_manifest_without_labels_has_only_a_teacher(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["truth", "split"])
    table = LabelTable(str(tmp_path / "table"), plan, silent(plan, tmp_path), 1, Refinement(form="argmax"))
    assert table.prepare(1) == 1
    assert (column(table, 0, "q") == np.float32(1 / 3)).all() and table.share_unused(0) == 1


@pytest.mark.parametrize("form", ["closed", "learned", "net", "argmax"])
@pytest.mark.parametrize("map_chunks", [in_disorder, in_threads])
def test_the_order_of_chunks_does_not_matter(table_of: Callable[..., LabelTable], form: Form, map_chunks: Callable[..., list[Any]]) -> None:
    ordered, disordered = table_of("a", form), table_of("b", form, map_chunks=map_chunks)
    assert train_all(ordered, 2) == train_all(disordered, 2) == [0, 1, 2]
    assert chunk_files(ordered) == chunk_files(disordered)
    assert len(chunk_files(ordered)) == 3 * len(ordered.plan.chunks)
    assert (column(ordered, 2, "q") != column(ordered, 1, "q")).any() or form == "argmax"


def test_what_is_prepared_and_noted_twice_stays(table_of: Callable[..., LabelTable]) -> None:
    table = table_of()
    train_all(table, 2)
    before, said = chunk_files(table), column(table, 2, "p_s")
    for round_ in rounds_of(table.plan, 1):
        table.note(round_, torch.from_numpy(numbers_of(table.plan, round_)), torch.full((len(numbers_of(table.plan, round_)), 3), 1 / 3))
    assert [table.prepare(epoch) for epoch in (2, 0, 1, 2)] == [2, 0, 1, 2]
    assert chunk_files(table) == before
    shutil.rmtree(f"{table.sets.refined.uri}/view=2")
    table.prepare(2)
    assert (column(table, 2, "p_s") == said).all()


@pytest.mark.parametrize("form", ["closed", "net"])
def test_a_crash_between_chunks_is_mended(table_of: Callable[..., LabelTable], form: Form) -> None:
    table = table_of(form=form)
    train_all(table, 3)
    whole = chunk_files(table)
    for name in sorted(whole)[1::2]:
        if "view=0" not in name:
            (Path(table.sets.refined.uri) / name).unlink()
    assert table.at(1).label_set.missing(0, table.plan.chunks) == []  # the weak labels are still there to be read
    assert table_of(form=form).prepare(3) == 3  # another start
    assert chunk_files(table) == whole


def test_who_prepares_beats_while_labels_are_made(plan: Plan, taught: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_table, "BEAT_S", 0.01)
    beaten = threading.Event()

    class Late:
        spec = taught.spec

        def read(self, view: int, chunk: Chunk, columns: Sequence[str] | None = None) -> pa.Table:
            assert beaten.wait(30)
            return taught.read(view, chunk, columns)

    table = LabelTable(str(tmp_path), plan, Late(), NUM_VIEWS, Refinement())
    train(table, 0)
    assert table.prepare(1, beaten.set) == 1


def test_two_that_prepare_at_once_agree(table_of: Callable[..., LabelTable]) -> None:
    table, other = table_of(), table_of("other")
    train_all(other, 2)
    for epoch in range(2):
        train(table, epoch)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: table_of().prepare(2), range(4))) == [2] * 4
    assert chunk_files(table) == chunk_files(other)


def test_a_resume_goes_on_from_what_is_there(table_of: Callable[..., LabelTable]) -> None:
    whole = table_of("whole")
    train_all(whole, 3)
    before = table_of("resumed")
    before.prepare(0)
    train(before, 0)
    before.prepare(1)
    half = rounds_of(before.plan, 1)[:1]
    for round_ in half:  # of epoch 1, then the process dies
        numbers = numbers_of(before.plan, round_)
        before.note(round_, torch.from_numpy(numbers), said_in(1, numbers))
    after = table_of("resumed")
    assert after.prepare(1) == 1
    for epoch in (1, 2):
        train(after, epoch)
    assert after.prepare(3) == 3
    assert chunk_files(after) == chunk_files(whole)


def test_what_was_not_noted_is_missed(table_of: Callable[..., LabelTable]) -> None:
    table = table_of()
    table.prepare(0)
    for round_ in rounds_of(table.plan, 0)[1:]:
        numbers = numbers_of(table.plan, round_)
        table.note(round_, torch.from_numpy(numbers), said_in(0, numbers))
    with pytest.raises(LabelsMissing, match=r"epoch 0 is missing for \d of 6 chunks"):
        table.prepare(1)


def test_an_update_now_and_then(table_of: Callable[..., LabelTable]) -> None:
    table = table_of(start_epoch=1, refine_every=2)
    assert train_all(table, 5) == [0, 0, 1, 1, 2, 2]
    assert table.sets.said.views() == [1, 3]
    assert set(column(table, 2, "epoch")[:, 0].tolist()) == {3}


def test_answers_that_are_not_finite_are_refused(table_of: Callable[..., LabelTable]) -> None:
    table = table_of()
    round_ = rounds_of(table.plan, 0)[0]
    with pytest.raises(ConfigError, match="not finite"):
        table.note(round_, torch.from_numpy(numbers_of(table.plan, round_)[:2]), torch.tensor([[0.2, 0.3, 0.5], [np.nan] * 3]))


def test_classes_are_the_teachers(plan: Plan, tmp_path: Path) -> None:
    spec = LabelSetSpec("teacher", {}, {"logits": TensorType("float32", (5,))}, {})
    with pytest.raises(ConfigError, match="name 3 classes, and the teacher's logits have 5"):
        LabelTable(str(tmp_path), plan, LabelSet.create(str(tmp_path), spec, {}, {}, {}), 1, Refinement())


def test_a_net_needs_anchors(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["label", "split"])
    table = LabelTable(str(tmp_path / "table"), plan, silent(plan, tmp_path), 1, Refinement(form="net"))
    train(table, 0)
    with pytest.raises(ConfigError, match=r"recipe.refine.form: no example to train on has a verified class"):
        table.prepare(1)


def test_labels_of_other_examples_are_refused(table_of: Callable[..., LabelTable], plan: Plan) -> None:
    table = table_of()
    ids = ["x"] * CHUNK_SIZE
    refined = {name: np.zeros((CHUNK_SIZE, *kind.row_shape), np.float32) for name, kind in table.sets.refined.spec.tensors.items()}
    table.sets.refined.write(0, plan.chunks[0], ChunkRows(ids, {}, refined))
    with pytest.raises(LabelsMismatch, match="of other examples"):
        table.accuracy(0)


def test_a_feeder_reads_a_version_as_labels(labelled: Run, tmp_path: Path) -> None:
    plan, sets = open_sets(labelled, Plan.of(labelled))
    spec = LabelSetSpec("teacher", {}, {"logits": TensorType("float32", (2,))}, {"logits": "fp32"})
    taught = LabelSet.create(str(tmp_path), spec, {}, {}, {})
    table = LabelTable(str(tmp_path / "table"), plan, taught, 1, Refinement())
    refined = cast(LabelSet, table.at(table.prepare(0)))
    feeder = Feeder(labelled, plan, {**sets, "refined": refined}, TRAIN)
    fed = list(feeder.stream(rounds_of_epoch(feeder.sizes, 1, 6, 0), 4, seed=0))
    assert sum(len(each.batch["label"]) for each in fed) == 15
    for each in fed:
        assert each.batch["refined.omega"].shape == (len(each.batch["label"]), 1)
        expected = torch.tensor([[0.9, 0.1], [0.1, 0.9]])[each.batch["label"]]
        torch.testing.assert_close(each.batch["refined.q"], expected)


def on_a_rank(rank: int, folder: str, manifest: str, taught_uri: str) -> None:
    """Each of three processes notes its own rows, and reads the version that rank 0 makes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    plan = Plan(manifest, ClipPlan(), SplitPlan(by="column"))
    table = LabelTable(f"{folder}/table", plan, LabelSet.at(taught_uri), NUM_VIEWS, Refinement())
    for epoch in range(2):
        assert table.prepare(epoch) == epoch
        for round_ in rounds_of(plan, epoch):
            mine = numbers_of(plan, round_)[rank::3]
            table.note(round_, torch.from_numpy(mine), said_in(epoch, mine))
    assert table.prepare(2) == 2
    assert len(column(table, 2, "q")) == NUM_VIDEOS
    dist.destroy_process_group()


def test_ranks_make_what_one_makes(table_of: Callable[..., LabelTable], plan: Plan, taught: LabelSet, tmp_path: Path) -> None:
    alone = table_of("alone")
    train_all(alone, 2)
    arguments = [str(tmp_path), plan.manifest_path, taught.uri]
    subprocess.run([sys.executable, "-W", "error", __file__, *arguments], check=True, timeout=60)
    assert chunk_files(table_of("table")) == chunk_files(alone)


if __name__ == "__main__":
    mp.start_processes(on_a_rank, tuple(sys.argv[1:]), nprocs=3, start_method="fork")  # type: ignore[no-untyped-call, attr-defined]
