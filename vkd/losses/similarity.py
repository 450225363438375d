"""Losses and labels of similarity distillation (Kordopatis-Zilos et al. 2022, DnS).

Sums and counts as in `distillation`: a row is a pair of videos, and rows of weight 0 count nothing, whatever they hold.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vkd.losses.distillation import SumAndCount

Array = TypeVar("Array", np.ndarray, Tensor)


def to_unit(fine_similarity: Array) -> Array:
    """Fine similarities, in [-1, 1], on the scale of coarse ones, [0, 1]. Coarse ones are never mapped."""
    return fine_similarity / 2 + 0.5


def absolute(student: Float[Tensor, " b"], teacher: Float[Tensor, " b"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """Absolute difference of a pair's similarity. A coarse student's teacher is `to_unit` of a fine one."""
    rows = (_kept(student, weight) - _kept(teacher.detach(), weight)).abs()
    return (rows * weight).sum(), weight.sum()


def excess(cells: Float[Tensor, "b i j"], mask: Bool[Tensor, "b i j"] | None, weight: Float[Tensor, " b"]) -> SumAndCount:
    """How far the comparator's cells lie outside [-1, 1], summed over a pair.

    The paper adds 0.001 times its sum over the 64 pairs of a batch: a weight of 0.064 on the mean over pairs, which unlike the sum
    does not change with batch size or number of ranks. Padding does not count; in the paper's code it does, once the last bias
    is itself outside.
    """
    outside = F.relu(cells.abs() - 1)
    rows = (outside if mask is None else outside.masked_fill(~mask, 0)).sum((1, 2))
    return (_kept(rows, weight) * weight).sum(), weight.sum()


def needs_fine(fine_similarity: Float[Tensor, " b"], coarse_similarity: Float[Tensor, " b"], threshold: float = 0.2) -> Float[Tensor, " b"]:
    """The selector's label: 1 where the coarse score is further than the threshold from the fine one, both on [0, 1]."""
    return ((to_unit(fine_similarity) - coarse_similarity).abs() > threshold).to(fine_similarity.dtype)


def binary_cross_entropy(logits: Float[Tensor, " b"], label: Float[Tensor, " b"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """Cross entropy in nats of the selector's logits."""
    rows = F.binary_cross_entropy_with_logits(_kept(logits, weight), _kept(label, weight), reduction="none")
    return (rows * weight).sum(), weight.sum()


def _kept(x: Float[Tensor, " b"], weight: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Zeros in rows of weight 0: 0 * nan would be nan, in the sum and in the gradient."""
    return torch.where(weight > 0, x, 0)
