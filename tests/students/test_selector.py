"""The selector: golden values, padding, the mean over regions."""

from __future__ import annotations

import hashed
import pytest
import torch
import torch.nn.functional as F

from vkd.metrics.cost import num_parameters
from vkd.regions import collate
from vkd.students.selector import Selector, load_reference

MLP = {
    "mlp.model.0.weight": (100, 3),
    "mlp.model.1.weight": (100,),
    "mlp.model.1.bias": (100,),
    "mlp.model.4.weight": (100, 100),
    "mlp.model.5.weight": (100,),
    "mlp.model.5.bias": (100,),
    "mlp.model.8.weight": (1, 100),
    "mlp.model.8.bias": (1,),
}
COARSE = 0.99250804  # g^C's golden score of the same pair


@torch.no_grad()
def test_golden_values() -> None:
    state = hashed.parameters(hashed.ATTENTION | hashed.comparator("visil_head.") | MLP)
    for layer in (1, 5):
        state |= {f"mlp.model.{layer}.running_mean": torch.zeros(100), f"mlp.model.{layer}.running_var": torch.ones(100)}
        state[f"mlp.model.{layer}.num_batches_tracked"] = torch.tensor(0)
    selector = load_reference(state).eval()
    query, target = selector.index(hashed.query()[None]), selector.index(hashed.target()[None])
    assert query.item() == pytest.approx(-0.03796976, abs=1e-8)
    assert target.item() == pytest.approx(-0.03870884, abs=1e-8)
    score = selector(query, target, torch.tensor([COARSE], dtype=torch.float64)).sigmoid()
    assert score.item() == pytest.approx(0.46717698, abs=1e-8)


def test_number_of_parameters() -> None:
    selector = Selector()
    assert num_parameters(selector) == 366_770
    assert num_parameters(selector.mlp) == 10_801


def test_similarity_is_the_mean_over_regions() -> None:
    torch.manual_seed(0)
    selector = Selector(num_dims=16, size="small").double()
    x = torch.randn(2, 8, 9, 16, dtype=torch.float64)
    attended = selector.attention(x)
    frames = torch.einsum("biok,bjpk->biopj", attended, attended).mean((2, 3))
    torch.testing.assert_close(selector.index(x), selector.comparator(frames)[0].mean((1, 2)))


def test_padding_of_whole_windows_does_not_matter_and_nothing_is_nan() -> None:
    torch.manual_seed(0)
    selector = Selector(num_dims=16, size="small")
    clips = [F.normalize(torch.randn(length, 9, 16), dim=-1) for length in (8, 16, 4)]
    regions, mask = collate(clips)
    for clip, number in zip(clips, selector.index(regions, mask), strict=True):
        torch.testing.assert_close(selector.index(clip[None])[0], number, rtol=0, atol=1e-6)
    mask[2] = False
    numbers = selector.index(regions, mask)
    assert numbers[2] == 0
    selector(numbers, numbers.flip(0), torch.rand(3)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in selector.parameters())
