"""Losses on how the clips of a batch, and the stages of a model, relate to each other in a student and in a teacher.

Rows are the clips, a column a feature; student and teacher may have different numbers of columns. Teachers get no gradient.
All rows of weight > 0 of all ranks are compared; see `batchwise` for what a rank gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vkd.losses.batchwise import MIN_ROWS, AllRows, gathered, over_batch, own_rows, product, skipped, whole_batch
from vkd.losses.distillation import SumAndCount, kept, similarity_preserving, sum_and_count, unit

CORRESPONDENCE_TAU = 0.1
CONSTANT = 1e-6  # a column, or a set of rows, that varies by less than this part of its size is rounding
CC_GAMMA, CC_ORDER = 0.4, 2  # as Peng et al. 2019 and its public code have them
PKT_FLOOR = 1e-7

Rows = Float[Tensor, "b d"]
Other = Float[Tensor, "b d2"]
AnyRows = Float[Tensor, "b _"]


def linear_cka(x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"]) -> Float[Tensor, ""]:
    """Linear centred kernel alignment of the same rows in two spaces, in [0, 1]; 0 where either is constant (Kornblith et al. 2019)."""
    return _cka([x], [y]).squeeze()


def sp(student: Rows, teacher: Other, weight: Float[Tensor, " b"], all_rows: AllRows = own_rows) -> SumAndCount:
    """`distillation.similarity_preserving` of the whole batch; skipped below MIN_ROWS rows."""

    def value(s: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(s.device.type, enabled=False):
            return similarity_preserving(s, t, s.new_ones(len(s)))[0] / len(s)

    return over_batch(value, [student, teacher.detach()], weight, all_rows, MIN_ROWS)


def correlation(
    students: Sequence[AnyRows], teachers: Sequence[AnyRows], weight: Float[Tensor, " b"], all_rows: AllRows = own_rows
) -> list[SumAndCount]:
    """For each stage k: squared difference of the CKA of stages k and j in student and teacher, mean over j = 1..k.

    The first stage's is 0. Each is skipped below MIN_ROWS rows.
    """
    rows = gathered([*students, *(teacher.detach() for teacher in teachers)], weight, all_rows)
    if len(rows[0]) < MIN_ROWS:
        return [skipped(*rows) for _ in students]
    s, t = rows[: len(students)], rows[len(students) :]
    difference = (_cka(s, s) - _cka(t, t)).square()
    return [whole_batch(difference[k, : k + 1].mean(), weight) for k in range(len(students))]


@torch.no_grad()
def stage_cka(
    students: Sequence[AnyRows], teachers: Sequence[AnyRows], weight: Float[Tensor, " b"], all_rows: AllRows = own_rows
) -> Float[Tensor, "ks kt"] | None:
    """The CKA of each stage of the student with each of the teacher, over all ranks; None below MIN_ROWS rows."""
    rows = gathered([*students, *teachers], weight, all_rows)
    return _cka(rows[: len(students)], rows[len(students) :]) if len(rows[0]) >= MIN_ROWS else None


def correspondence(cka: Float[Tensor, "ks kt"]) -> Float[Tensor, "ks kt"]:
    """How much each stage of the teacher has to say to each of the student; rows add up to 1."""
    return (cka.detach() / CORRESPONDENCE_TAU).softmax(dim=1)


def directions(num_in: int, num_out: int = 64, seed: int = 0) -> Float[Tensor, "num_in num_out"]:
    """Random directions of length about 1, the same on every machine."""
    return torch.randn(num_in, num_out, generator=torch.Generator().manual_seed(seed)) / math.sqrt(num_in)


def pair_statistics(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, "p q"]:
    """Correlation coefficients of the columns of x with those of y; 0 where either is constant."""
    a, b = (unit(_centred(z).T, CONSTANT * z.detach().norm(dim=0)) for z in (x, y))
    return product(a, b.T)


def pair(
    students: tuple[AnyRows, AnyRows], teachers: tuple[AnyRows, AnyRows], weight: Float[Tensor, " b"], all_rows: AllRows = own_rows
) -> SumAndCount:
    """Squared difference of the `pair_statistics` of two stages in student and teacher, mean over entries; skipped below MIN_ROWS rows.

    The rows are those stages' projections onto `directions`: as many columns in the student as in the teacher.
    """

    def value(s1: Tensor, s2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
        return (pair_statistics(s1, s2) - pair_statistics(t1, t2)).square().mean()

    return over_batch(value, [*students, *(teacher.detach() for teacher in teachers)], weight, all_rows, MIN_ROWS)


def rkd_distance(student: Rows, teacher: Other, weight: Float[Tensor, " b"], all_rows: AllRows = own_rows) -> SumAndCount:
    """Huber loss of the distances between rows in units of their mean, mean over pairs (Park et al. 2019)."""

    def value(s: Tensor, t: Tensor) -> Tensor:
        return F.smooth_l1_loss(_relative_distances(s), _relative_distances(t))

    return over_batch(value, [student, teacher.detach()], weight, all_rows)


def rkd_angle(student: Rows, teacher: Other, weight: Float[Tensor, " b"], all_rows: AllRows = own_rows) -> SumAndCount:
    """Huber loss of the cosines of the angles at which a row sees two others, mean over triples (Park et al. 2019)."""

    def value(s: Tensor, t: Tensor) -> Tensor:
        return F.smooth_l1_loss(_angles(s), _angles(t))

    return over_batch(value, [student, teacher.detach()], weight, all_rows)


def pkt(student: Rows, teacher: Other, weight: Float[Tensor, " b"], all_rows: AllRows = own_rows) -> SumAndCount:
    """KL of the probabilities that rows are neighbours, from cosines, mean over pairs (Passalis & Tefas 2018)."""

    def value(s: Tensor, t: Tensor) -> Tensor:
        p, q = _neighbour_probabilities(t), _neighbour_probabilities(s)
        return (p * ((p + PKT_FLOOR).log() - (q + PKT_FLOOR).log())).mean()

    return over_batch(value, [student, teacher.detach()], weight, all_rows)


def correlation_congruence(student: Rows, teacher: Other, weight: Float[Tensor, " b"], all_rows: AllRows = own_rows) -> SumAndCount:
    """Squared difference of the expanded Gaussian kernels of the rows, mean over pairs (Peng et al. 2019)."""

    def value(s: Tensor, t: Tensor) -> Tensor:
        return (_expanded_kernel(s) - _expanded_kernel(t)).square().mean()

    return over_batch(value, [student, teacher.detach()], weight, all_rows)


@torch.no_grad()
def similarity_profiles(
    rows: Rows, weight: Float[Tensor, " b"], num_bins: int, all_rows: AllRows = own_rows
) -> Float[Tensor, "b num_bins"]:
    """How like each row is to the rows of all ranks: its cosines, sorted, averaged into bins; 0 without a row.

    For `adapters.StageAttention`. Chen et al. 2021 (SemCKD) take the rows of the similarity matrix as they lie: those depend on
    the order and the number of clips. Without gradient: a student gains nothing by looking like a stage that is easy to match.
    """
    (every,) = gathered([rows], weight, all_rows)
    own = kept(rows, weight).to(every.dtype)
    if not len(every) or not len(own):
        return own.new_zeros(len(own), num_bins)
    cosines = product(unit(own), unit(every).T)
    return F.adaptive_avg_pool1d(cosines.sort(dim=1, descending=True).values, num_bins)


def attended(losses: Float[Tensor, "b ks kt"], attention: Float[Tensor, "b ks kt"], weight: Float[Tensor, " b"]) -> SumAndCount:
    """Each row's losses between all pairs of stages, by its attention, mean over the student's (Chen et al. 2021, SemCKD).

    The losses are those of `maps.mse_of_rows`, after an adapter for each pair.
    """
    return sum_and_count((kept(losses, weight) * kept(attention, weight)).sum(dim=2).mean(dim=1), weight)


def _centred(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x - x.mean(dim=0)


def _cka(xs: Sequence[Float[Tensor, "n _"]], ys: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "kx ky"]:
    return product(torch.stack([_gram(x) for x in xs]), torch.stack([_gram(y) for y in ys]).T)


def _gram(x: Float[Tensor, "n d"]) -> Float[Tensor, " n*n"]:
    """The centred Gram matrix, scaled to length 1."""
    rows = unit(_centred(x).flatten(), CONSTANT * x.detach().norm()).reshape(x.shape)
    return unit(product(rows, rows.T).flatten())


def _relative_distances(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    square = (x[:, None] - x).square().sum(dim=2)
    apart = square > 0
    distances = torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1)


def _angles(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n n"]:
    seen = unit(x[:, None] - x)
    return product(seen, seen.transpose(1, 2))


def _neighbour_probabilities(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    rows = unit(x)
    likeness = (product(rows, rows.T) + 1) / 2
    return likeness / likeness.sum(dim=1, keepdim=True)


def _expanded_kernel(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """exp(-gamma * distance^2) of rows of length 1, its Taylor series in their product cut after CC_ORDER."""
    rows = unit(x)
    exponent = 2 * CC_GAMMA * product(rows, rows.T)
    series = torch.stack([exponent**power / math.factorial(power) for power in range(CC_ORDER + 1)])
    return math.exp(-2 * CC_GAMMA) * series.sum(dim=0)
