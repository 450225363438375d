"""PCA whitening: a mean and the directions of most variance, each scaled to variance 1; fitted block by block, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vkd import weights
from vkd.errors import ConfigError

ABOUT = "vkd.whitening"  # the one key of the metadata: the order of several is not kept, and a file must have one digest
FORMAT_VERSION = 1
EPSILON = 1e-7  # added to eigenvalues: Kordopatis-Zilos et al. 2022


class Whitening(NamedTuple):
    """The first eigenpairs of a covariance of `num_vectors` vectors (0: nobody told), by eigenvalue descending; float32.

    `network` names what gave the vectors (empty: nobody told): features of another one, or of other weights, are not whitened by it.
    """

    mean: Float[np.ndarray, " c"]
    eigenvalues: Float[np.ndarray, " d"]
    vectors: Float[np.ndarray, "c d"]
    num_vectors: int
    network: str = ""

    def first(self, dims: int) -> Whitening:
        """The same of so many dims. Raises ConfigError when it has fewer."""
        if not 1 <= dims <= len(self.eigenvalues):
            action = f"choose 1 to {len(self.eigenvalues)}, or fit another"
            raise ConfigError(f"a whitening of {len(self.eigenvalues)} dims cannot give {dims}", where="dims", action=action)
        return self._replace(eigenvalues=self.eigenvalues[:dims], vectors=self.vectors[:, :dims])

    def to_bytes(self) -> bytes:
        """A safetensors file; equal whitenings give equal bytes."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in ("mean", "eigenvalues", "vectors")}
        about = {"format_version": FORMAT_VERSION, "num_vectors": self.num_vectors, "network": self.network}
        data: bytes = safetensors.numpy.save(tensors, {ABOUT: json.dumps(about)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Whitening:
        """What `to_bytes` gave, or the reference's PCA file. Raises ValueError when the bytes hold no whitening."""
        found = weights.tensors(data)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError("it holds no tensors by name")
        arrays = {name: value.float().numpy() for name, value in found.items()}
        if {"mean", "d", "V"} <= set(arrays):
            return _sorted(arrays["mean"], arrays["d"], arrays["V"])
        if set(arrays) != {"mean", "eigenvalues", "vectors"}:
            raise ValueError(f"it holds {', '.join(sorted(map(str, arrays))[:3])}")
        num_vectors, network = _about(data)
        return _sorted(arrays["mean"], arrays["eigenvalues"], arrays["vectors"])._replace(num_vectors=num_vectors, network=network)


def network_of(identity: Mapping[str, Any]) -> str:
    """The name of the network whose features a teacher gives, by what it says of itself; empty when it does not say."""
    try:
        return f"{identity['backbone']} (weights {identity['weights_sha256'][:16]})"
    except KeyError:
        return ""


class Whiten(nn.Module):
    """y = L2((x - mean) V / sqrt(eigenvalue + 1e-7)) in single precision, whatever autocast says."""

    def __init__(self, whitening: Whitening) -> None:
        super().__init__()
        scale = 1 / np.sqrt(whitening.eigenvalues.astype(np.float64) + EPSILON)
        self.register_buffer("mean", torch.tensor(whitening.mean))
        self.register_buffer("matrix", torch.tensor((whitening.vectors * scale).astype(np.float32)))
        self.eval()

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n d"]:
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize((x - self.get_buffer("mean")) @ self.get_buffer("matrix"), dim=-1)


class Covariance:
    """Mean and covariance of vectors that come block by block, in double precision (Chan, Golub and LeVeque 1979)."""

    def __init__(self, num_channels: int) -> None:
        self.count, self.mean = 0, np.zeros(num_channels)
        self.scatter = np.zeros((num_channels, num_channels))

    def add(self, block: Float[np.ndarray, "n c"]) -> None:
        if not len(block):
            return
        total = self.count + len(block)
        mean = block.mean(axis=0, dtype=np.float64)
        centred, shift = block - mean, mean - self.mean
        self.scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(block) / total)
        self.mean += shift * (len(block) / total)
        self.count = total

    def whitening(self, dims: int) -> Whitening:
        """Of the `dims` directions of most variance. Raises ConfigError when the vectors do not span so many."""
        eigenvalues, vectors = np.linalg.eigh(self.scatter / max(self.count, 1))
        eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
        rank = int((eigenvalues > eigenvalues[0] * len(eigenvalues) * np.finfo(np.float64).eps).sum())
        if not 1 <= dims <= rank:
            what = f"{self.count} vectors of {len(self.mean)} values span {rank} dims; {dims} are asked"
            raise ConfigError(what, where="dims", action="ask for fewer, or label more videos")
        kept = vectors[:, :dims]
        largest = kept[np.abs(kept).argmax(axis=0), np.arange(dims)]
        kept = kept * np.sign(largest)  # the signs that eigh gives are a library's choice
        return Whitening(self.mean.astype(np.float32), eigenvalues[:dims].astype(np.float32), kept.astype(np.float32), self.count)


def _about(data: bytes) -> tuple[int, str]:
    """Number of vectors and network, of the metadata of a safetensors file."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][ABOUT])
        version, num_vectors, network = about["format_version"], int(about["num_vectors"]), str(about.get("network", ""))
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError("it is no whitening") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"its format is version {version}, not {FORMAT_VERSION}")
    return num_vectors, network


def _sorted(mean: np.ndarray, eigenvalues: np.ndarray, vectors: np.ndarray) -> Whitening:
    """Raises ValueError when these are no eigenpairs."""
    if mean.ndim != 1 or not eigenvalues.size or vectors.shape != (*mean.shape, *eigenvalues.shape):
        raise ValueError(f"its shapes do not fit: mean {mean.shape}, eigenvalues {eigenvalues.shape}, vectors {vectors.shape}")
    if not all(np.isfinite(array).all() for array in (mean, eigenvalues, vectors)) or (eigenvalues <= -EPSILON).any():
        raise ValueError("its values must be finite, and no eigenvalue negative")
    order = np.argsort(-eigenvalues, kind="stable")
    return Whitening(mean, eigenvalues[order], np.ascontiguousarray(vectors[:, order]), 0)
