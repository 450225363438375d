"""Binary codes of regions as bits: 64 bytes per region of 512 bits, 576 per frame of 9 regions, compared without becoming floats."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

BLOCK_FRAMES = 16  # of the query at once: similarities of all regions with all would not stay in a core's cache


def pack(codes: Float[Tensor, "*n k"]) -> UInt8[np.ndarray, "*n w"]:
    """Eight codes of +1 and -1 to a byte, the first in its highest bit; a code of 0 becomes -1, so cut padding off first."""
    if codes.shape[-1] % 8:
        raise ValueError(f"{codes.shape[-1]} bits do not fill bytes: take a multiple of 8")
    return np.packbits((codes > 0).cpu().numpy(), axis=-1)


def unpack(bits: UInt8[np.ndarray, "*n w"]) -> Int8[Tensor, "*n k"]:
    """Codes of +1 and -1, a byte each."""
    return torch.from_numpy(np.unpackbits(bits, axis=-1).view(np.int8)).mul_(2).sub_(1)


def frame_similarity(query: UInt8[np.ndarray, "n r w"], target: UInt8[np.ndarray, "m s w"]) -> Float[Tensor, "n m"]:
    """Mean over a query's regions of the best 1 - 2 * Hamming / bits: to the bit what `FineStudent.frames` gives for the codes.

    Matrix products of 16 query frames each: of bytes, in a third of the time of floats, where the processor multiplies bytes, else of
    floats, which hold these sums exactly.
    """
    (n, r, _), (m, s, w) = query.shape, target.shape
    as_bytes = multiplies_bytes()
    product, code, total = (torch._int_mm, torch.int8, torch.int32) if as_bytes else (torch.matmul, torch.float32, torch.float32)
    by_region = unpack(target.transpose(1, 0, 2).reshape(s * m, w)).to(code).T  # [bits, s * m]: the maximum runs over whole rows
    sums = torch.empty(n, m, dtype=total)
    for start in range(0, n, BLOCK_FRAMES):
        codes = unpack(query[start : start + BLOCK_FRAMES]).to(code).flatten(0, 1)
        dots = product(codes, by_region)  # of bytes int32: torch.matmul would overflow them
        torch.sum(dots.view(-1, r, s, m).amax(2), 1, out=sums[start : start + BLOCK_FRAMES])
    similarity: Tensor = sums.float() / r / (8 * w)
    return similarity


@cache
def multiplies_bytes() -> bool:
    """Whether the processor has instructions for it: without them a product of bytes takes thirty times that of floats."""
    return torch.cpu._is_vnni_supported()
