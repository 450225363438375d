"""Losses on relations: golden values, slow loops, what a module that learns beside them gives."""

from __future__ import annotations

import math
import statistics as stats

import numpy as np
import pytest
import torch
from torch import Tensor

from vkd.losses import adapters, relation
from vkd.losses.batchwise import MIN_ROWS

S = torch.tensor([[1, 0, 2], [0, 1, 1], [2, 1, 0]], dtype=torch.float64)
T = torch.tensor([[1, 1, 0, 0], [0, 2, 1, 0], [1, 0, 0, 3]], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ones(b: int) -> Tensor:
    return torch.ones(b, dtype=torch.float64)


def loop_cka(x: Tensor, y: Tensor) -> float:
    """By features, where the code goes by rows."""
    a, b = (z.numpy() - z.numpy().mean(axis=0) for z in (x, y))
    between, within = np.linalg.norm(b.T @ a), [np.linalg.norm(z.T @ z) for z in (a, b)]
    return float(between**2 / (within[0] * within[1]))


def normalised(x: Tensor) -> list[list[float]]:
    return [[v / math.hypot(*row) for v in row] for row in x.tolist()]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def test_golden_cka() -> None:
    assert relation.linear_cka(S, T).item() == pytest.approx(0.90289672, abs=1e-6)
    assert relation.linear_cka(S, S).item() == pytest.approx(1, abs=1e-9)
    assert relation.linear_cka(S, 3 * S + torch.arange(3)).item() == pytest.approx(1, abs=1e-9)


def test_golden_sp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relation, "MIN_ROWS", 3)
    total, count = relation.sp(S, T, ones(3))
    assert (total / count).item() == pytest.approx(0.05785188, abs=1e-6)


def test_golden_correspondence() -> None:
    cka = torch.tensor([[0.9, 0.3, 0.1], [0.4, 0.8, 0.5], [0.1, 0.4, 0.95]], dtype=torch.float64)
    found = relation.correspondence(cka)
    assert found[1].tolist() == pytest.approx([0.01714783, 0.93623955, 0.04661262], abs=1e-6)
    torch.testing.assert_close(found.sum(dim=1), ones(3))


def test_cka_of_constant_rows_is_0_and_flat() -> None:
    """Also where the mean of equal numbers is not that number: what is left is rounding."""
    for dtype in (torch.float32, torch.float64):
        x = torch.full((9, 5), 3.3, dtype=dtype, requires_grad=True)
        value = relation.linear_cka(x, random(9, 4).to(dtype))
        value.backward()
        assert value.item() == 0 and x.grad is not None and not x.grad.any()


def test_correlation_equals_a_loop() -> None:
    students, teachers = [random(9, d, seed=d) for d in (3, 5, 4)], [random(9, d, seed=9 + d) for d in (6, 2, 7)]
    found = relation.correlation(students, teachers, ones(9))
    for k, (total, count) in enumerate(found):
        squares = [(loop_cka(students[k], students[j]) - loop_cka(teachers[k], teachers[j])) ** 2 for j in range(k + 1)]
        assert ((total / count).item(), count.item()) == (pytest.approx(stats.fmean(squares), abs=1e-12), 9)
    assert found[2][0] > 0


def test_stage_cka_equals_a_loop() -> None:
    students, teachers = [random(9, d, seed=d) for d in (3, 5)], [random(9, d, seed=9 + d) for d in (6, 2, 7)]
    found = relation.stage_cka(students, teachers, ones(9))
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([[loop_cka(s, t) for t in teachers] for s in students], dtype=torch.float64))
    assert relation.stage_cka(students, teachers, (torch.arange(9) < MIN_ROWS - 1).double()) is None


def test_pair_equals_numpy() -> None:
    students, teachers = (random(9, 3), random(9, 4, seed=1)), (random(9, 3, seed=2), random(9, 4, seed=3))
    expected = [np.corrcoef(a.numpy(), b.numpy(), rowvar=False)[:3, 3:] for a, b in (students, teachers)]
    np.testing.assert_allclose(relation.pair_statistics(*students).numpy(), expected[0], atol=1e-12)
    total, count = relation.pair(students, teachers, ones(9))
    assert (total / count).item() == pytest.approx(np.square(expected[0] - expected[1]).mean())


def test_a_constant_column_correlates_with_nothing() -> None:
    x = random(9, 3)
    x[:, 1] = 3.3
    x.requires_grad_()
    found = relation.pair_statistics(x, random(9, 2, seed=1))
    found.sum().backward()
    assert not found[1].any() and found[0].all() and x.grad is not None and x.grad.isfinite().all()


def test_directions_are_fixed_and_of_length_about_1() -> None:
    found = relation.directions(1000)
    assert found.shape == (1000, 64) and found.equal(relation.directions(1000)) and not found.equal(relation.directions(1000, seed=1))
    torch.testing.assert_close(found.norm(dim=0), torch.ones(64), rtol=0.15, atol=0)


def test_rkd_equals_loops() -> None:
    student, teacher = random(5, 3), random(5, 4, seed=1)
    relative, angles = [], []
    for x in (student, teacher):
        points = x.tolist()
        apart = [[math.dist(a, b) for b in points] for a in points]
        mean = stats.fmean(apart[i][j] for i in range(5) for j in range(5) if i != j)
        relative.append([d / mean for row in apart for d in row])
        seen = [[[(p - q) / math.dist(a, b) if a != b else 0.0 for p, q in zip(a, b, strict=True)] for b in points] for a in points]
        angles.append([dot(u, v) for row in seen for u in row for v in row])
    for loss, parts in ((relation.rkd_distance, relative), (relation.rkd_angle, angles)):
        total, count = loss(student, teacher, ones(5))
        assert (total / count).item() == pytest.approx(stats.fmean(huber(a, b) for a, b in zip(*parts, strict=True)))


def test_pkt_equals_a_loop() -> None:
    student, teacher = random(5, 3), random(5, 4, seed=1)
    probabilities = []
    for x in (student, teacher):
        rows = normalised(x)
        likeness = [[(dot(a, b) + 1) / 2 for b in rows] for a in rows]
        probabilities.append([v / sum(row) for row in likeness for v in row])
    expected = stats.fmean(p * math.log((p + 1e-7) / (q + 1e-7)) for q, p in zip(*probabilities, strict=True))
    total, count = relation.pkt(student, teacher, ones(5))
    assert (total / count).item() == pytest.approx(expected)


def test_correlation_congruence_equals_a_loop() -> None:
    student, teacher = random(5, 3), random(5, 4, seed=1)
    kernels = []
    for x in (student, teacher):
        products = [0.8 * dot(a, b) for a in normalised(x) for b in normalised(x)]
        kernels.append([math.exp(-0.8) * (1 + v + v**2 / 2) for v in products])
    total, count = relation.correlation_congruence(student, teacher, ones(5))
    assert (total / count).item() == pytest.approx(stats.fmean((a - b) ** 2 for a, b in zip(*kernels, strict=True)))


def test_similarity_profiles_equal_a_loop() -> None:
    rows, weight = random(7, 3), torch.tensor([1.0, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    present = normalised(rows[weight > 0])
    expected = []
    for row in present:
        cosines = sorted((dot(row, other) for other in present), reverse=True)
        expected.append([stats.fmean(cosines[i : i + 2]) for i in (0, 2, 4)])
    found = relation.similarity_profiles(rows, weight, 3)
    assert found[weight > 0].flatten().tolist() == pytest.approx([v for row in expected for v in row])
    assert not found[2].any()
    assert relation.similarity_profiles(rows, weight, 16).shape == (7, 16)  # more bins than rows
    assert not relation.similarity_profiles(rows, 0 * weight, 3).any()
    assert relation.similarity_profiles(rows[:0], weight[:0], 3).shape == (0, 3)


def test_attended_losses_equal_a_loop() -> None:
    losses, attention, weight = random(3, 2, 4).abs(), random(3, 2, 4, seed=1).softmax(dim=2), torch.tensor([1.0, 0, 0.5]).double()
    expected = sum(float(weight[b]) * float(losses[b, i] @ attention[b, i]) / 2 for b in range(3) for i in range(2))
    losses[1], attention[1] = math.nan, math.nan
    total, count = relation.attended(losses, attention, weight)
    assert (total.item(), count.item()) == (pytest.approx(expected), 1.5)


def test_stage_attention_learns_which_stage_is_easy() -> None:
    torch.manual_seed(0)
    module = adapters.StageAttention(num_students=2, num_teachers=3, num_bins=4)
    profiles = torch.rand(5, 2, 4), torch.rand(5, 3, 4)
    attention = module(*profiles)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(5, 2))
    losses = torch.ones(5, 2, 3)
    losses[:, :, 1] = 0
    for _ in range(20):
        total, _ = relation.attended(losses, module(*profiles), torch.ones(5))
        gradients = torch.autograd.grad(total, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    assert (module(*profiles)[:, :, 1] > attention[:, :, 1]).all()


def test_gaussian_regressor_starts_at_its_variance() -> None:
    mean, variance = adapters.GaussianRegressor(3, 5)(torch.randn(2, 3, 2, 4, 4))
    assert mean.shape == (2, 5, 2, 4, 4)
    torch.testing.assert_close(variance, torch.full((5,), 5.0))


def test_descriptor_adapter_maps_deviations_by_themselves() -> None:
    adapter = adapters.DescriptorAdapter(3, 5).double()
    descriptor = random(2, 6, 3)
    found = adapter(descriptor)
    for row in range(6):
        layer = adapter.of_deviations if row == 1 else adapter.of_means
        torch.testing.assert_close(found[:, row], layer(descriptor[:, row]))
