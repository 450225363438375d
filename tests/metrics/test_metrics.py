"""Metrics against sklearn, torchmetrics and closed forms."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchmetrics import CosineSimilarity, KLDivergence
from torchmetrics.functional import accuracy

from vkd.layers import EncoderBlock
from vkd.metrics.cost import flops, latency_s, num_parameters
from vkd.metrics.fidelity import mean_cosine, mean_kl, top1_agreement
from vkd.metrics.probes import VOTE_TEMPERATURE, fit_linear, knn_accuracy, linear_probe

RNG = np.random.default_rng(0)


def pair(n: int = 40, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    a, b = RNG.normal(size=(2, n, d)).astype(np.float32)
    return a, b


def blobs(n: int, seed: int, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Three classes, labelled 3, 7 and 9, around fixed centres in 8 dimensions."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = np.eye(3, 8)[y] * 2 + rng.normal(scale=noise, size=(n, 8))
    return x.astype(np.float32), np.array([3, 7, 9])[y]


def test_fidelity_equals_torchmetrics() -> None:
    a, b = pair()
    student, teacher = torch.from_numpy(a), torch.from_numpy(b)
    agreement = accuracy(student, teacher.argmax(1), task="multiclass", num_classes=6, average="micro")
    assert top1_agreement(a, b) == pytest.approx(float(agreement))
    assert mean_cosine(a, b) == pytest.approx(float(CosineSimilarity(reduction="mean")(student, teacher)), rel=1e-5)
    assert mean_kl(a, b) == pytest.approx(float(KLDivergence()(teacher.softmax(1), student.softmax(1))), rel=1e-5)


def test_fidelity_of_equal_and_opposite_rows() -> None:
    a, _ = pair()
    assert (top1_agreement(a, a), mean_cosine(a, a), mean_kl(a, a)) == pytest.approx((1.0, 1.0, 0.0))
    assert mean_cosine(a, -a) == pytest.approx(-1.0)
    assert mean_kl(np.zeros((1, 2)), np.array([[math.log(3), 0.0]])) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_fidelity_takes_tensors_with_gradients() -> None:
    a, b = pair()
    student = torch.from_numpy(a).requires_grad_()
    assert mean_kl(student, torch.from_numpy(b)) == mean_kl(a, b)


@pytest.mark.parametrize("metric", [top1_agreement, mean_cosine, mean_kl])
def test_fidelity_of_nothing_is_refused(metric: object) -> None:
    with pytest.raises(ValueError, match="no rows"):
        metric(np.zeros((0, 3)), np.zeros((0, 3)))  # type: ignore[operator]


@given(st.integers(1, 60), st.integers(1, 50), st.integers(1, 30), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_knn_equals_sklearn(num_train: int, num_test: int, k: int, seed: int) -> None:
    train_x, train_y = blobs(num_train, seed)
    test_x, test_y = blobs(num_test, seed + 1)
    oracle = KNeighborsClassifier(min(k, num_train), metric="cosine", weights=lambda distance: np.exp((1 - distance) / VOTE_TEMPERATURE))
    oracle.fit(train_x.astype(np.float64), train_y)
    assert knn_accuracy(train_x, train_y, test_x, test_y, k) == pytest.approx(oracle.score(test_x.astype(np.float64), test_y))


def test_knn_in_blocks_equals_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (*blobs(50, 1), *blobs(33, 2))
    whole = knn_accuracy(*data)
    monkeypatch.setattr("vkd.metrics.probes.BLOCK_ROWS", 7)
    assert knn_accuracy(*data) == whole


def test_knn_ignores_length_and_misses_unseen_classes() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([4, 5])
    assert knn_accuracy(x, y, 100 * x, y, k=1) == 1.0
    assert knn_accuracy(x, y, x, np.array([4, 6]), k=1) == 0.5


def test_linear_probe_separates_blobs_and_repeats_itself() -> None:
    data = (*blobs(200, 1, noise=0.3), *blobs(100, 2, noise=0.3))
    first = linear_probe(*data)
    assert first == linear_probe(*data)
    assert first.accuracy > 0.97
    assert (first.num_train, first.num_test) == (200, 100)


def test_linear_probe_of_many_features_at_uneven_scales_converges() -> None:
    x, y = blobs(150, 3)
    wide = np.concatenate([x, RNG.normal(size=(150, 512)).astype(np.float32)], axis=1) * np.logspace(-3, 3, 520, dtype=np.float32)
    assert linear_probe(wide, y, wide, y).accuracy == 1.0


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_fitted_classifier_gives_sklearns_probabilities(num_classes: int) -> None:
    x, y = blobs(120, 4)
    x, y = x[y != 9] if num_classes == 2 else x, y[y != 9] if num_classes == 2 else y
    number = np.unique(y, return_inverse=True)[1]
    fitted = fit_linear(x.astype(np.float64), number)
    standardised = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)) / x.std(axis=0, dtype=np.float64)
    expected = LogisticRegression(max_iter=2000).fit(standardised, number).predict_proba(standardised)
    logits = (x - fitted.mean) / fitted.scale @ fitted.weight.T + fitted.bias
    assert logits.shape == (len(x), num_classes)
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(1).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_probe])
def test_probes_of_nothing_are_refused(probe: object) -> None:
    x, y = blobs(5, 0)
    with pytest.raises(ValueError, match="there are 0 and 5"):
        probe(x[:0], y[:0], x, y)  # type: ignore[operator]


def test_num_parameters_counts_shared_ones_once() -> None:
    layer = nn.Linear(3, 4)
    assert num_parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 16


def test_flops_of_products_convolutions_and_attention() -> None:
    assert flops(nn.Linear(3, 4), torch.zeros(5, 3)) == 2 * 5 * 3 * 4
    assert flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 6, 6)) == 2 * 2 * 36 * 8 * 27
    n, d = 10, 16
    assert flops(EncoderBlock(d, 4), torch.zeros(1, n, d)) == 2 * n * 12 * d * d + 2 * 2 * n * n * d


def test_latency_measures_a_sleep() -> None:
    calls = []
    latency = latency_s(lambda: (calls.append(1), time.sleep(0.01)), repeats=5)
    assert 0.01 <= latency.median_s < 0.05
    assert latency.spread_s >= 0
    assert len(calls) == 6
