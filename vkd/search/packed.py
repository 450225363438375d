"""Binary codes of regions as bits: 64 bytes per region of 512 bits, 576 per frame of 9 regions, compared without becoming floats."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK_FRAMES = 16  # of the query at once: distances of all regions to all would not stay in a core's cache


def pack(codes: Float[Tensor, "*n k"]) -> UInt8[np.ndarray, "*n w"]:
    """Eight codes of +1 and -1 to a byte, the first in its highest bit; a code of 0 becomes -1, so cut padding off first."""
    if codes.shape[-1] % 8:
        raise ValueError(f"{codes.shape[-1]} bits do not fill bytes: take a multiple of 8")
    return np.packbits((codes > 0).cpu().numpy(), axis=-1)


def unpack(bits: UInt8[np.ndarray, "*n w"]) -> Float[Tensor, "*n k"]:
    """Codes of +1 and -1."""
    return torch.from_numpy(np.unpackbits(bits, axis=-1)).float().mul_(2).sub_(1)


def frame_similarity(query: UInt8[np.ndarray, "n r w"], target: UInt8[np.ndarray, "m s w"]) -> Float[Tensor, "n m"]:
    """Mean over a query's regions of the best 1 - 2 * Hamming / bits: to the bit what `FineStudent.frames` gives for the codes.

    Bits that differ are counted a word at a time, in a fifth of the time of a matrix product of floats (bench/dns_search.py).
    """
    (n, r, w), (m, s, _) = query.shape, target.shape
    by_region = np.ascontiguousarray(target.transpose(1, 0, 2)).reshape(s * m, w)  # so that the minimum runs over whole rows
    differing = torch.empty(n, m, dtype=torch.int32)
    for start in range(0, n, BLOCK_FRAMES):
        rows = np.ascontiguousarray(query[start : start + BLOCK_FRAMES]).reshape(-1, w)
        least = _distances(rows, by_region).view(-1, r, s, m).amin(2)
        torch.sum(least, 1, dtype=torch.int32, out=differing[start : start + BLOCK_FRAMES])
    similarity: Tensor = (r * 8 * w - 2 * differing).float() / r / (8 * w)
    return similarity


def _distances(a: UInt8[np.ndarray, "n w"], b: UInt8[np.ndarray, "m w"]) -> Tensor:
    """Bits that differ, of each with each: [n, m] int32. Both must be contiguous: memory is read as such."""
    found = np.empty((len(a), len(b)), np.int32)
    count = faiss.hammings  # type: ignore[attr-defined]  # its stubs lack it
    count(faiss.swig_ptr(a), faiss.swig_ptr(b), len(a), len(b), a.shape[1], faiss.swig_ptr(found))
    return torch.from_numpy(found)
