"""Losses between the maps [c, t, h, w] of a stage of a student and of a teacher, for a teacher that runs beside the student.

Both maps are averaged down to the smaller of their sizes, axis by axis. Where channels are compared one by one, the student's
map is already adapted to the teacher's channels. Teachers get no gradient; rows of weight 0 count nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vkd.losses.batchwise import AllRows, gathered, own_rows, precise, skipped, whole_batch
from vkd.losses.distillation import SumAndCount, kept, sum_and_count, unit
from vkd.losses.features import direction_mmd, floored, moments, nst_profiles

CHANNEL_TAU = 4.0

Map = Float[Tensor, "b c t h w"]
SameChannels = Float[Tensor, "b c t2 h2 w2"]
Other = Float[Tensor, "b c2 t2 h2 w2"]


def mse(student: Map, teacher: SameChannels, weight: Float[Tensor, " b"]) -> SumAndCount:
    """Squared difference, mean over the map: FitNets (Romero et al. 2015) after an adapter, stagewise distillation without one."""
    return sum_and_count(mse_of_rows(student, teacher, weight), weight)


def mse_of_rows(student: Map, teacher: SameChannels, weight: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """`mse` row by row; 0 where the weight is 0."""
    s, t = _common(student, teacher, weight)
    return (s - t).square().flatten(1).mean(dim=1)


def attention_transfer(student: Map, teacher: Other, weight: Float[Tensor, " b"]) -> SumAndCount:
    """Squared difference of where the energy lies, mean over positions (Zagoruyko & Komodakis 2017, p = 2)."""
    s, t = (unit(x.square().mean(dim=1).flatten(1)) for x in _common(student, teacher, weight))
    return sum_and_count((s - t).square().mean(dim=1), weight)


def nst(student: Map, teacher: Other, weight: Float[Tensor, " b"]) -> SumAndCount:
    """`features.nst_profiles` of the channels' whole maps; the work grows with the square of the channels."""
    s, t = (x.flatten(2) for x in _common(student, teacher, weight))
    return sum_and_count(nst_profiles(s, t), weight)


def vid(mean: Map, variance: Float[Tensor, " c"], teacher: SameChannels, weight: Float[Tensor, " b"]) -> SumAndCount:
    """-log density of the teacher's map under a Gaussian, without the constant, mean over the map (Ahn et al. 2019).

    It is not bounded below by 0.
    """
    s, t = _common(mean, teacher, weight)
    spread = variance[:, None, None, None]
    return sum_and_count(((s - t).square() / spread + spread.log()).flatten(1).mean(dim=1) / 2, weight)


def channel_kl(student: Map, teacher: SameChannels, weight: Float[Tensor, " b"]) -> SumAndCount:
    """tau^2 * KL(teacher || student) of the softmax over each channel's positions, mean over channels (Shu et al. 2021)."""
    s, t = (F.log_softmax(x.flatten(2) / CHANNEL_TAU, dim=2) for x in _common(student, teacher, weight))
    divergence = F.kl_div(s, t, reduction="none", log_target=True).sum(dim=2).mean(dim=1)
    return sum_and_count(CHANNEL_TAU**2 * divergence, weight)


def map_loss(
    student: Map,
    teacher: SameChannels,
    scale: Float[Tensor, " c"],
    weight: Float[Tensor, " b"],
    all_rows: AllRows = own_rows,
    weights: tuple[float, float, float, float] = (1.0, 0.5, 0.5, 0.5),
) -> SumAndCount:
    """`features.descriptor_loss` on maps instead of descriptors, and `channel_kl`: moments, directions, NST, channels.

    Moments and directions take the maps of all ranks. `scale`: running deviation of the teacher's map over clips, per channel.
    """
    small = _common(student, teacher, weight)
    s, t = gathered(small, weight, all_rows)
    if not len(s):
        return skipped(s)
    one = floored(scale)[:, None, None, None]
    means, deviations = moments((s / one).flatten(1), (t / one).flatten(1))
    value = weights[0] * (means + deviations) + weights[1] * direction_mmd(s.flatten(1), t.flatten(1))
    total, count = whole_batch(value, weight)
    return total + weights[2] * nst(*small, weight)[0] + weights[3] * channel_kl(*small, weight)[0], count


def _common(
    student: Map, teacher: Other, weight: Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b c t3 h3 w3"], Float[Tensor, "b c2 t3 h3 w3"]]:
    """Both maps at the smaller length, height and width."""
    length, height, width = (min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    s, t = (F.adaptive_avg_pool3d(precise(kept(x, weight)), (length, height, width)) for x in (student, teacher.detach()))
    return s, t
