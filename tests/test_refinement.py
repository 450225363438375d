"""Refinement of weak labels: values worked out elsewhere, a slow loop over rows, and what must hold for any labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd import refinement, refinement_net
from vkd.refinement import Evidence, Form, Opinions, Refinement, State

SURE, UNSURE = np.array([[0.2, 0.7, 0.1]]), np.array([[0.3, 0.5, 0.2]])
UNIFORM = np.full((1, 3), 1 / 3)
MIXED = [[0.21885406, 0.66229189, 0.11885406]]
NOTHING = np.full((1, 3), np.nan)
NO_ANCHOR = np.array([-1])


def state_of(q0: np.ndarray, known: float = 1.0, form: Form = "closed") -> State:
    return refinement.first_state(q0, np.full((len(q0), 1), known), form)


def random_rows(seed: int, num_rows: int = 12, num_classes: int = 5) -> tuple[State, Evidence, np.ndarray]:
    """A state in the middle of training and what is said of it: some rows without a weak label, an answer or a teacher."""
    rng = np.random.default_rng(seed)
    labels = [set(rng.choice(num_classes, rng.integers(0, 4), replace=False).tolist()) for _ in range(num_rows)]
    q0, known = refinement.initial(labels, num_classes)
    state = dict(refinement.first_state(q0, known, "learned"))
    state["q"] = rng.dirichlet(np.ones(num_classes), num_rows).astype(np.float32)
    state["p_s"] = rng.dirichlet(np.ones(num_classes), num_rows).astype(np.float32)
    state["seen"] = rng.integers(0, 2, (num_rows, 1)).astype(np.float32)
    said, taught = (rng.dirichlet(np.full(num_classes, 0.5), num_rows) for _ in range(2))
    said[::4], taught[::5] = np.nan, np.nan
    return state, Evidence(3, said, taught, np.full(num_rows, -1)), rng.dirichlet(np.full(num_classes, 5.0))


def slow_update(row: int, state: State, evidence: Evidence, mean: np.ndarray, config: Refinement) -> tuple[list[float], float]:
    """q and omega of one row by the equations, one number at a time."""
    num = len(mean)

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p if x > 0)

    def over_sum(p: list[float]) -> list[float]:
        return [x / sum(p) for x in p]

    q0, q, before = (over_sum([float(x) for x in state[name][row]]) for name in ("q0", "q", "p_s"))
    p_t, said = evidence.taught[row].tolist(), evidence.said[row].tolist()
    seen, asked = bool(state["seen"][row, 0]), not math.isnan(said[0])
    if math.isnan(p_t[0]):
        return q, float(state["omega"][row, 0])
    p_s = (
        [config.ema * a + (1 - config.ema) * b for a, b in zip(before, said, strict=True)] if seen and asked else said if asked else before
    )
    u_t = max(0.0, 1 - entropy(p_t) / math.log(num))
    u_s, d = 0.0, 0.0
    if seen or asked:
        half = [(a + b) / 2 for a, b in zip(p_t, p_s, strict=True)]
        d = (entropy(half) - entropy(p_t) / 2 - entropy(p_s) / 2) / math.log(2)
        u_s = max(0.0, 1 - entropy(p_s) / math.log(num)) * (1 - d)
    u_t, u_0 = u_t * (1 - 0.5 * d), config.trust * float(state["known"][row, 0])
    g = over_sum([u_0 * a + u_t * b + u_s * c for a, b, c in zip(q0, p_t, p_s, strict=True)])
    g = over_sum([x * (1 / num) / m for x, m in zip(g, mean.tolist(), strict=True)])
    g = over_sum([x ** (1 / config.sharpen) for x in g])
    q = [config.momentum * a + (1 - config.momentum) * b for a, b in zip(q, g, strict=True)]
    return q, 0.0 if max(q) < 1.5 / num else min(max(max(q) * (1 - d), 0.1), 1.0)


def test_confidence() -> None:
    np.testing.assert_allclose(refinement.confidence(np.concatenate([SURE, UNSURE])), [[0.27015330], [0.06276944]], atol=1e-6)
    assert refinement.confidence(np.array([[0.0, 1.0, 0.0]])) == 1
    assert refinement.confidence(UNIFORM) == 0


def test_generator_update_and_sharpening() -> None:
    u = np.concatenate([np.zeros((1, 1)), refinement.confidence(SURE), refinement.confidence(UNSURE)], axis=1)
    g = refinement.generate(Opinions(UNIFORM, SURE, UNSURE, np.ones((1, 1), bool), u, np.zeros((1, 1))))
    np.testing.assert_allclose(g, MIXED, atol=1e-6)
    q = 0.9 * np.array([[0.7, 0.2, 0.1]]) + 0.1 * g
    np.testing.assert_allclose(q, [[0.65188541, 0.24622919, 0.10188541]], atol=1e-6)
    np.testing.assert_allclose(refinement.sharpen(q, 0.5), [[0.8568254, 0.12224438, 0.02093022]], atol=1e-6)


def test_disagreement_is_between_0_and_1() -> None:
    left, right = np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 0.5, 0.5]])
    assert refinement.disagreement(left, right) == pytest.approx(1)
    assert refinement.disagreement(SURE, SURE) == 0
    np.testing.assert_allclose(refinement.disagreement(SURE, UNSURE), refinement.disagreement(UNSURE, SURE))


def test_alignment_makes_the_mean_uniform_when_all_rows_are_alike() -> None:
    np.testing.assert_allclose(refinement.align(SURE, SURE[0]), UNIFORM)
    np.testing.assert_allclose(refinement.align(SURE, UNIFORM[0]), SURE)


def test_weak_labels() -> None:
    q0, known = refinement.initial([{1}, {0, 3}, set(), {0, 1, 2, 3}], 4)
    expected = [[0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3], [0.475, 0.025, 0.025, 0.475], [0.25] * 4, [0.25] * 4]
    np.testing.assert_allclose(q0, expected)
    assert known[:, 0].tolist() == [1, 1, 0, 1]
    np.testing.assert_allclose(state_of(q0)["omega"][:, 0], [0.9, 0.475, 0, 0], atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("trust", [0.0, 0.5])
def test_an_update_is_the_slow_loop(seed: int, trust: float) -> None:
    state, evidence, mean = random_rows(seed)
    config = Refinement(trust=trust)
    after = refinement.refine(state, evidence, mean, config)
    for row in range(len(state["q"])):
        q, omega = slow_update(row, state, evidence, mean, config)
        np.testing.assert_allclose(after["q"][row], q, atol=2e-7)
        np.testing.assert_allclose(after["omega"][row], omega, atol=2e-7)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["closed", "learned", "argmax"]), st.booleans())
@settings(max_examples=20)
def test_what_holds_for_any_rows(seed: int, form: Form, align: bool) -> None:
    state, evidence, mean = random_rows(seed)
    config = Refinement(form=form, align=align)
    after = refinement.refine(state, evidence, mean if config.aligns else None, config)
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in state.items()}
    assert all(value.dtype == np.float32 for value in after.values())
    assert (after["q"] >= 0).all()
    np.testing.assert_allclose(after["q"].sum(axis=1), 1, atol=1e-5)
    assert (((after["omega"] >= 0.1 - 1e-6) & (after["omega"] <= 1)) | (after["omega"] == 0)).all()
    untaught = np.isnan(evidence.taught).any(axis=1)
    assert (after["q"][untaught] == state["q"][untaught]).all()
    unasked = np.isnan(evidence.said).any(axis=1)
    assert (after["p_s"][unasked] == state["p_s"][unasked]).all() and (after["seen"][unasked] == state["seen"][unasked]).all()
    again = refinement.refine(after, evidence, mean[::-1] if config.aligns else None, config)
    assert all((again[name] == after[name]).all() for name in after)  # one epoch refines once
    order = np.random.default_rng(seed).permutation(len(mean))
    rows = Evidence(evidence.epoch, *(part[order] for part in evidence[1:]))
    part = refinement.refine({name: value[order] for name, value in state.items()}, rows, mean if config.aligns else None, config)
    assert all((part[name] == after[name][order]).all() for name in after)


def test_a_certain_label_with_a_teacher_that_agrees_stays() -> None:
    certain = np.array([[0.0, 1.0, 0.0]])
    taught = np.array([[0.001, 0.998, 0.001]])
    state = state_of(certain)
    for epoch in range(50):
        state = refinement.refine(state, Evidence(epoch, taught, taught, NO_ANCHOR), UNIFORM[0], Refinement())
    np.testing.assert_allclose(state["q"], certain, atol=1e-3)


def test_a_label_moves_nowhere_when_nobody_knows() -> None:
    q0, _ = refinement.initial([{1}], 3)
    mean = np.array([0.8, 0.1, 0.1])  # neither aligned nor sharpened
    for said in (NOTHING, UNIFORM):
        after = refinement.refine(state_of(q0), Evidence(0, said, UNIFORM.astype(np.float32), NO_ANCHOR), mean, Refinement())
        assert (after["q"] == np.float32(q0)).all()


def test_the_running_answer_of_the_student() -> None:
    config, state = Refinement(ema=0.75), state_of(UNIFORM)
    for epoch, (said, expected) in enumerate([(SURE, SURE), (UNSURE, 0.75 * SURE + 0.25 * UNSURE), (NOTHING, 0.75 * SURE + 0.25 * UNSURE)]):
        state = refinement.refine(state, Evidence(epoch, said, NOTHING, NO_ANCHOR), None, config)
        np.testing.assert_allclose(state["p_s"], expected, atol=1e-7)
        assert state["seen"] == 1


def test_a_teacher_mends_a_wrong_label() -> None:
    q0, _ = refinement.initial([{0}], 3)
    state, taught = state_of(q0), np.array([[0.005, 0.99, 0.005]])
    for epoch in range(20):
        state = refinement.refine(state, Evidence(epoch, taught, taught, NO_ANCHOR), UNIFORM[0], Refinement())
    assert state["q"].argmax() == 1 and state["omega"] > 0.5


def test_a_learned_label_goes_down_the_loss_of_pencil() -> None:
    state, evidence, _ = random_rows(1)
    said, q0 = refinement.normalised(np.nan_to_num(evidence.said, nan=1.0)), refinement.normalised(state["q0"])
    before = np.random.default_rng(0).normal(size=said.shape)
    logits = torch.tensor(before, requires_grad=True)
    log_q, f = torch.log_softmax(logits, dim=1), torch.tensor(said)
    num_rows = len(said)
    loss = (f * (f.log() - log_q)).mean() - 0.4 * (torch.tensor(q0) * log_q).sum() / num_rows
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    np.testing.assert_allclose(refinement.learned_logits(before, said, q0, 600 / num_rows), before - 600 * logits.grad.numpy(), atol=1e-12)


def test_learned_labels_keep_their_logits_where_the_student_was_not_asked() -> None:
    state, evidence, _ = random_rows(2)
    after = refinement.refine(state, evidence, None, Refinement(form="learned"))
    moved = ~np.isnan(evidence.said).any(axis=1) & ~np.isnan(evidence.taught).any(axis=1)
    assert (np.abs(after["logits"] - state["logits"]).max(axis=1) > 0).tolist() == moved.tolist()
    np.testing.assert_allclose(after["q"][moved], refinement.softmax(after["logits"])[moved], atol=1e-6)


def test_the_baseline_is_the_teachers_first_class() -> None:
    state, evidence, _ = random_rows(3)
    after = refinement.refine(state, evidence, None, Refinement(form="argmax"))
    taught = ~np.isnan(evidence.taught).any(axis=1)
    assert (after["q"][taught] == np.eye(5)[evidence.taught[taught].argmax(axis=1)]).all() and (after["omega"][taught] == 1).all()


def test_a_net_learns_whom_to_believe() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    q0, known = refinement.initial([{int(x)} for x in rng.integers(0, 4, 200)], 4)  # weak labels that say nothing
    taught = 0.7 * np.eye(4)[truth] + 0.3 * rng.dirichlet(np.ones(4), 200)
    anchor = np.where(np.arange(200) < 40, truth, -1)
    state, evidence = refinement.first_state(q0, known, "net"), Evidence(0, np.full((200, 4), np.nan), taught, anchor)
    config = Refinement(form="net", momentum=0.0)
    features = refinement.weigh(state, evidence, config).features
    nets = [refinement_net.fit(features[:40], truth[:40], 4) for _ in range(2)]
    assert all((one == other).all() for one, other in zip(*nets, strict=True))
    after = refinement.refine(state, evidence, None, config, nets[0])
    assert (after["q"].argmax(axis=1) == truth).mean() > 0.95
    assert (after["q"][:40] == np.eye(4)[truth[:40]]).all()


def test_versions_follow_epochs() -> None:
    every = Refinement(start_epoch=2)
    assert [every.version(epoch) for epoch in range(6)] == [0, 0, 0, 1, 2, 3]
    third = Refinement(start_epoch=2, refine_every=3)
    assert [third.version(epoch) for epoch in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [epoch for epoch in range(10) if third.listens(epoch)] == [2, 5, 8] == [third.refined_after(v) for v in (1, 2, 3)]
    assert {Refinement(form="none").version(epoch) for epoch in range(9)} == {0}
    assert not any(Refinement(form=form).listens(5) for form in ("none", "argmax"))
