"""Is the teacher really used? Each way not to use it is found by its name, a healthy training gives no warning, and none is changed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import fakes
import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from vkd import gather, teacher_use
from vkd.checkpoint import Position
from vkd.clips import Sampling
from vkd.errors import StorageError
from vkd.feeding import Fed, Feeder
from vkd.loop import Loop, RoundReport
from vkd.recipes.base import Batch, Losses
from vkd.recipes.kd import KD, KDDistiller
from vkd.rounds import Round, batches_of_round, rank_slice
from vkd.run import Run, Train
from vkd.students.base import Student
from vkd.teacher_use import TeacherUse

TEACHER = fakes.TinyTeacher()
NUM_STEPS, BATCH_SIZE = 110, 16
NEEDS = ("teacher.embedding", "teacher.logits")
Spoil = Callable[[Batch], Batch]


def clips(num_clips: int, seed: int) -> Batch:
    """Clips of one colour each, under noise, and what TinyTeacher says of them."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (num_clips, 1, 1, 1, 3))
    frames = np.clip(colours + rng.normal(0, 20, (num_clips, 2, 16, 16, 3)), 0, 255).astype(np.uint8)
    labels = {f"teacher.{name}": torch.from_numpy(values.copy()) for name, values in TEACHER.labels(frames).items()}
    class_ = torch.from_numpy((colours.reshape(-1, 3)[:, 0] > 127).astype(np.int64))
    return {"frames": torch.from_numpy(frames), "label": class_, "weight": torch.ones(num_clips)} | labels


class InMemory:
    """Feeds clips that nobody has seen before, as a long video corpus does; `spoil` changes them."""

    def __init__(self, spoil: Spoil = dict, num_clips: int = NUM_STEPS * BATCH_SIZE, seed: int = 0) -> None:
        self.rank, self.world_size = gather.world()
        self.sizes, self.wait_s, self.unreadable, self.left_out = [num_clips], 0.0, 0, 0
        self.clips = spoil(clips(num_clips, seed))

    def stream(self, rounds: Sequence[Round], batch_size: int, seed: int, skip: int = 0) -> Iterator[Fed]:
        for round_ in rounds:
            batches = batches_of_round([list(range(size)) for size in self.sizes], round_, batch_size, seed)
            for number, batch in enumerate(batches):
                rows = [row.row for row in rank_slice(batch, self.rank, self.world_size)]
                part = {name: tensor[rows or [0]].clone() for name, tensor in self.clips.items()}
                part["weight"] *= bool(rows)
                yield Fed(round_, part, len(batch), number == len(batches) - 1)


class Colours(Student):
    """Sees mean colours; has dropout and BatchNorm, so that random numbers and buffers matter."""

    def __init__(self, heads: dict[str, int]) -> None:
        super().__init__(Sampling(num_frames=2, size_px=16), 32, heads)
        self.trunk = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU())

    def features(self, clips: Tensor) -> Tensor:
        found: Tensor = self.trunk(clips.mean(dim=(3, 4)).flatten(1))
        return found


def loop_of(weights: dict[str, float], seed: int = 0, **train: Any) -> Loop:
    """An untrained loop of a student of colours."""
    torch.manual_seed(seed)
    student = {"name": f"{__name__}:Colours"}
    recipe = KD.model_validate({"name": "kd", "teacher": "t", "student": student, "weights": {"kl": 0, "cosine": 0} | weights})
    options = {"epochs": 1, "batch_size": BATCH_SIZE, "learning_rate": 0.01, "seed": seed, "check_every_steps": 50} | train
    return Loop(recipe.distiller({"teacher": TEACHER.emits}, 2), Train(**options), "cpu")


def fit(loop: Loop, feeder: InMemory, needs: Sequence[str] = NEEDS, told: list[RoundReport] | None = None) -> TeacherUse:
    use = TeacherUse(loop, needs)
    loop.watch = use
    loop.fit(cast(Feeder, feeder), 10**9, Position(), lambda report, _: None if told is None else told.append(report))
    return use


def kinds(use: TeacherUse) -> set[tuple[str, str]]:
    return {(finding.kind, finding.where) for finding in use.findings()}


def permuted(batch: Batch) -> Batch:
    order = torch.from_numpy(np.random.default_rng(5).permutation(len(batch["weight"])))
    return batch | {name: batch[name][order] for name in NEEDS}


def replaced(batch: Batch, name: str, change: Callable[[Tensor], Tensor]) -> Batch:
    return batch | {name: change(batch[name].clone())}


def dead(labels: Tensor) -> Tensor:
    labels[:, 2] = 0
    return labels


def not_finite(labels: Tensor) -> Tensor:
    labels[::7, 1] = torch.nan
    return labels


@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_training_gives_no_warning(capfd: pytest.CaptureFixture[str], seed: int) -> None:
    weights = {"kl": 1.0, "cosine": 1.0, "mse": 1.0, "cross_entropy": 1.0}
    use = fit(loop_of(weights, seed), InMemory(seed=seed))
    assert use.judged
    assert use.findings() == []
    assert "warning" not in capfd.readouterr().err
    found = use.document()
    assert {name: control["depends"] for name, control in found["losses"].items()} == {name: name != "cross_entropy" for name in weights}
    assert found["losses"]["cross_entropy"]["margin"] == 0
    assert all(found["losses"][name]["margin"] > 5 for name in ("kl", "cosine", "mse"))
    assert sum(found["gradient_share"].values()) == pytest.approx(1)
    for agreement in found["agreement"].values():
        assert agreement["labels"] > agreement["shuffled"] + 0.2
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("epochs", "seed"), [*((3, seed) for seed in range(5)), (60, 0)])
def test_a_small_run_on_real_clips_gives_no_warning(labelled: Run, epochs: int, seed: int) -> None:
    """15 clips, seen 3 times (which proves nothing, and is not judged) or 60 times."""
    run = small.changed(labelled, f"train.epochs={epochs}", f"train.seed={seed}", "train.check_every_steps=20")
    feeder = small.feeder_of(run)
    torch.manual_seed(seed)
    loop = Loop(run.recipe.distiller({alias: s.spec.tensors for alias, s in feeder.sets.items()}, 0), run.train, "cpu")
    use = teacher_use.watched(loop, run, 0)
    loop.fit(feeder, run.checkpoint.every_examples, Position(), lambda report, _: None)
    assert (use.judged, use.findings()) == (epochs == 60, [])


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_other_clips_are_found(capfd: pytest.CaptureFixture[str], seed: int) -> None:
    use = fit(loop_of({"kl": 1.0, "cosine": 1.0, "cross_entropy": 1.0}, seed), InMemory(permuted, seed=seed))
    assert kinds(use) == {("unused", "kl"), ("unused", "cosine")}
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2  # each once
    assert all(line.startswith("warning: ") and "those of other clips" in line and " -> check that labels" in line for line in lines)


def test_losses_that_compare_how_clips_lie_may_have_labels_of_other_clips() -> None:
    loop = loop_of({"kl": 1.0, "cosine": 1.0, "cross_entropy": 1.0})
    loop.distiller.unpaired = ("cosine",)
    assert kinds(fit(loop, InMemory(permuted))) == {("unused", "kl")}


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("teacher.embedding", lambda labels: labels[:1].repeat(len(labels), 1), {("constant", "teacher.embedding")}),
        ("teacher.embedding", dead, {("dead", "teacher.embedding")}),
        ("teacher.logits", not_finite, {("not_finite", "teacher.logits")}),
    ],
)
def test_a_column_that_says_nothing_is_found(name: str, change: Callable[[Tensor], Tensor], found: set[tuple[str, str]]) -> None:
    loop = loop_of({"mse": 1.0} if name == "teacher.embedding" else {"cosine": 1.0}, check_every_steps=10)
    use = fit(loop, InMemory(lambda batch: replaced(batch, name, change), num_clips=12 * BATCH_SIZE))
    assert kinds(use) == found


def test_few_clips_are_no_evidence() -> None:
    """Columns are judged by clips, not by how often epochs bring them back."""
    spoilt = [lambda labels: labels[:1].repeat(len(labels), 1), dead]
    for change in spoilt:
        feeder = InMemory(lambda batch, change=change: replaced(batch, "teacher.embedding", change), num_clips=24)  # type: ignore[misc]
        use = fit(loop_of({"kl": 1.0}, epochs=20, check_every_steps=5), feeder)
        assert use.columns["teacher.embedding"].num_rows == 24
        assert use.findings() == []


def test_a_loss_that_drowns_is_found_before_training(capfd: pytest.CaptureFixture[str]) -> None:
    use = fit(loop_of({"kl": 1.0, "cosine": 1e-6}), InMemory(num_clips=BATCH_SIZE))
    assert kinds(use) == {("drowned", "cosine")}
    assert use.shares["cosine"] < 1e-4
    assert capfd.readouterr().err.startswith("warning: cosine: ")


class Blind(KDDistiller):
    """Its losses look at no label."""

    def forward(self, batch: Batch) -> Losses:
        return {"norm": (self.student(batch["frames"])["embedding"].square().mean(dim=1).sum(), batch["weight"].sum())}


class Leaking(KDDistiller):
    """Its student is handed the labels."""

    def forward(self, batch: Batch) -> Losses:
        outputs = self.student(batch["frames"])
        seen = torch.from_numpy(TEACHER.labels(batch["frames"].numpy())["embedding"].copy())
        distance = (0.1 * outputs["embedding"] + seen - batch["teacher.embedding"]).square().mean(dim=1)
        return {"mse": (distance.sum(), batch["weight"].sum())}


def test_losses_that_ignore_the_labels_are_found() -> None:
    loop = loop_of({"kl": 1.0, "cosine": 1.0}, check_every_steps=10)
    loop.distiller.__class__ = Blind
    assert kinds(fit(loop, InMemory(num_clips=20 * BATCH_SIZE))) == {("ignored", "teacher.embedding, teacher.logits")}
    loop = loop_of({"cross_entropy": 1.0}, check_every_steps=10)  # a baseline that asks for no label
    assert fit(loop, InMemory(num_clips=20 * BATCH_SIZE), needs=()).findings() == []


def test_labels_that_leak_are_found_before_training() -> None:
    loop = loop_of({"mse": 1.0})
    loop.distiller.__class__ = Leaking
    use = fit(loop, InMemory(num_clips=BATCH_SIZE))
    assert kinds(use) == {("leak", "mse")}
    later = TeacherUse(loop, NEEDS)
    later.recall(json.loads(json.dumps(use.document())))
    assert later.findings() == use.findings()
    assert later.max_shares == use.max_shares


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_bit_equal_with_and_without_checks(precision: str) -> None:
    weights = {"kl": 1.0, "cosine": 1.0, "similarity": 0.5, "cross_entropy": 1.0}
    results = []
    for every_steps in (0, 1, 7):
        loop, told = loop_of(weights, precision=precision, epochs=2, check_every_steps=every_steps), list[RoundReport]()
        use = fit(loop, InMemory(num_clips=15 * BATCH_SIZE + 3), told=told)
        assert bool(use.controls) == bool(every_steps)
        results.append((loop, [report.losses for report in told], torch.get_rng_state()))
    (alone, losses, random), *watched = results
    for loop, its_losses, its_random in watched:
        assert its_losses == losses
        assert torch.equal(its_random, random)
        torch.testing.assert_close(dict(loop.distiller.state_dict()), dict(alone.distiller.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(loop.optimizer.state_dict()["state"], alone.optimizer.state_dict()["state"], rtol=0, atol=0)
        assert [m.training for m in loop.distiller.modules()] == [m.training for m in alone.distiller.modules()]


def _disturb(norm: nn.Module) -> None:
    """A student that draws random numbers and changes a buffer in eval mode too."""
    norm.get_buffer("seen").add_(torch.rand(1))


def test_a_look_leaves_everything_as_it_was() -> None:
    loop, feeder = loop_of({"kl": 1.0}), InMemory(num_clips=BATCH_SIZE)
    loop.distiller.train()
    norm = loop.distiller.student.get_submodule("trunk.1").eval()
    norm.register_buffer("seen", torch.zeros(1))
    norm.register_forward_hook(lambda module, inputs, output: _disturb(module))
    modes = [module.training for module in loop.distiller.modules()]
    state = {name: tensor.clone() for name, tensor in loop.distiller.state_dict().items()}
    (fed,) = feeder.stream([Round(0, 0, (0,))], BATCH_SIZE, 0)
    before = {name: tensor.clone() for name, tensor in fed.batch.items()}
    random = torch.get_rng_state()
    TeacherUse(loop, NEEDS)(fed, 0, 10)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in loop.distiller.modules()] == modes
    torch.testing.assert_close(dict(loop.distiller.state_dict()), state, rtol=0, atol=0)
    torch.testing.assert_close(fed.batch, before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in loop.distiller.parameters())
    assert not loop.distiller.student._forward_hooks


def test_checks_fall_before_training_every_n_steps_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, look = list[int](), TeacherUse._look

    def noted(self: TeacherUse, *args: Any) -> None:
        looked.append(self.step)
        look(self, *args)

    monkeypatch.setattr(TeacherUse, "_look", noted)
    fit(loop_of({"kl": 1.0}, check_every_steps=20), InMemory(num_clips=50 * BATCH_SIZE))
    assert looked == [*range(8), *range(20, 28), *range(40, 48)]  # the last 8 begin while a check goes on
    looked.clear()
    fit(loop_of({"kl": 1.0}, check_every_steps=0), InMemory(num_clips=50 * BATCH_SIZE))
    assert looked == []


def test_a_trunk_that_is_frozen_has_no_shares() -> None:
    loop = loop_of({"kl": 1.0, "cosine": 1e-6})
    loop.distiller.student.get_submodule("trunk").requires_grad_(False)
    use = fit(loop, InMemory(num_clips=BATCH_SIZE))
    assert (use.shares, use.findings()) == ({}, [])


def test_the_document_is_written_and_read_back(tmp_path: Path) -> None:
    assert teacher_use.load(str(tmp_path)) is None
    use = fit(loop_of({"kl": 1.0, "cosine": 1e-6}), InMemory(num_clips=BATCH_SIZE))
    use.save(str(tmp_path))
    assert teacher_use.load(str(tmp_path)) == use.document()
    assert {"teacher_use/gradient_share/kl", "teacher_use/loss_with_labels/kl", "teacher_use/agreement/teacher.logits"} <= set(
        use.metrics()
    )
    (tmp_path / teacher_use.FILE).write_text("{")
    with pytest.raises(StorageError, match=teacher_use.FILE):
        teacher_use.load(str(tmp_path))
    fit(loop_of({"kl": 1.0}, check_every_steps=0), InMemory(num_clips=BATCH_SIZE)).save(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


class Gathering(KDDistiller):
    """Its losses need all ranks, forward and backward, as those that gather embeddings do."""

    def forward(self, batch: Batch) -> Losses:
        losses = super().forward(batch)
        return {name: (_Mean.apply(total), count) for name, (total, count) in losses.items()}


class FrozenNorm(nn.BatchNorm1d):
    """Stays in eval mode."""

    def train(self, mode: bool = True) -> FrozenNorm:
        return super().train(False)


class _Mean(torch.autograd.Function):
    """The mean over ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return gather.sum_over_ranks(value) / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return gather.sum_over_ranks(grad) / 2


def train_on_a_rank(rank: int, folder: str) -> None:
    """What each of two processes does: the same training with and without checks, the last batch of one row."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for every_steps in (0, 2):
        loop, told = loop_of({"kl": 1.0, "cosine": 1e-6}, check_every_steps=every_steps), list[RoundReport]()
        loop.distiller.__class__ = Gathering
        loop.distiller.student.get_submodule("trunk.1").__class__ = FrozenNorm  # one row has no variance
        loop.enter(0)
        use = fit(loop, InMemory(num_clips=20 * BATCH_SIZE + 1), told=told)
        results.append((dict(loop.distiller.state_dict()), [report.losses for report in told]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert kinds(use) == {("drowned", "cosine")}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(use.document()))
    dist.destroy_process_group()


def test_two_ranks_look_at_the_same_steps(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", __file__, tmp_path], check=False, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: cosine") == 1  # rank 0 tells
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    for name in ("step", "losses", "gradient_share", "agreement"):
        assert first[name] == second[name]


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # DistributedDataParallel would, for a second in each rank
    mp.start_processes(train_on_a_rank, (sys.argv[1],), nprocs=2, start_method="fork")
