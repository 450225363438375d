"""Distillation losses between a student's and a teacher's outputs for the same rows.

Each gives (sum of weight * loss over the rows, count of rows = sum of the weights), weights >= 0. Rows of weight 0 count
nothing, whatever they hold; with no row left the sum is 0 and still has a gradient (of 0). Teachers get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

SumAndCount = tuple[Float[Tensor, ""], Float[Tensor, ""]]


def kl(
    student_logits: Float[Tensor, "b c"], teacher_logits: Float[Tensor, "b c"], temperature: float, weight: Float[Tensor, " b"]
) -> SumAndCount:
    """T^2 * KL(teacher || student) of the distributions softened by temperature T, in nats (Hinton et al. 2015)."""
    log_student = F.log_softmax(kept(student_logits, weight) / temperature, dim=1)
    log_teacher = F.log_softmax(kept(teacher_logits.detach(), weight) / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return sum_and_count(temperature**2 * divergence, weight)


def cosine(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """1 - cosine of the angle between embeddings, in [0, 2]; 1 where either is zero."""
    return sum_and_count(1 - F.cosine_similarity(kept(student, weight), kept(teacher.detach(), weight), dim=1), weight)


def mse(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """Squared difference, mean over dimensions."""
    return sum_and_count((kept(student, weight) - kept(teacher.detach(), weight)).square().mean(dim=1), weight)


def similarity_preserving(
    student: Float[Tensor, "b ds"],
    teacher: Float[Tensor, "b dt"],
    weight: Float[Tensor, " b"],
    all_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> SumAndCount:
    """Squared difference of the rows of the L2-row-normalised Gram matrices, mean over the n rows of weight > 0.

    With weights of 0 and 1, sum / count is ||G_T - G_S||_F^2 / n^2 (Tung & Mori 2019). A row's loss depends on the rows
    beside it: `all_rows` gives those of all ranks from this rank's, and lets gradients flow back. Each rank sums over its own
    rows, compared with all; then the sums and counts of ranks add up to those of the whole batch.
    """
    present = weight > 0
    own = torch.cat([kept(student, weight), kept(teacher.detach(), weight), present[:, None]], dim=1)
    bounds = [student.shape[1], student.shape[1] + teacher.shape[1]]
    (own_s, own_t, _), (all_s, all_t, all_present) = (rows.tensor_split(bounds, dim=1) for rows in (own, all_rows(own)))
    difference = _normalised_gram(own_s, all_s) - _normalised_gram(own_t, all_t)
    return sum_and_count(difference.square().sum(dim=1) / all_present.sum().clamp(min=1), weight)


def cross_entropy(logits: Float[Tensor, "b c"], label: Int[Tensor, " b"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """Cross entropy in nats; a row of label -1 counts nothing."""
    weight = torch.where(label >= 0, weight, 0)
    return sum_and_count(F.cross_entropy(kept(logits, weight), label.clamp(min=0), reduction="none"), weight)


def _normalised_gram(x: Float[Tensor, "b d"], others: Float[Tensor, "n d"]) -> Float[Tensor, "b n"]:
    return unit(x @ others.T)


def kept(x: Float[Tensor, "b ..."], weight: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """Zeros in rows of weight 0: 0 * nan would be nan, in the sum and in the gradient."""
    return torch.where((weight > 0).reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def sum_and_count(rows: Float[Tensor, " b"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """The weighted sum of the losses of rows, and what they count."""
    return (rows * weight).sum(), weight.sum()


def unit(x: Float[Tensor, "... d"], shortest: Tensor | float = 1e-12) -> Float[Tensor, "... d"]:
    """Vectors of length 1; those no longer than `shortest` become 0, with a gradient of 0."""
    square = x.square().sum(dim=-1, keepdim=True)
    short = square <= torch.as_tensor(shortest, dtype=x.dtype, device=x.device).unsqueeze(-1).square()
    return torch.where(short, 0, x * torch.where(short, 1, square).rsqrt())
