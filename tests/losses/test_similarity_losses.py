"""Losses and labels of similarity distillation: golden values, slow loops, and sums that do not care how pairs fall on ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.losses.similarity import absolute, binary_cross_entropy, excess, needs_fine, to_unit


def ones(b: int) -> torch.Tensor:
    return torch.ones(b)


def test_excess_golden_value() -> None:
    total, count = excess(torch.tensor([[[-1.5, 0.2], [1.3, 2.0]]]), None, ones(1))
    assert total.item() == pytest.approx(1.8)
    assert count == 1


def test_excess_counts_neither_padding_nor_rows_without_weight() -> None:
    cells = torch.tensor([[[2.0, 5.0]], [[math.nan, 3.0]]], requires_grad=True)
    mask = torch.tensor([[[True, False]], [[True, True]]])
    total, count = excess(cells, mask, torch.tensor([1.0, 0.0]))
    assert (total.item(), count.item()) == (1, 1)
    total.backward()
    assert cells.grad is not None
    assert cells.grad.tolist() == [[[1, 0]], [[0, 0]]]


@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_sums_of_ranks_add_up(num_pairs: int, cut: int, seed: int) -> None:
    """Whatever rows a rank has, also none, and however long their padding is."""
    generator = torch.Generator().manual_seed(seed)
    cells, student, teacher = (torch.randn(num_pairs, *shape, generator=generator) for shape in ((3, 4), (), ()))
    weight = torch.randint(0, 2, (num_pairs,), generator=generator).float()
    mask = torch.rand(num_pairs, 3, 4, generator=generator) < 0.8
    parts = [slice(0, cut), slice(cut, None)]
    longer = [torch.nn.functional.pad(x, (0, 2)) for x in (cells + 5, mask)]
    for whole, split in (
        (excess(cells + 5, mask, weight), [excess(longer[0][part], longer[1][part], weight[part]) for part in parts]),
        (absolute(student, teacher, weight), [absolute(student[part], teacher[part], weight[part]) for part in parts]),
    ):
        assert whole[0].item() == pytest.approx(sum(total.item() for total, _ in split), rel=1e-5)
        assert whole[1].item() == sum(count.item() for _, count in split)


def test_the_papers_batch() -> None:
    """Its loss of 64 pairs is that mean of differences plus 0.001 times that sum: here a weight of 0.064 on the mean excess."""
    generator = torch.Generator().manual_seed(0)
    cells, student, teacher = (torch.randn(64, *shape, generator=generator) for shape in ((5, 6), (), ()))
    paper = (student - teacher).abs().mean() + 1e-3 * (cells - cells.clamp(-1, 1)).abs().sum()
    first, second = absolute(student, teacher, ones(64)), excess(cells, None, ones(64))
    torch.testing.assert_close(first[0] / first[1] + 0.064 * second[0] / second[1], paper)


def test_teachers_get_no_gradient_and_masked_rows_no_nan() -> None:
    student = torch.tensor([0.5, math.nan], requires_grad=True)
    teacher = torch.tensor([-0.25, math.nan], requires_grad=True)
    total, count = absolute(student, teacher, torch.tensor([1.0, 0.0]))
    assert (total.item(), count.item()) == (0.75, 1)
    total.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.tolist() == [1, 0]


def test_label_rule() -> None:
    fine, coarse = torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 0.5, 0.71, 0.29, 0.79])
    assert needs_fine(fine, coarse).tolist() == [0, 0, 1, 1, 1]
    assert needs_fine(fine, coarse, threshold=0.5).tolist() == [0] * 5
    at_threshold, beyond = torch.tensor([0.75, 0.25]), torch.tensor([0.7500001, 0.2499999])
    assert needs_fine(torch.zeros(2), at_threshold, threshold=0.25).tolist() == [0, 0]
    assert needs_fine(torch.zeros(2), beyond, threshold=0.25).tolist() == [1, 1]
    assert to_unit(fine).tolist() == [0, 0.5, 0.5, 0.5, 1]
    assert to_unit(np.array([-1.0, 0.5])).tolist() == [0, 0.75]


def test_binary_cross_entropy() -> None:
    logits, label = torch.tensor([0.0, 2.0, -40.0, math.nan]), torch.tensor([1.0, 0.0, 1.0, math.nan])
    total, count = binary_cross_entropy(logits, label, torch.tensor([1.0, 2.0, 1.0, 0.0]))
    assert total.item() == pytest.approx(math.log(2) + 2 * math.log1p(math.exp(2)) + 40)
    assert count == 4
