"""The train loop: it learns, and a resume is the training that it interrupted, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import small
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vkd import checkpoint
from vkd.checkpoint import Position
from vkd.loop import Loop, RoundReport, as_metrics, learning_rate
from vkd.recipes.base import Distiller
from vkd.recipes.kd import KDDistiller
from vkd.run import Run, Train

NUM_ROUNDS = 6  # 3 epochs of 15 clips, each in a round of at least 10 and a rest


def loop_of(run: Run, seed: int = 0) -> Loop:
    """An untrained loop whose student has dropout, so that random numbers matter."""
    feeder = small.feeder_of(run)
    torch.manual_seed(seed)
    distiller = run.recipe.distiller({alias: s.spec.tensors for alias, s in feeder.sets.items()}, len(feeder.classes))
    assert isinstance(distiller, KDDistiller)
    distiller.student.get_submodule("stem").register_forward_hook(_drop)
    return Loop(distiller, run.train, "cpu")


def _drop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return F.dropout(output, 0.1, module.training)


def fit(run: Run, loop: Loop, position: Position, on_round: Callable[[RoundReport, Position], None]) -> Position:
    return loop.fit(small.feeder_of(run), run.checkpoint.every_examples, position, on_round)


def ignore(report: RoundReport, position: Position) -> None: ...


@pytest.fixture(scope="module")
def trained(labelled: Run) -> tuple[Loop, list[tuple[RoundReport, Position]]]:
    """The whole training, and what it told after each round."""
    loop, told = loop_of(labelled), list[tuple[RoundReport, Position]]()
    fit(labelled, loop, Position(), lambda report, position: told.append((report, position)))
    return loop, told


def test_losses_fall(labelled: Run) -> None:
    run = small.changed(labelled, "train.epochs=12", "train.learning_rate=0.005", "recipe.weights={kl: 1, cosine: 1, mse: 1}")
    losses: list[dict[str, float]] = []
    fit(run, loop_of(run), Position(), lambda report, _: losses.append(report.losses))
    assert all(losses[-1][name] < 0.5 * losses[0][name] for name in ("kl", "cosine", "mse")), (losses[0], losses[-1])


def test_rounds_are_told_in_order(trained: tuple[Loop, list[tuple[RoundReport, Position]]]) -> None:
    reports, positions = [report for report, _ in trained[1]], [position for _, position in trained[1]]
    assert [(r.epoch, r.round) for r in reports] == [(epoch, i) for epoch in range(3) for i in range(2)]
    assert [(p.epoch, p.round) for p in positions] == [(epoch, i) for epoch in range(3) for i in (1, 2)]
    assert [p.step for p in positions] == [r.step for r in reports]
    assert reports[-1].step == reports[-1].num_steps
    assert [p.num_examples for p in positions[1::2]] == [15, 30, 45]
    assert all(0 <= r.wait_fraction <= 1 and r.examples_per_s > 0 and r.unreadable == 0 for r in reports)
    assert all(set(r.losses) == {"kl", "cosine"} for r in reports)


@pytest.mark.parametrize("num_before", range(1, NUM_ROUNDS))
def test_a_resume_is_bit_equal_to_no_interruption(
    labelled: Run, trained: tuple[Loop, list[tuple[RoundReport, Position]]], tmp_path: Path, num_before: int
) -> None:
    class Crash(Exception): ...

    first, told = loop_of(labelled), list[RoundReport]()

    def save_then_crash(report: RoundReport, position: Position) -> None:
        told.append(report)
        small.save_checkpoint(f"{tmp_path}/attempts/1", position, first.distiller, first.optimizer)
        if len(told) == num_before:
            raise Crash

    with pytest.raises(Crash):
        fit(labelled, first, Position(), save_then_crash)
    second = loop_of(labelled, seed=9)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    position = checkpoint.restore(found, second.distiller, second.optimizer)
    reached = fit(labelled, second, position, lambda report, _: told.append(report))
    assert reached == trained[1][-1][1]
    assert [r.losses for r in told] == [r.losses for r, _ in trained[1]]
    assert_same(second, trained[0])


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_resume_inside_a_round_is_bit_equal_too(
    labelled: Run, trained: tuple[Loop, list[tuple[RoundReport, Position]]], tmp_path: Path, num_steps: int
) -> None:
    class Crash(Exception): ...

    first = loop_of(labelled)

    def save_then_crash(position: Position) -> None:
        if position.step >= num_steps:
            assert position.batch > 0
            small.save_checkpoint(f"{tmp_path}/attempts/1", position, first.distiller, first.optimizer)
            raise Crash

    with pytest.raises(Crash):
        first.fit(small.feeder_of(labelled), labelled.checkpoint.every_examples, Position(), ignore, save_then_crash)
    second = loop_of(labelled, seed=9)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    position = checkpoint.restore(found, second.distiller, second.optimizer)
    assert fit(labelled, second, position, ignore) == trained[1][-1][1]
    assert_same(second, trained[0])


def assert_same(a: Loop, b: Loop) -> None:
    torch.testing.assert_close(dict(a.distiller.state_dict()), dict(b.distiller.state_dict()), rtol=0, atol=0)
    states = [loop.optimizer.state_dict()["state"] for loop in (a, b)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_finished_training_has_nothing_left(labelled: Run, trained: tuple[Loop, list[tuple[RoundReport, Position]]]) -> None:
    end = trained[1][-1][1]
    assert fit(labelled, loop_of(labelled), end, ignore) == end


def test_the_seed_decides(labelled: Run, trained: tuple[Loop, list[tuple[RoundReport, Position]]]) -> None:
    other = small.changed(labelled, "train.seed=1")
    loop = loop_of(other, seed=0)
    fit(other, loop, Position(), ignore)
    with pytest.raises(AssertionError):
        assert_same(loop, trained[0])


def test_bf16_trains(labelled: Run) -> None:
    run = small.changed(labelled, "train.precision=bf16", "train.epochs=1")
    loop, losses = loop_of(run), list[dict[str, float]]()
    fit(run, loop, Position(), lambda report, _: losses.append(report.losses))
    assert all(torch.tensor(list(each.values())).isfinite().all() for each in losses)
    assert {p.dtype for p in loop.distiller.parameters()} == {torch.float32}


def test_metrics_are_flat_numbers(trained: tuple[Loop, list[tuple[RoundReport, Position]]]) -> None:
    report = trained[1][0][0]
    metrics = as_metrics(report)
    assert {"loss/kl", "loss/cosine", "learning_rate", "examples_per_s", "epoch", "step"} <= set(metrics)
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert metrics["loss/kl"] == report.losses["kl"]


@given(st.integers(1, 200), st.floats(0, 0.99), st.floats(1e-6, 1))
def test_learning_rate_rises_to_its_peak_and_falls_to_zero(total: int, warmup_fraction: float, peak: float) -> None:
    train = Train(learning_rate=peak, warmup_fraction=warmup_fraction)
    warmup = max(1, round(warmup_fraction * total))
    rates = [learning_rate(step, total, train) for step in range(total)]
    assert rates[0] == pytest.approx(peak / warmup)
    assert rates[warmup - 1] == pytest.approx(peak)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= peak * (1 + 1e-6) for rate in rates)
    if total > warmup:
        assert learning_rate(warmup, total, train) == pytest.approx(peak)
        assert learning_rate(total, total, train) == pytest.approx(0, abs=1e-6 * peak)


def test_known_learning_rates() -> None:
    train = Train(learning_rate=1.0, warmup_fraction=0.2)
    rates = [round(learning_rate(step, 10, train), 4) for step in range(10)]
    assert rates == [0.5, 1.0, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]


def test_the_rate_reaches_the_optimizer(labelled: Run) -> None:
    run = small.changed(labelled, "train.epochs=1")
    loop, rates = loop_of(run), list[tuple[float, ...]]()
    step = loop.optimizer.step

    def noted() -> None:
        rates.append(tuple(group["lr"] for group in loop.optimizer.param_groups))
        step()

    loop.optimizer.step = noted  # type: ignore[method-assign, assignment]
    end = fit(run, loop, Position(), ignore)
    assert rates == [(learning_rate(i, end.step, run.train),) * 2 for i in range(end.step)]


def test_only_matrices_and_kernels_decay(labelled: Run) -> None:
    loop = loop_of(small.changed(labelled, "train.weight_decay=0.3"))
    decayed, free = loop.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    in_groups = [id(p) for group in (decayed, free) for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in loop.distiller.parameters())


def test_frozen_parameters_are_not_optimised(labelled: Run) -> None:
    distiller: Distiller = loop_of(labelled).distiller
    stem = [p.requires_grad_(False) for p in distiller.student.get_submodule("stem").parameters()]
    optimised = {id(p) for group in Loop(distiller, labelled.train, "cpu").optimizer.param_groups for p in group["params"]}
    assert stem
    assert optimised == {id(p) for p in distiller.parameters()} - {id(p) for p in stem}


def test_gradients_are_clipped(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small.changed(labelled, "train.epochs=1", "train.clip_norm=0.01")
    loop, norms = loop_of(run), list[float]()
    step = loop.optimizer.step

    def noted() -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in loop.distiller.parameters() if p.grad is not None]).norm()))
        step()

    loop.optimizer.step = noted  # type: ignore[method-assign, assignment]
    fit(run, loop, Position(), ignore)
    assert norms == pytest.approx([0.01] * len(norms), rel=0.01)
