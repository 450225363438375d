"""Losses on answers: golden values, slow loops, rows that do not count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd.losses.distillation import cross_entropy, kl
from vkd.losses.response import Mix, response, soft_cross_entropy, soften

IMITATE = Mix(rho=1.0, tau=4.0)


def rows(b: int = 5, c: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, label distributions, logits of a teacher."""
    logits, target, teacher = torch.randn(3, b, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits, target.softmax(dim=1), teacher


def ones(b: int) -> Tensor:
    return torch.ones(b, dtype=torch.float64)


def test_golden() -> None:
    student, teacher = (torch.tensor([z], dtype=torch.float64) for z in ([1, 2, 0.5], [2, 0, 1]))
    total, count = response(student, 0 * student, soften(teacher, 4.0), IMITATE, ones(1), ones(1))
    assert (total.item(), count.item()) == (pytest.approx(0.82843924, abs=1e-6), 1)


@given(st.integers(1, 5), st.integers(2, 5), st.floats(0, 1), st.floats(0.5, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_response_equals_a_loop(b: int, c: int, rho: float, tau: float, seed: int) -> None:
    logits, target, teacher = rows(b, c, seed)
    weight, label_weight = torch.rand(2, b, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = 0.0
    for i in range(b):
        h, q, p = logits[i].tolist(), target[i].tolist(), soften(teacher, tau)[i].tolist()
        label = -sum(qk * (hk - math.log(sum(map(math.exp, h)))) for qk, hk in zip(q, h, strict=True))
        soft = [math.exp(hk / tau) / sum(math.exp(hj / tau) for hj in h) for hk in h]
        imitation = sum(pk * math.log(pk / sk) for pk, sk in zip(p, soft, strict=True))
        row = (1 - rho) * float(label_weight[i]) * label + rho * tau**2 * imitation
        expected += float(weight[i]) * row
    total, count = response(logits, target, soften(teacher, tau), Mix(rho, tau), weight, label_weight)
    assert total.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(count, weight.sum())


def test_its_parts_are_the_plain_losses() -> None:
    logits, _, teacher = rows()
    label = torch.tensor([0, 3, 1, 2, 0])
    one_hot = torch.nn.functional.one_hot(label, 4).double()
    torch.testing.assert_close(soft_cross_entropy(logits, one_hot, ones(5)), cross_entropy(logits, label, ones(5)))
    torch.testing.assert_close(
        response(logits, one_hot, soften(teacher, 4.0), IMITATE, ones(5), ones(5)), kl(logits, teacher, 4.0, ones(5))
    )
    fit = response(logits, one_hot, soften(teacher, 1.0), Mix(0.0, 1.0), ones(5), 0.5 * ones(5))
    torch.testing.assert_close(fit[0], 0.5 * cross_entropy(logits, label, ones(5))[0])


def test_log_probabilities_soften_as_logits_do() -> None:
    logits, _, _ = rows()
    torch.testing.assert_close(soften(logits.log_softmax(dim=1), 3.0), soften(logits, 3.0))
    torch.testing.assert_close(soften(logits, 3.0).sum(dim=1), ones(5))


def test_a_student_that_answers_as_its_teacher_loses_nothing() -> None:
    logits, target, _ = rows()
    assert response(logits, target, soften(logits, 4.0), IMITATE, ones(5), ones(5))[0].item() == pytest.approx(0, abs=1e-12)


def test_probabilities_of_0_are_no_trouble() -> None:
    logits = rows()[0].requires_grad_()
    certain = torch.nn.functional.one_hot(torch.arange(5) % 4, 4).double()
    total, _ = response(logits, certain, certain, Mix(0.5, 4.0), ones(5), ones(5))
    total.backward()
    assert total.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_rows_of_weight_0_count_nothing(filler: float) -> None:
    logits, target, teacher = rows()
    probs = soften(teacher, 2.0)
    expected = response(logits[:2], target[:2], probs[:2], Mix(0.5, 2.0), ones(2), torch.tensor([1.0, 0.0], dtype=torch.float64))
    for tensor in (logits, target, probs):
        tensor[2:] = filler
    target[1] = filler  # a row without a label
    logits.requires_grad_()
    label_weight = torch.tensor([1, 0, filler, filler, 0], dtype=torch.float64)
    found = response(logits, target, probs, Mix(0.5, 2.0), torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64), label_weight)
    torch.testing.assert_close(found, expected)
    found[0].backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and not logits.grad[2:].any()
    assert soft_cross_entropy(logits, target, 0 * ones(5))[0].item() == 0


def test_gradients_reach_the_student_only() -> None:
    logits, target, teacher = rows()
    probs = soften(teacher, 3.0).requires_grad_()
    target.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: response(x, target, probs, Mix(0.4, 3.0), ones(5), 0.3 * ones(5))[0], logits.requires_grad_())
    response(logits, target, probs, Mix(0.4, 3.0), ones(5), ones(5))[0].backward()
    assert target.grad is None and probs.grad is None
