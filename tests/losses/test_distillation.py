"""Distillation losses against slow loops, torch, and numerical gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd.losses import distillation
from vkd.losses.distillation import SumAndCount, cosine, cross_entropy, kl, mse, similarity_preserving

Loss = Callable[[Tensor, Tensor, Tensor], SumAndCount]


def kl_at_3(student: Tensor, teacher: Tensor, weight: Tensor) -> SumAndCount:
    return kl(student, teacher, 3.0, weight)


def labelled(student: Tensor, teacher: Tensor, weight: Tensor) -> SumAndCount:
    """Cross entropy with labels drawn from the teacher, so that all losses have one form."""
    return cross_entropy(student, teacher.nan_to_num().argmax(dim=1), weight)


LOSSES: list[Loss] = [kl_at_3, cosine, mse, similarity_preserving, labelled]
ADDITIVE = [loss for loss in LOSSES if loss is not similarity_preserving]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
every_additive_loss = pytest.mark.parametrize("loss", ADDITIVE, ids=lambda f: f.__name__)


def rows(b: int = 5, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, b, d, dtype=torch.float64, generator=generator)
    return student, teacher


def ones(b: int) -> Tensor:
    return torch.ones(b, dtype=torch.float64)


@given(st.integers(1, 6), st.integers(2, 5), st.floats(0.3, 8.0), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_kl_equals_a_loop(b: int, c: int, temperature: float, seed: int) -> None:
    student, teacher = rows(b, c, seed)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        s, t = ([math.exp(v / temperature) for v in values] for values in (s, t))
        p, q = [v / sum(t) for v in t], [v / sum(s) for v in s]
        expected += temperature**2 * sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    total, count = kl(student, teacher, temperature, ones(b))
    assert total.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert count.item() == b


def test_kl_equals_torch() -> None:
    student, teacher = rows()
    p, log_q = (teacher / 2).softmax(1), (student / 2).log_softmax(1)
    expected = torch.nn.KLDivLoss(reduction="batchmean")(log_q, p) * 4
    total, count = kl(student, teacher, 2.0, ones(5))
    torch.testing.assert_close(total / count, expected)


def test_kl_golden() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    total, _ = kl(student, teacher, 1.0, torch.ones(1))
    assert total.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


def test_squared_temperature_keeps_the_gradient() -> None:
    """Hinton et al.: at high T the gradient tends to (z - v) / c for centred logits, whatever T."""
    student, teacher = (x - x.mean(dim=1, keepdim=True) for x in rows())
    student.requires_grad_()
    total, _ = kl(student, teacher, 1e3, ones(5))
    (gradient,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / 4, rtol=1e-2, atol=1e-3)


def test_cosine_and_mse_equal_a_loop() -> None:
    student, teacher = rows()
    pairs = list(zip(student.tolist(), teacher.tolist(), strict=True))
    dots = [sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t)) for s, t in pairs]
    assert cosine(student, teacher, ones(5))[0].item() == pytest.approx(sum(1 - d for d in dots))
    squares = [sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s) for s, t in pairs]
    assert mse(student, teacher, ones(5))[0].item() == pytest.approx(sum(squares))
    torch.testing.assert_close(mse(student, teacher, ones(5))[0] / 5, torch.nn.functional.mse_loss(student, teacher))


def test_similarity_preserving_equals_the_paper() -> None:
    student, teacher = rows(4)[0], torch.randn(4, 9, dtype=torch.float64)
    expected = 0.0
    grams = []
    for x in (student, teacher):
        gram = [[float(a @ b) for b in x] for a in x]
        grams.append([[v / math.hypot(*row) for v in row] for row in gram])
    for row_s, row_t in zip(*grams, strict=True):
        expected += sum((a - b) ** 2 for a, b in zip(row_s, row_t, strict=True))
    total, count = similarity_preserving(student, teacher, ones(4))
    assert (total / count).item() == pytest.approx(expected / 4**2)


def test_similarity_preserving_leaves_rows_of_weight_0_out() -> None:
    student, teacher = rows(5)
    kept = [0, 2, 4]
    masked = similarity_preserving(student, teacher, torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64))
    torch.testing.assert_close(masked, similarity_preserving(student[kept], teacher[kept], ones(3)))


def test_similarity_preserving_adds_up_when_each_part_sees_all_rows() -> None:
    student, teacher = rows(6)
    weight = torch.tensor([1.0, 0.5, 0, 2, 1, 1], dtype=torch.float64)
    seen: list[Tensor] = []

    def note(own: Tensor) -> Tensor:
        seen.append(own)
        return own

    whole = similarity_preserving(student, teacher, weight, note)
    cuts = (slice(0, 2), slice(2, 3), slice(3, 6))
    parts = [similarity_preserving(student[cut], teacher[cut], weight[cut], lambda own: seen[0]) for cut in cuts]
    torch.testing.assert_close(tuple(map(sum, zip(*parts, strict=True))), whole)
    torch.testing.assert_close(similarity_preserving(student, teacher, weight), whole)


def test_similarity_preserving_of_one_row_is_0() -> None:
    student, teacher = rows(1)
    total, count = similarity_preserving(student, teacher, ones(1))
    assert (total.item(), count.item()) == (pytest.approx(0.0, abs=1e-20), 1)


def test_cross_entropy_equals_torch_and_skips_unlabelled_rows() -> None:
    logits, _ = rows(4, 3)
    label, weight = torch.tensor([2, -1, 0, 1]), torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    total, count = cross_entropy(logits, label, weight)
    losses = torch.nn.functional.cross_entropy(logits, label, reduction="none", ignore_index=-1)
    torch.testing.assert_close(total, losses[0] + 0.5 * losses[2])
    assert count.item() == 1.5


@every_loss
def test_same_outputs_cost_nothing(loss: Loss) -> None:
    x, _ = rows()
    if loss is not labelled:
        assert loss(x, 1.0 * x, ones(5))[0].item() == pytest.approx(0.0, abs=1e-12)


@every_loss
def test_gradients_are_right(loss: Loss) -> None:
    student, teacher = rows()
    weight = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, weight)[0], student.requires_grad_())


@every_loss
def test_teachers_get_no_gradient(loss: Loss) -> None:
    student, teacher = (x.requires_grad_() for x in rows())
    loss(student, teacher, ones(5))[0].backward()
    assert student.grad is not None and teacher.grad is None


@every_additive_loss
@given(st.integers(0, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_parts_add_up_to_the_batch(loss: Loss, cut: int, seed: int) -> None:
    student, teacher = rows(6, seed=seed)
    weight = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = loss(student, teacher, weight)
    parts = [loss(student[part], teacher[part], weight[part]) for part in (slice(0, cut), slice(cut, 6))]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0])
    torch.testing.assert_close(whole[1], parts[0][1] + parts[1][1])


@every_loss
@pytest.mark.parametrize("filler", [0.0, math.inf, math.nan])
def test_rows_of_weight_0_count_nothing(loss: Loss, filler: float) -> None:
    student, teacher = rows()
    expected = loss(student[:3], teacher[:3], ones(3))
    student, teacher = student.clone(), teacher.clone()
    student[3:], teacher[3:] = filler, filler
    student.requires_grad_()
    total, count = loss(student, teacher, torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))
    torch.testing.assert_close((total.detach(), count), expected)
    total.backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[3:].any()


@every_loss
def test_no_row_left_gives_0_with_a_gradient(loss: Loss) -> None:
    student, teacher = rows(2)
    student.requires_grad_()
    total, count = loss(student, teacher, 0 * ones(2))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0.0)
    assert student.grad is not None and not student.grad.any()


def test_no_label_gives_0_with_a_gradient() -> None:
    logits = rows(2)[0].requires_grad_()
    total, count = cross_entropy(logits, torch.tensor([-1, -1]), ones(2))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0.0)
    assert logits.grad is not None and not logits.grad.any()


@every_loss
def test_zero_embeddings_have_finite_gradients(loss: Loss) -> None:
    student = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    total, _ = loss(student, torch.zeros(3, 4, dtype=torch.float64), ones(3))
    total.backward()
    assert total.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_half_precision_students_are_scored_against_float32_teachers() -> None:
    student, teacher = (x.float() for x in rows())
    for loss in (partial(kl, temperature=2.0), distillation.cosine, distillation.mse):
        low, _ = loss(student.bfloat16(), teacher, weight=torch.ones(5))
        full, _ = loss(student, teacher, weight=torch.ones(5))
        torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.05)
