"""Training in phases: what learns when, at which rate, and that a phase ends with its best weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from vkd import checkpoint
from vkd.checkpoint import Position
from vkd.feeding import Fed, Feeder
from vkd.loop import Loop, RoundReport, learning_rate
from vkd.phases import Between, parameter_groups, phase_of, set_trainable
from vkd.recipes.base import Batch, Distiller, Losses, Phase
from vkd.rounds import Round, batches_of_round
from vkd.run import Train

PHASES = [
    Phase("both", 2, schedule="linear"),
    Phase("first", 3, {"first.weight": 1.0, "first.bias": 1.0}),
    Phase("second", 2, {"first.weight": 0.1, "second.weight": 1.0}),
]
STARTS = {0: range(2), 1: range(2, 5), 2: range(5, 7)}
NUM_EXAMPLES, BATCH_SIZE, EVERY = 30, 8, 10  # 3 chunks of 10 are 3 rounds of 2 steps


class Two(Distiller):
    """Two layers; its scores are given, one an epoch."""

    def __init__(self, scores: Sequence[float] = ()) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)
        self.norm = nn.Sequential(nn.BatchNorm1d(3, affine=True), nn.Dropout(0.5))
        self.register_buffer("begun", torch.zeros(len(PHASES)))
        self.scores, self.entered = iter(scores), list[int]()

    def forward(self, batch: Batch) -> Losses:
        hidden = self.first(batch["x"])
        self.said = hidden.detach().softmax(dim=1)
        weight = batch["weight"]
        return {"a": ((self.second(hidden)[:, 0].square() * weight).sum(), weight.sum()), "b": (hidden.square().sum(), weight.sum())}

    def phases(self) -> Sequence[Phase]:
        return PHASES

    def enter(self, phase: int) -> None:
        self.entered.append(phase)

    def begin(self) -> None:
        self.get_buffer("begun")[self.entered[-1]] += 1

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        return torch.tensor(next(self.scores)), torch.tensor(1.0)


class InMemory:
    """Feeds rows of two numbers: 3 chunks of 10."""

    def __init__(self, sizes: Sequence[int] = (10, 10, 10)) -> None:
        self.sizes, self.rank, self.wait_s, self.unreadable, self.left_out = list(sizes), 0, 0.0, 0, 0

    def one_pass(self, epoch: int = 0) -> list[Round]:
        return Feeder.one_pass(cast(Feeder, self), epoch)

    def stream(self, rounds: Sequence[Round], batch_size: int, seed: int, skip: int = 0) -> Iterator[Fed]:
        x = torch.randn(NUM_EXAMPLES, 2, generator=torch.Generator().manual_seed(1))
        for round_ in rounds:
            batches = batches_of_round([list(range(size)) for size in self.sizes], round_, batch_size, seed)
            for number, batch in enumerate(batches):
                numbers = torch.tensor([10 * row.chunk + row.row for row in batch])
                yield Fed(
                    round_, {"x": x[numbers], "weight": torch.ones(len(batch)), "example": numbers}, len(batch), number + 1 == len(batches)
                )


def loop_of(scores: Sequence[float] = (), held_out: bool = True) -> Loop:
    torch.manual_seed(0)
    loop = Loop(Two(scores), Train(epochs=7, batch_size=BATCH_SIZE, learning_rate=0.1, warmup_fraction=0.2), "cpu")
    assert isinstance(loop.between, Between)
    loop.between.held_out = cast(Feeder, InMemory([0, 4])) if held_out else None
    return loop


def fit(loop: Loop, position: Position | None = None, told: Any = lambda *_: None) -> Position:
    return loop.fit(cast(Feeder, InMemory()), EVERY, position or Position(), told)


def test_which_phase_an_epoch_belongs_to() -> None:
    assert [phase_of(PHASES, epoch) for epoch in range(7)] == [(0, STARTS[0])] * 2 + [(1, STARTS[1])] * 3 + [(2, STARTS[2])] * 2
    assert phase_of(PHASES, 9) == (2, STARTS[2])  # past the end
    gaps = [Phase("a", 0), Phase("b", 1), Phase("c", 0), Phase("d", 2), Phase("e", 0)]
    assert [phase_of(gaps, epoch) for epoch in (0, 1, 2, 3)] == [(1, range(1)), (3, range(1, 3)), (3, range(1, 3)), (3, range(1, 3))]


def test_what_is_not_named_is_frozen() -> None:
    module = Two()
    set_trainable(module, PHASES[1])
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"first.weight", "first.bias"}
    assert module.training and module.first.training
    assert not any(part.training for part in (module.second, module.norm, *module.norm))  # its dropout too
    set_trainable(module, PHASES[2])
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"first.weight", "second.weight"}
    assert module.second.training and not module.norm.training


def test_groups_of_parameters() -> None:
    module = Two()
    set_trainable(module, PHASES[2])
    groups = parameter_groups(module, 0.3, PHASES[2])
    found = [(len(cast(list[Any], group["params"])), group["weight_decay"], group["scale"]) for group in groups]
    assert found == [(1, 0.3, 0.1), (0, 0.0, 0.1), (1, 0.3, 1.0), (0, 0.0, 1.0)]


def test_rates_and_optimizers_of_the_phases() -> None:
    """Linear all the way up, then a cosine in each phase; what has a scale learns at that part of the rate, and nothing is remembered."""
    loop, seen = loop_of(held_out=False), list[tuple[int, float]]()
    optimizers = set()

    def note(fed: Fed, step: int, total: int) -> None:
        assert total == 7 * 6
        new = id(loop.optimizer) not in optimizers
        optimizers.add(id(loop.optimizer))
        assert new == (step in (0, 12, 30))
        assert new == (not loop.optimizer.state)
        seen.append((loop.phase_number, step))
        frozen = {name for name, p in loop.distiller.named_parameters() if not p.requires_grad}
        assert all(p.grad is None for name, p in loop.distiller.named_parameters() if name in frozen)

    reports: list[RoundReport] = []
    kept = loop.optimizer  # so that no other has its id
    loop.watch = note
    end = fit(loop, told=lambda report, _: reports.append(report))
    assert [number for number, _ in seen] == [0] * 12 + [1] * 18 + [2] * 12
    assert cast(Two, loop.distiller).entered == [0, 1, 2] and loop.distiller.get_buffer("begun").tolist() == [1, 1, 1]
    train, by_phase = loop.train, [(0, 12, "linear"), (12, 18, "cosine"), (30, 12, "cosine")]
    expected = [learning_rate(i, total, train, kind) for _, total, kind in by_phase for i in range(total)]
    assert [report.learning_rate for report in reports] == expected[1::2]
    assert expected[:12] == pytest.approx([0.1 * (i + 1) / 12 for i in range(12)])
    assert expected[12:16] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert (end.epoch, end.round, end.step) == (6, 3, 42) and kept is not loop.optimizer
    rates = {group["scale"]: group["lr"] for group in loop.optimizer.param_groups}
    assert rates[0.1] == pytest.approx(0.1 * rates[1.0])


def test_only_what_learns_changes() -> None:
    loop, states = loop_of(held_out=False), list[tuple[int, Mapping[str, Tensor]]]()
    loop.watch = lambda *_: states.append(
        (loop.phase_number, {name: tensor.clone() for name, tensor in loop.distiller.state_dict().items()})
    )
    fit(loop)
    learns = [
        {"first.weight", "first.bias", "second.weight", "second.bias"},
        {"first.weight", "first.bias"},
        {"first.weight", "second.weight"},
    ]
    for (number, before), (after_number, after) in pairwise(states):
        if number == after_number:
            assert {name for name, tensor in after.items() if not tensor.equal(before[name])} <= learns[number]
    assert not states[0][1]["second.bias"].equal(states[-1][1]["second.bias"])


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([3, 2, 5, 4, 6, 1, 1], (2, 4, 1)),
        ([2, 3, 4, 5, 6, 1, 2], (2, 4, 1)),
        ([1, math.nan, math.nan, 5, math.nan, 9, math.nan], (1, 5, 9)),
        ([math.nan, math.nan, 1, 1, 1, 3, 2], (math.nan, 1, 2)),
    ],
)
def test_a_phase_ends_with_its_best_weights(scores: list[float], best: tuple[float, ...]) -> None:
    """A phase does not look at the scores of another: its losses are others."""
    loop = loop_of(scores)
    after_epoch, ends = list[Mapping[str, Tensor]](), list[tuple[float, Mapping[str, Tensor]]]()
    between = cast(Between, loop.between)
    score, original = between.score, between.after_epoch

    def noted(device: str) -> float:
        after_epoch.append({name: tensor.clone() for name, tensor in loop.distiller.state_dict().items()})
        return score(device)

    def ended(phase: int, last: bool, device: str) -> None:
        original(phase, last, device)
        if last and between.best is not None:
            ends.append((between.best.score, {name: tensor.clone() for name, tensor in loop.distiller.state_dict().items()}))

    between.score, between.after_epoch = noted, ended  # type: ignore[method-assign]
    fit(loop)
    assert [score for score, _ in ends] == pytest.approx(list(best), nan_ok=True)
    for number, (lowest, weights) in enumerate(ends):
        epochs = STARTS[number]
        epoch = next((e for e in epochs if scores[e] == lowest), epochs[-1])
        torch.testing.assert_close(dict(weights), dict(after_epoch[epoch]), rtol=0, atol=0)
    assert loop.distiller.training and loop.distiller.get_submodule("first").training


def test_without_held_out_clips_the_newest_weights_are_kept() -> None:
    for held_out in (None, cast(Feeder, InMemory([0, 0]))):
        loop = loop_of(held_out=False)
        between = cast(Between, loop.between)
        between.held_out = held_out
        newest: list[Tensor] = []
        fit(loop, told=lambda *_, loop=loop, newest=newest: newest.append(loop.distiller.get_parameter("first.weight").detach().clone()))
        assert between.best is not None and between.best.score == math.inf
        assert loop.distiller.get_parameter("first.weight").equal(newest[-1])


class Notebook:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.prepared, self.noted = list[int](), list[tuple[Round, Tensor, Tensor]]()

    def prepare(self, epoch: int) -> int:
        self.prepared.append(epoch)
        return epoch

    def note(self, round_: Round, examples: Tensor, probs: Tensor) -> None:
        self.noted.append((round_, examples, probs))

    def metrics(self) -> Mapping[str, float]:
        return {"labels/right": 0.5}


def test_a_round_is_noted_whole_before_it_is_told() -> None:
    loop, notes, told = loop_of(held_out=False), Notebook(), list[int]()
    cast(Between, loop.between).notes = notes
    assert not loop.resumes_inside_rounds
    fit(loop, told=lambda *_: told.append(len(notes.noted)))
    assert told == list(range(1, 22))
    assert notes.prepared == list(range(7))
    assert all(sorted(examples.tolist()) == list(range(10 * r.chunks[0], 10 * r.chunks[0] + 10)) for r, examples, _ in notes.noted)
    assert all(probs.shape == (10, 3) and not probs.requires_grad for _, _, probs in notes.noted)
    assert loop.metrics() == {"labels/right": 0.5}


@pytest.mark.parametrize("num_rounds", range(1, 21))
def test_a_resume_at_any_round_is_bit_equal(tmp_path: Any, num_rounds: int) -> None:
    """At the end of a phase, too, with its validation not done; scores are given, so that the best is not the newest."""

    class Crash(Exception): ...

    scores = [3, 2, 4, 5, 6, 1, 2]
    whole, first = loop_of(scores), loop_of(scores)
    fit(whole)
    folder = str(tmp_path / "a")

    def save_and_crash(report: RoundReport, position: Position) -> None:
        if report.epoch * 3 + report.round + 1 == num_rounds:
            checkpoint.save(folder, position.step, first.snapshot(position, 1.0))
            raise Crash

    with pytest.raises(Crash):
        fit(first, told=save_and_crash)
    scored = (num_rounds - 1) // 3  # epochs whose validation was done
    second = loop_of(scores[scored:])
    position = second.restore(f"{folder}/step-{2 * num_rounds:09d}")
    assert position.step == 2 * num_rounds
    fit(second, position)
    torch.testing.assert_close(dict(second.distiller.state_dict()), dict(whole.distiller.state_dict()), rtol=0, atol=0)
    assert checkpoint.best_of_phase(f"{folder}/step-{2 * num_rounds:09d}") is None or num_rounds > 3
