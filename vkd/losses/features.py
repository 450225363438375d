"""Losses between the feature distributions of a stage of a student and of a teacher, on descriptors and on plain rows.

A descriptor [6, d] is what is stored of a stage's map of d channels: mean, deviation, and 4 steps of its mean over time. The
student's are already adapted to the teacher's d. Teachers get no gradient; rows of weight 0 count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vkd.losses.batchwise import AllRows, gathered, own_rows, precise, product, skipped, whole_batch
from vkd.losses.distillation import SumAndCount, kept, sum_and_count, unit

NUM_STATISTICS = 2  # the first rows of a descriptor: mean, deviation; the others are the profile
BANDWIDTHS = (0.5, 1.0, 2.0)  # in median distances between teacher rows
MIN_MEDIAN = 1e-2  # of rows of length 1: below it a kernel would see nothing but itself
VARIANCE_FLOOR = 1e-5
SCALE_FLOOR = 0.1  # of the mean scale: a channel that is constant in the teacher must not outweigh all others


def statistics(descriptor: Float[Tensor, "b 6 d"]) -> Float[Tensor, "b e"]:
    """Mean and deviation of all channels, in one row."""
    return descriptor[:, :NUM_STATISTICS].flatten(1)


def moments(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean squared differences of the means over rows, and of the deviations over rows."""
    means = (student.mean(dim=0) - teacher.mean(dim=0)).square().mean()
    return means, (_deviation(student) - _deviation(teacher)).square().mean()


def rbf_mmd(student: Float[Tensor, "n d"], teacher: Float[Tensor, "m d"], sigmas: Sequence[float | Tensor]) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy, biased, for the mean of the kernels exp(-distance^2 / (2 sigma^2)) (Gretton et al. 2012)."""

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        square = _square_distances(a, b)
        return torch.stack([torch.exp(-square / (2 * sigma**2)).mean() for sigma in sigmas]).mean()

    return similarity(student, student) + similarity(teacher, teacher) - 2 * similarity(student, teacher)


def direction_mmd(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """`rbf_mmd` of the rows scaled to length 1, with bandwidths relative to the median distance between teacher rows."""
    student, teacher = unit(student), unit(teacher)
    median = _median_distance(teacher.detach())
    return rbf_mmd(student, teacher, [factor * median for factor in BANDWIDTHS])


def nst_profiles(student: Float[Tensor, "b cs p"], teacher: Float[Tensor, "b ct p"]) -> Float[Tensor, " b"]:
    """Squared MMD between the channels' profiles, scaled to length 1, for the kernel (a . b)^2 (Huang & Wang 2017)."""
    student, teacher = unit(student), unit(teacher)
    across = _mean_square_product(student, teacher)
    return _mean_square_product(student, student) + _mean_square_product(teacher, teacher) - 2 * across


def descriptor_loss(
    student: Float[Tensor, "b 6 d"],
    teacher: Float[Tensor, "b 6 d"],
    scale: Float[Tensor, "2 d"],
    weight: Float[Tensor, " b"],
    all_rows: AllRows = own_rows,
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
) -> SumAndCount:
    """Weighted sum of the losses on moments, on the direction of the means, and on profiles.

    The first two compare the whole batch, the third each row. `scale`: running deviation over clips of the teacher's mean and
    deviation, per channel.
    """
    teacher = teacher.detach()
    s, t = gathered([student[:, :NUM_STATISTICS], teacher[:, :NUM_STATISTICS]], weight, all_rows)
    if not len(s):
        return skipped(s)
    one = floored(scale)
    means, deviations = moments((s / one).flatten(1), (t / one).flatten(1))
    total, count = whole_batch(weights[0] * (means + deviations) + weights[1] * direction_mmd(s[:, 0], t[:, 0]), weight)
    profiles = [precise(kept(x[:, NUM_STATISTICS:], weight)).transpose(1, 2) for x in (student, teacher)]
    return total + weights[2] * sum_and_count(nst_profiles(*profiles), weight)[0], count


def floored(scale: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """The scale of each channel to divide by: that of a nearly constant one is raised to a share of the mean over channels."""
    return torch.maximum(scale, SCALE_FLOOR * scale.mean(dim=-1, keepdim=True)).clamp_min(1e-6).detach()


def _deviation(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    return (x.var(dim=0, correction=0) + VARIANCE_FLOOR).sqrt()


def _square_distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return (squares - 2 * product(a, b.T)).clamp_min(0)


def _median_distance(rows: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Of all pairs of different rows; 1 for a single row."""
    if len(rows) < 2:
        return rows.new_ones(())
    i, j = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    return _square_distances(rows, rows)[i, j].median().sqrt().clamp_min(MIN_MEDIAN)


def _mean_square_product(a: Float[Tensor, "b ca p"], b: Float[Tensor, "b cb p"]) -> Float[Tensor, " b"]:
    """Mean of (a_i . b_j)^2 over all pairs of channels, by whichever of the two products is smaller."""
    if a.shape[2] > min(a.shape[1], b.shape[1]):
        return product(a, b.transpose(1, 2)).square().mean(dim=(1, 2))
    return (product(a.transpose(1, 2), a) * product(b.transpose(1, 2), b)).sum(dim=(1, 2)) / (a.shape[1] * b.shape[1])
