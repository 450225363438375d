"""Packed codes against the floats that they are, and against a loop over bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vkd.search.packed import frame_similarity, pack, unpack
from vkd.students.visil import FineStudent


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.sampled_from([8, 64, 96, 512]), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_bits_give_what_floats_give_exactly(n: int, m: int, r: int, num_bits: int, seed: int) -> None:
    student = FineStudent("binary", num_dims=8, num_bits=num_bits, size="small")
    query, target = codes(n, r, num_bits, seed=seed), codes(m, r, num_bits, seed=seed + 1)
    found = frame_similarity(pack(query), pack(target))
    assert torch.equal(found, student.frames(query[None], target[None])[0])


def test_bits_equal_a_loop() -> None:
    query, target = pack(codes(2, 3, 16)), pack(codes(4, 2, 16, seed=1))
    expected = np.zeros((2, 4))
    for i, j in np.ndindex(2, 4):
        for x in query[i]:
            distances = [sum((int(a) ^ int(b)).bit_count() for a, b in zip(x, y, strict=True)) for y in target[j]]
            expected[i, j] += (1 - 2 * min(distances) / 16) / 3
    assert frame_similarity(query, target).tolist() == [pytest.approx(row) for row in expected.tolist()]


@torch.no_grad()
def test_an_indexed_video_takes_576_bytes_a_frame_and_scores_the_same() -> None:
    torch.manual_seed(0)
    student = FineStudent("binary").eval()
    query, target = (student.index(torch.randn(1, length, 9, 512))[0] for length in (12, 9))
    bits = pack(query), pack(target)
    assert (bits[0].dtype, bits[0].nbytes) == (np.uint8, 12 * 576)
    assert torch.equal(unpack(bits[0]), query)
    assert student.compare(frame_similarity(*bits)[None]).similarity == student.exact(query, target)


def test_a_zero_becomes_minus_one_and_odd_bits_are_refused() -> None:
    assert unpack(pack(torch.tensor([0.0, 1, -1, 1, 1, -1, 1, 1]))).tolist() == [-1, 1, -1, 1, 1, -1, 1, 1]
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(torch.ones(2, 12))


def test_codes_that_do_not_lie_in_one_piece_are_compared_as_they_are() -> None:
    query, target = pack(codes(40, 3, 64)), pack(codes(12, 3, 64, seed=1))
    assert torch.equal(frame_similarity(query[::2, :, ::-1], target[::3]), frame_similarity(query[::2, :, ::-1].copy(), target[::3].copy()))
