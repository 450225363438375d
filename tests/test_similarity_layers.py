"""Blocks of similarity networks against closed forms, slow loops and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd.errors import ConfigError
from vkd.similarity_layers import (
    Attention,
    Binarization,
    Comparator,
    CosineAttention,
    NetVLAD,
    chamfer,
    frame_similarity,
    itq_rotation,
    load_renamed,
)

MATRIX = torch.tensor([[0.1, 0.9, 0.3], [0.4, 0.2, 0.8]])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(*, rows: int = 0, columns: int = 0) -> Tensor:
    """The matrix's mask without its last rows or columns."""
    return (torch.arange(2) < 2 - rows)[:, None] & (torch.arange(3) < 3 - columns)


def test_chamfer_golden_values() -> None:
    assert chamfer(MATRIX).item() == pytest.approx(0.85)
    assert chamfer(MATRIX, symmetric=True).item() == pytest.approx(0.775)
    assert chamfer(MATRIX, without(columns=1)).item() == pytest.approx(0.65)
    assert chamfer(MATRIX, without(rows=1)).item() == pytest.approx(0.9)
    assert chamfer(MATRIX, without(rows=2)).item() == 0


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_chamfer_with_a_mask_equals_that_of_what_is_left(n: int, m: int, seed: int) -> None:
    x, mask = rand(2, 6, 7, seed=seed), torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[:, :n, :m] = True
    for symmetric in (False, True):
        torch.testing.assert_close(chamfer(x, mask, symmetric=symmetric), chamfer(x[:, :n, :m], symmetric=symmetric))


def test_chamfer_has_a_direction() -> None:
    assert chamfer(MATRIX) != chamfer(MATRIX.T)
    assert chamfer(MATRIX, symmetric=True) == chamfer(MATRIX.T, symmetric=True)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_frame_similarity_equals_the_tensor_of_all_region_pairs(n: int, m: int, r: int, s: int, seed: int) -> None:
    query, target = rand(2, n, r, 5, seed=seed), rand(2, m, s, 5, seed=seed + 1)
    pairs = torch.einsum("biok,bjpk->bijop", query, target)
    torch.testing.assert_close(frame_similarity(query, target), pairs.amax(4).mean(3))
    torch.testing.assert_close(frame_similarity(query, target, symmetric=True), chamfer(pairs, symmetric=True))
    torch.testing.assert_close(frame_similarity(query[:1], target)[1], frame_similarity(query[:1], target[1:])[0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_of_frame_similarity(symmetric: bool) -> None:
    query, target = rand(1, 3, 2, 4).requires_grad_(), rand(2, 2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, t: frame_similarity(q, t, symmetric=symmetric), (query, target))
    only_query = frame_similarity(query, target.detach(), symmetric=symmetric).sum()
    (gradient,) = torch.autograd.grad(only_query, query)
    assert gradient.abs().sum() > 0


def test_frame_similarity_keeps_little_for_the_gradient() -> None:
    """Beside its inputs a byte for each of n * r * m; the pairs of regions would be 9 floats each."""
    query, target = rand(1, 20, 9, 4).requires_grad_(), rand(1, 30, 9, 4).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        frame_similarity(query, target)
    assert sum(x.nbytes for x in kept) == query.nbytes + target.nbytes + 20 * 9 * 30


@pytest.mark.parametrize(("length", "cells"), [(4, 1), (7, 1), (8, 2), (11, 2), (30, 7), (300, 75)])
def test_comparator_shapes(length: int, cells: int) -> None:
    comparator = Comparator((2, 2, 2))
    found, mask = comparator(torch.randn(1, length, 9))
    assert found.shape == (1, cells, 2)
    assert mask is None


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_comparator_equals_torch(padding: str) -> None:
    torch.manual_seed(0)
    comparator, x = Comparator((2, 3, 4), padding).double(), rand(2, 1, 9, 13)
    expected = x
    for conv in (comparator.conv1, comparator.conv2, comparator.conv3):
        wide = F.pad(expected, (1, 1, 1, 1), mode="constant" if padding == "zeros" else "replicate")
        expected = F.conv2d(wide, conv.weight, conv.bias).relu()
        if conv is not comparator.conv3:
            expected = F.max_pool2d(expected, 2)
    expected = (expected * comparator.fconv.weight).sum(1) + comparator.fconv.bias
    torch.testing.assert_close(comparator(x[:, 0])[0], expected)
    assert all((conv.bias == 0).all() for conv in (comparator.conv1, comparator.conv2, comparator.conv3, comparator.fconv))


def test_a_comparator_may_start_by_runs() -> None:
    comparator, x = Comparator((4, 8, 16)).double(), rand(2, 9, 14)
    comparator.start_by_runs(4.0)
    cells, _ = comparator(x)
    wide = F.pad(x, (1, 1, 1, 1))
    runs = (wide[:, :-2, :-2] + x + wide[:, 2:, 2:]) / 3  # the frames before, these, and after
    torch.testing.assert_close(cells, 4 * F.max_pool2d(runs, 4).relu())
    cells.sum().backward()
    grad = comparator.fconv.weight.grad
    assert grad is not None and (grad != 0).sum() > 8  # the other channels may join


def test_comparator_masks() -> None:
    """A cell stays valid when any of its frame pairs is; where none is, it holds the last bias; others see zeros there."""
    torch.manual_seed(0)
    comparator = Comparator((2, 3, 4)).double()
    comparator.fconv.bias.data.fill_(0.25)
    x, mask = rand(1, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, :5, :8] = True
    x = x.masked_fill(~mask, 0)
    cells, valid = comparator(x, mask)
    assert valid is not None
    assert valid[0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert (cells[~valid] == 0.25).all()
    torch.testing.assert_close(comparator(x[:, :8, :8], mask[:, :8, :8])[0][0], cells[0, :2, :2])
    torch.testing.assert_close(comparator(x[:, :, :8], torch.ones(1, 16, 8, dtype=torch.bool))[0], comparator(x[:, :, :8])[0])


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 9\] frames: at least 4"):
        Comparator((2, 2, 2))(torch.zeros(1, 3, 9))


def test_attention() -> None:
    torch.manual_seed(0)
    attention, x = Attention(6), torch.randn(2, 3, 6)
    hidden = (x @ attention.transform.weight.T + attention.transform.bias).tanh()
    expected = x / (1 + (-(hidden * attention.context_vector.weight).sum(-1, keepdim=True)).exp())
    torch.testing.assert_close(attention(x), expected)
    cosine, unit = CosineAttention(6), F.normalize(x, dim=-1)
    torch.testing.assert_close(cosine.weights(unit)[..., 0], unit @ cosine.context_vector.weight[0] / 2 + 0.5)
    assert ((cosine.weights(unit) >= 0) & (cosine.weights(unit) <= 1)).all()
    torch.testing.assert_close(cosine(unit), unit * cosine.weights(unit))


@pytest.mark.parametrize("kind", [Attention, CosineAttention])
def test_attention_can_start_even(kind: type[Attention | CosineAttention]) -> None:
    torch.manual_seed(0)
    attention, x = kind(128), F.normalize(torch.randn(500, 128), dim=-1)
    assert (drawn := attention.weights(x).std()) > 0.02
    attention.start_even()
    even = attention.weights(x)
    torch.testing.assert_close(even, torch.full_like(even, 0.5), atol=0.05, rtol=0)
    assert even.std() < drawn / 5


def test_binarization_expects_the_sign_under_noise() -> None:
    """In training a code is P(z + e > 0) - P(z + e < 0) for noise of deviation 0.001; its slope at 0 is sqrt(2 / pi) * 1000."""
    torch.manual_seed(0)
    layer = Binarization(5, 5).double()
    layer.W.data = torch.eye(5, dtype=torch.float64)
    z = torch.tensor([0.0, 0.0005, -0.001, 0.5], dtype=torch.float64)
    x = torch.cat([z, (1 - z.square().sum()).sqrt()[None]])[None]  # a unit vector whose first four values are z
    codes = layer(x.requires_grad_())
    expected = [math.erf(value / (math.sqrt(2) * 1e-3)) for value in z.tolist()] + [1.0]
    assert codes[0].tolist() == pytest.approx(expected, abs=1e-12)
    codes[0, 0].backward()
    assert x.grad is not None
    assert x.grad[0, 0].item() == pytest.approx(math.sqrt(2 / math.pi) * 1e3)
    assert layer.eval()(x)[0].tolist() == [0, 1, -1, 1, 1]


def test_binarization_stays_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = Binarization(8, 16), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.float()))
        assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer.W @ layer.W.T, torch.eye(8), rtol=0, atol=1e-5)


def test_itq_finds_a_hidden_rotation() -> None:
    """Of rotated codes nothing is lost once the rotation is undone; steps towards a wrong one would not get there."""
    corners = F.normalize(rand(400, 6).sign() + 0.1 * rand(400, 6, seed=1), dim=1)
    x = corners @ torch.linalg.qr(rand(6, 6, seed=2))[0]

    def loss(rotation: Tensor) -> float:
        z = x @ rotation
        return (F.normalize(z.sign(), dim=1) - z).square().sum(1).mean().item()

    found = itq_rotation(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found @ found.T, torch.eye(6, dtype=torch.float64))
    start = torch.linalg.qr(rand(6, 6, seed=0))[0]
    assert loss(found) < 0.5 * loss(start)


def test_netvlad_equals_a_loop_over_clusters() -> None:
    torch.manual_seed(0)
    netvlad, x = NetVLAD(5, 3, 4).double(), rand(2, 6, 5)
    netvlad.assign.weight.data += rand(3, 5, seed=1)  # free of the centroids, as after training
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    for row in range(2):
        frames = x[row, mask[row]]
        share = (frames @ netvlad.assign.weight.T).softmax(1)
        residuals = [sum(a[k] * (f - netvlad.centroids[k]) for a, f in zip(share, frames, strict=True)) for k in range(3)]
        flat = F.normalize(torch.cat([F.normalize(v, dim=0) for v in residuals]), dim=0)
        expected = netvlad.norm(netvlad.reduce(flat))
        torch.testing.assert_close(netvlad(x, mask)[row], expected)
        torch.testing.assert_close(netvlad(frames[None])[0], expected)


def test_weights_load_under_other_names() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    weights = {"old.weight": rand(3, 2), "old.bias": rand(3)}
    load_renamed(module, weights, {"old.": "0."})
    assert torch.equal(module[0].weight, weights["old.weight"])
    with pytest.raises(ConfigError, match="architecture"):
        load_renamed(module, weights, {})
    with pytest.raises(ConfigError):
        load_renamed(module, {}, {})
