"""PCA whitening against numpy and scikit-learn, and its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from vkd.errors import ConfigError
from vkd.whitening import EPSILON, Covariance, Whiten, Whitening


def vectors(num_rows: int = 200, seed: int = 0) -> np.ndarray:
    """Float32 rows of 12 values of very different variance, far from the origin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_rows, 12)) * np.geomspace(1, 0.01, 12) @ rng.normal(size=(12, 12)) + 3).astype(np.float32)


def fitted(x: np.ndarray, dims: int, block: int = 37) -> Whitening:
    covariance = Covariance(x.shape[1])
    for start in range(0, len(x), block):
        covariance.add(x[start : start + block])
    return covariance.whitening(dims)


def whitened(x: np.ndarray, whitening: Whitening) -> np.ndarray:
    return Whiten(whitening)(torch.tensor(x)).numpy()


def test_it_is_the_pca_of_scikit_learn() -> None:
    x = vectors()
    pca, found = PCA(5, whiten=True, svd_solver="full").fit(x.astype(np.float64)), fitted(x, 5)
    np.testing.assert_allclose(found.mean, pca.mean_, rtol=1e-5)
    np.testing.assert_allclose(found.eigenvalues, pca.explained_variance_ * (len(x) - 1) / len(x), rtol=1e-4)
    expected = pca.transform(x.astype(np.float64))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    signs = np.sign((found.vectors.T * pca.components_).sum(axis=1))
    np.testing.assert_allclose(whitened(x, found) * signs, expected, atol=1e-3)


@settings(max_examples=15)
@given(st.permutations(range(6)), st.integers(1, 60))
def test_neither_order_nor_size_of_blocks_matters(order: list[int], block: int) -> None:
    x = vectors(120)
    parts = np.array_split(x, 6)
    found, other = fitted(np.concatenate([parts[i] for i in order]), 4, block), fitted(x, 4, 1000)
    covariance = np.cov(x.T.astype(np.float64), ddof=0)
    np.testing.assert_allclose(other.eigenvalues, np.linalg.eigvalsh(covariance)[::-1][:4], rtol=1e-5)
    for name in ("mean", "eigenvalues", "vectors"):
        np.testing.assert_allclose(getattr(found, name), getattr(other, name), rtol=1e-5, atol=1e-5)
    assert found.num_vectors == other.num_vectors == 120


def test_vectors_get_variance_one_in_every_direction_before_they_get_length_one() -> None:
    x, found = vectors(400), fitted(vectors(400), 12)
    y = (x.astype(np.float64) - found.mean) @ found.vectors / np.sqrt(found.eigenvalues + EPSILON)
    np.testing.assert_allclose(np.cov(y.T, ddof=0), np.eye(12), atol=0.02)
    np.testing.assert_allclose(whitened(x, found), y / np.linalg.norm(y, axis=1, keepdims=True), atol=1e-3)
    assert (np.diff(found.eigenvalues) <= 0).all()


def test_its_input_stays_as_it_is() -> None:
    x = torch.tensor(vectors(7)).reshape(7, 1, 12).expand(7, 3, 12).contiguous()
    before, whiten = x.clone(), Whiten(fitted(vectors(), 3))
    y = whiten(x)
    assert torch.equal(x, before) and y.shape == (7, 3, 3) and not list(whiten.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whiten(x), y)
    block = vectors(9)
    covariance = Covariance(12)
    covariance.add(block)
    np.testing.assert_array_equal(block, vectors(9))


@pytest.mark.parametrize(("num_rows", "dims", "rank"), [(5, 5, 4), (200, 13, 12), (0, 1, 0), (200, 0, 12)])
def test_more_dims_than_the_vectors_span_are_refused(num_rows: int, dims: int, rank: int) -> None:
    with pytest.raises(ConfigError, match=f"{num_rows} vectors of 12 values span {rank} dims; {dims} are asked"):
        fitted(vectors(num_rows), dims)


def test_a_file_gives_back_what_was_fitted() -> None:
    found = fitted(vectors(), 5)._replace(network="resnet50 (weights 01)")
    again = Whitening.from_bytes(found.to_bytes())
    assert (again.num_vectors, again.network) == (200, "resnet50 (weights 01)") and again.to_bytes() == found.to_bytes()
    for name in ("mean", "eigenvalues", "vectors"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    np.testing.assert_array_equal(whitened(vectors(), again.first(2)), whitened(vectors(), fitted(vectors(), 2)))
    with pytest.raises(ConfigError, match="of 5 dims cannot give 6"):
        again.first(6)


def test_the_file_of_the_reference_is_read(tmp_path: Path) -> None:
    found, path = fitted(vectors(), 12), tmp_path / "pca.pth"
    backwards = {"d": found.eigenvalues[::-1].copy(), "V": found.vectors[:, ::-1].copy(), "mean": found.mean}
    torch.save({name: torch.tensor(value) for name, value in backwards.items()}, path)
    again = Whitening.from_bytes(path.read_bytes())
    assert again.num_vectors == 0
    np.testing.assert_array_equal(whitened(vectors(), again.first(5)), whitened(vectors(), found.first(5)))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "EOFError"),
        (lambda data: data[:-9], "SafetensorError"),
        (lambda data: data[:8] + b"?" + data[9:], "."),
        (lambda data: safetensors.numpy.save({"weight": np.zeros(3, np.float32)}), "it holds weight"),
        (lambda data: safetensors.numpy.save(safetensors.numpy.load(data)), "it is no whitening"),
        (lambda data: data.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 2'), "version 2, not 1"),
        (lambda data: Whitening.from_bytes(data)._replace(mean=np.zeros(3, np.float32)).to_bytes(), "shapes do not fit"),
        (lambda data: Whitening.from_bytes(data)._replace(mean=np.full(12, np.nan, np.float32)).to_bytes(), "must be finite"),
        (lambda data: Whitening.from_bytes(data)._replace(eigenvalues=-np.ones(5, np.float32)).to_bytes(), "no eigenvalue negative"),
    ],
)
def test_another_file_is_refused(damage: Callable[[bytes], bytes], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Whitening.from_bytes(damage(fitted(vectors(), 5).to_bytes()))
