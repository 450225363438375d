"""Losses between feature distributions: golden values and slow loops."""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd.losses import features, maps
from vkd.losses.distillation import SumAndCount, unit

MapLoss = Callable[[Tensor, Tensor, Tensor], SumAndCount]
S = torch.tensor([[0, 1, 2, 3], [1, 1, 0, 2], [2, 0, 1, 1]], dtype=torch.float64)
T = torch.tensor([[1, 1, 1, 3], [0, 2, 0, 2], [2, 0, 2, 4]], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ones(b: int) -> Tensor:
    return torch.ones(b, dtype=torch.float64)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def normalised(vectors: list[list[float]]) -> list[list[float]]:
    return [[v / math.hypot(*vector) for v in vector] for vector in vectors]


def loop_mmd(a: list[list[float]], b: list[list[float]], sigmas: list[float]) -> float:
    def k(x: list[float], y: list[float]) -> float:
        return sum(math.exp(-(math.dist(x, y) ** 2) / (2 * s**2)) for s in sigmas) / len(sigmas)

    def mean(p: list[list[float]], q: list[list[float]]) -> float:
        return stats.fmean(k(x, y) for x in p for y in q)

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def loop_nst(s: Tensor, t: Tensor) -> float:
    """For one row: [channels, positions]."""
    a, b = normalised(s.tolist()), normalised(t.tolist())

    def mean(p: list[list[float]], q: list[list[float]]) -> float:
        return stats.fmean(dot(x, y) ** 2 for x in p for y in q)

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def test_golden_moments() -> None:
    means, deviations = features.moments(S, T)
    assert (means.item(), deviations.item()) == (pytest.approx(0.27777778, abs=1e-6), pytest.approx(0.02977136, abs=1e-6))


def test_golden_rbf_mmd() -> None:
    assert features.rbf_mmd(S, T, (1.0, 2.0, 4.0)).item() == pytest.approx(0.26703169, abs=1e-6)
    assert loop_mmd(S.tolist(), T.tolist(), [1, 2, 4]) == pytest.approx(0.26703169, abs=1e-6)


def test_golden_nst() -> None:
    s, t = torch.tensor([[[1, 2, 2], [0, 3, 4]]]).double(), torch.tensor([[[2, 1, 2], [1, 0, 0], [0, 0, 5]]]).double()
    assert features.nst_profiles(s, t).tolist() == pytest.approx([0.62526749], abs=1e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_nst_equals_a_loop(cs: int, ct: int, p: int, seed: int) -> None:
    """By either product: there may be more channels than positions, or fewer."""
    s, t = random(2, cs, p, seed=seed), random(2, ct, p, seed=seed + 1)
    expected = [loop_nst(a, b) for a, b in zip(s, t, strict=True)]
    assert features.nst_profiles(s, t).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_directions_equal_a_loop(n: int) -> None:
    s, t = random(n, 3), random(n, 3, seed=1)
    a, b = normalised(s.tolist()), normalised(t.tolist())
    median = stats.median_low(math.dist(b[i], b[j]) for i in range(n) for j in range(i))
    expected = loop_mmd(a, b, [0.5 * median, median, 2 * median])
    assert features.direction_mmd(s, t).item() == pytest.approx(expected, abs=1e-9)


def test_descriptor_loss_equals_its_parts() -> None:
    s, t, scale = random(7, 6, 3), random(7, 6, 3, seed=1), random(2, 3, seed=2).abs() + 0.5
    moment = 0.0
    for kind in range(2):
        for c in range(3):
            a, b = ((x[:, kind, c] / scale[kind, c]).tolist() for x in (s, t))
            deviations = [math.sqrt(stats.pvariance(x) + 1e-5) for x in (a, b)]
            moment += ((stats.fmean(a) - stats.fmean(b)) ** 2 + (deviations[0] - deviations[1]) ** 2) / 6
    profile = stats.fmean(loop_nst(a[2:].T, b[2:].T) for a, b in zip(s, t, strict=True))
    direction = features.direction_mmd(s[:, 0], t[:, 0]).item()
    total, count = features.descriptor_loss(s, t, scale, ones(7), weights=(2.0, 3.0, 5.0))
    assert (total / count).item() == pytest.approx(2 * moment + 3 * direction + 5 * profile)
    assert count.item() == 7


def test_profiles_are_weighted_by_row() -> None:
    s, t = random(4, 6, 3), random(4, 6, 3, seed=1)
    weight = torch.tensor([1.0, 0.25, 0, 2], dtype=torch.float64)
    total, count = features.descriptor_loss(s, t, torch.ones(2, 3), weight, weights=(0.0, 0.0, 1.0))
    rows = features.nst_profiles(s[:, 2:].transpose(1, 2), t[:, 2:].transpose(1, 2))
    torch.testing.assert_close((total, count), ((rows * weight).sum(), weight.sum()))


def test_a_channel_that_is_constant_in_the_teacher_is_raised_to_a_share_of_the_mean() -> None:
    scale = torch.tensor([[0.0, 4.0, 2.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(features.floored(scale), torch.tensor([[0.2, 4.0, 2.0], [1e-6, 1e-6, 1e-6]]))


def test_statistics_are_mean_and_deviation() -> None:
    descriptor = random(2, 6, 3)
    assert features.statistics(descriptor).equal(torch.cat([descriptor[:, 0], descriptor[:, 1]], dim=1))


MAPS = random(2, 3, 4, 2, 6), random(2, 3, 2, 4, 3, seed=1)  # of a student and of a teacher; the smaller size is 2, 2, 3


def averaged(x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    return x.reshape(b, c, 2, t // 2, 2, h // 2, 3, w // 3).mean(dim=(3, 5, 7))


def test_map_losses_equal_loops() -> None:
    student, teacher = MAPS
    s, t = (averaged(x).flatten(2) for x in MAPS)
    variance = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    expected: dict[str, float] = dict.fromkeys(("mse", "at", "nst", "vid", "kl"), 0.0)
    for i in range(2):
        pairs = [(float(s[i, c, p]), float(t[i, c, p]), float(variance[c])) for c in range(3) for p in range(12)]
        expected["mse"] += stats.fmean((a - b) ** 2 for a, b, _ in pairs)
        expected["vid"] += stats.fmean(((a - b) ** 2 / v + math.log(v)) / 2 for a, b, v in pairs)
        where = normalised([[stats.fmean(v**2 for v in x[i, :, p].tolist()) for p in range(12)] for x in (s, t)])
        expected["at"] += stats.fmean((a - b) ** 2 for a, b in zip(*where, strict=True))
        expected["nst"] += loop_nst(s[i], t[i])
        for c in range(3):
            q, p = ([math.exp(v / 4) for v in x[i, c].tolist()] for x in (s, t))
            terms = [b / sum(p) * math.log(b / sum(p) * sum(q) / a) for a, b in zip(q, p, strict=True)]
            expected["kl"] += 16 * sum(terms) / 3
    found = {
        "mse": maps.mse(student, teacher, ones(2)),
        "at": maps.attention_transfer(student, teacher, ones(2)),
        "nst": maps.nst(student, teacher, ones(2)),
        "vid": maps.vid(student, variance, teacher, ones(2)),
        "kl": maps.channel_kl(student, teacher, ones(2)),
    }
    assert {name: total.item() for name, (total, _) in found.items()} == pytest.approx(expected, abs=1e-9)
    assert all(count.item() == 2 for _, count in found.values())


def test_map_loss_equals_its_parts() -> None:
    s, t = (averaged(x) for x in MAPS)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    per_position = scale[:, None, None, None].expand(3, 2, 2, 3).flatten()
    moment = sum(features.moments(s.flatten(1) / per_position, t.flatten(1) / per_position))
    parts = [
        moment,
        features.direction_mmd(s.flatten(1), t.flatten(1)),
        maps.nst(s, t, ones(2))[0] / 2,
        maps.channel_kl(s, t, ones(2))[0] / 2,
    ]
    total, count = maps.map_loss(*MAPS, scale, ones(2), weights=(2.0, 3.0, 5.0, 7.0))
    torch.testing.assert_close(total / count, sum(w * part for w, part in zip((2, 3, 5, 7), parts, strict=True)))


def test_attention_and_nst_do_not_need_equal_channels() -> None:
    student, teacher = MAPS
    for loss in (maps.attention_transfer, maps.nst):
        assert loss(student[:, :1], teacher, ones(2))[0].isfinite()


@pytest.mark.parametrize("loss", [maps.mse, maps.attention_transfer, maps.nst, maps.channel_kl])
@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_flat_and_equal_maps_have_finite_gradients(loss: MapLoss, fill: float) -> None:
    flat = torch.full((2, 3, 2, 2, 3), fill, dtype=torch.float64, requires_grad=True)
    total, _ = loss(flat, flat.detach(), ones(2))
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12) and flat.grad is not None
    torch.testing.assert_close(flat.grad, torch.zeros_like(flat))


@pytest.mark.parametrize("loss", [maps.mse, maps.attention_transfer, maps.nst, maps.channel_kl])
def test_map_rows_of_weight_0_count_nothing(loss: MapLoss) -> None:
    student, teacher = (x.clone() for x in MAPS)
    student[1], teacher[1] = math.nan, math.inf
    student.requires_grad_()
    found = loss(student, teacher, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found, loss(MAPS[0][:1], MAPS[1][:1], ones(1)))
    found[0].backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[1].any()


def test_unit_vectors() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]], dtype=torch.float64, requires_grad=True)
    found = unit(x)
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([[0.6, 0.8], [0, 0], [0, 0]], dtype=torch.float64))
    assert x.grad is not None and x.grad.isfinite().all() and not x.grad[1:].any()
    assert unit(torch.tensor([math.nan, 1.0])).isnan().all()
