"""Losses on the answers of a classifier: soft labels, and a teacher's softened probabilities.

Each gives (weighted sum, count) over rows; rows of weight 0 count nothing, whatever they hold. Targets get no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vkd.losses.distillation import SumAndCount, kept, sum_and_count


class Mix(NamedTuple):
    """How a response loss is put together: `rho` of it imitates the teacher at temperature `tau`, the rest fits the label."""

    rho: float
    tau: float


def soften(scores: Float[Tensor, "b c"], tau: float) -> Float[Tensor, "b c"]:
    """Probabilities at temperature tau, from logits or from log-probabilities: they differ by a constant per row."""
    return (scores / tau).softmax(dim=1)


def soft_cross_entropy(logits: Float[Tensor, "b c"], target_probs: Float[Tensor, "b c"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """Cross entropy in nats against a distribution over the classes; weights may be any fraction."""
    return sum_and_count(_cross_entropies(logits, target_probs, weight), weight)


def response(
    logits: Float[Tensor, "b c"],
    target_probs: Float[Tensor, "b c"],
    teacher_probs: Float[Tensor, "b c"],
    mix: Mix,
    weight: Float[Tensor, " b"],
    label_weight: Float[Tensor, " b"],
) -> SumAndCount:
    """(1 - rho) * label_weight * CE(target) + rho * tau^2 * KL(teacher || student at tau), mean over the rows of `weight`.

    `teacher_probs` are at tau already. A row of label weight 0 still imitates the teacher, and its target may hold anything.
    """
    weight_of_label = weight * label_weight
    label = kept(label_weight, weight) * _cross_entropies(logits, target_probs, weight_of_label)
    log_student = F.log_softmax(kept(logits, weight) / mix.tau, dim=1)
    teacher = F.kl_div(log_student, kept(teacher_probs.detach(), weight), reduction="none").sum(dim=1)
    return sum_and_count((1 - mix.rho) * kept(label, weight_of_label) + mix.rho * mix.tau**2 * teacher, weight)


def _cross_entropies(logits: Float[Tensor, "b c"], target_probs: Float[Tensor, "b c"], weight: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    return -(kept(target_probs.detach(), weight) * F.log_softmax(kept(logits, weight), dim=1)).sum(dim=1)
