"""One step of Adam on one batch, against the equations of the paper written out slowly (spec of dns, 3.1, 5.4 and 5.5)."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vkd.loop import Loop
from vkd.recipes.dns import DnS
from vkd.recipes.dns.batches import MASK, PAIR_WEIGHT, REGIONS
from vkd.recipes.dns.distiller import SimilarityDistiller
from vkd.run import Train
from vkd.schema import WEIGHT
from vkd.students.visil import FineStudent

NUM_ANCHORS, NUM_FRAMES, NUM_REGIONS, NUM_DIMS = 2, 8, 3, 16
RATE, EXCESS = 1e-4, 1e-3  # of the paper: the learning rate, and the weight of the sum over all pairs of a batch
LENGTHS = ((8, 5, 8), (6, 8, 4))  # of each anchor, its positive and its negative


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    regions = torch.randn(NUM_ANCHORS, 3, NUM_FRAMES, NUM_REGIONS, NUM_DIMS, generator=generator, dtype=torch.float64)
    mask = torch.arange(NUM_FRAMES) < torch.tensor(LENGTHS)[..., None]
    scores = torch.tensor([[0.9, -0.8], [0.7, -0.3]], dtype=torch.float64)
    ones = torch.ones(NUM_ANCHORS, dtype=torch.float64)
    regions = F.normalize(regions, dim=-1) * mask[..., None, None]
    return {REGIONS: regions, MASK: mask, "teacher.scores": scores, PAIR_WEIGHT: ones[:, None].repeat(1, 2), WEIGHT: ones}


def student() -> FineStudent:
    torch.manual_seed(0)
    found = FineStudent("attention", NUM_DIMS, size="small").double()
    for parameter in found.parameters():  # as it starts, most gradients are zero; large, so that cells lie outside [-1, 1]
        torch.nn.init.normal_(parameter, std=0.5)
    return found


def compared(p: Mapping[str, Tensor], q: Tensor, t: Tensor, q_mask: Tensor, t_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of one pair of padded videos, and the sum of what its cells exceed [-1, 1] by."""

    def attended(x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ p["encode.transform.weight"].T + p["encode.transform.bias"])
        return x * torch.sigmoid(hidden @ p["encode.context_vector.weight"].T)

    frames = torch.einsum("iok,jpk->iopj", attended(q), attended(t)).amax(2).mean(1)
    valid = (q_mask[:, None] & t_mask[None]).double()
    x, valid = (frames * valid)[None, None], valid[None, None]
    for name in ("conv1", "conv2", "conv3"):
        x = F.relu(F.conv2d(x, p[f"comparator.{name}.weight"], p[f"comparator.{name}.bias"], padding=1)) * valid
        if name != "conv3":
            x, valid = F.max_pool2d(x, 2), F.max_pool2d(valid, 2)
    cells, there = F.conv2d(x, p["comparator.fconv.weight"], p["comparator.fconv.bias"])[0, 0], valid[0, 0] > 0
    best = [row[real].clamp(-1, 1).max() for row, real in zip(cells, there, strict=True) if real.any()]
    return torch.stack(best).mean(), (F.relu(cells - 1) + F.relu(-1 - cells))[there].sum()


def slow_step(found: FineStudent, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters after the first step: every one moves by the rate, nearly, against the sign of its gradient."""
    p = {name: value.detach().clone().requires_grad_() for name, value in found.named_parameters()}
    absolute, excess = [], []
    for anchor in range(NUM_ANCHORS):
        for candidate in (1, 2):
            videos, masks = given[REGIONS][anchor], given[MASK][anchor]
            said, over = compared(p, videos[0], videos[candidate], masks[0], masks[candidate])
            absolute.append((said - given["teacher.scores"][anchor, candidate - 1]).abs())
            excess.append(over)
    assert torch.stack(excess).detach().sum() > 0
    loss = torch.stack(absolute).mean() + EXCESS * torch.stack(excess).sum()
    gradients = torch.autograd.grad(loss, list(p.values()))
    return {name: value.detach() - RATE * g / (g.abs() + 1e-8) for (name, value), g in zip(p.items(), gradients, strict=True)}


def test_one_step_of_adam_is_that_of_the_equations() -> None:
    found, given = student(), batch()
    expected = slow_step(found, given)
    teacher: Any = {"name": "pair_scores", "store": "s", "kind": "chamfer"}
    recipe = DnS(name="dns", student={"name": "fine"}, teacher=teacher, excess=EXCESS * 2 * NUM_ANCHORS)  # ours is of the mean over pairs
    train = Train(epochs=1, batch_size=NUM_ANCHORS, learning_rate=RATE, weight_decay=0.0, clip_norm=1e9, precision="fp32")
    loop = Loop(SimilarityDistiller(found, recipe), train, "cpu")
    loop._step(loop.distiller, SimpleNamespace(batch=given), RATE)  # type: ignore[arg-type]
    for name, value in found.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], atol=1e-6, rtol=0, msg=lambda said, name=name: f"{name}: {said}")
        assert name.endswith("bias") or (value - student().state_dict()[name]).abs().max() > RATE / 2, f"{name} did not learn"


def test_masks_and_weights_are_those_of_the_batch() -> None:
    """Padding that is no video's changes nothing."""
    given = batch()
    noise = torch.where(given[MASK][..., None, None], given[REGIONS], torch.full_like(given[REGIONS], 7.0))
    recipe = DnS(name="dns", student={"name": "fine"}, teacher={"name": "pair_scores", "store": "s", "kind": "chamfer"})  # type: ignore[arg-type]
    distiller = SimilarityDistiller(student(), recipe)
    for (name, (total, count)), (_, (other, _)) in zip(distiller(given).items(), distiller(given | {REGIONS: noise}).items(), strict=True):
        assert total.item() == pytest.approx(other.item(), abs=1e-12), name
        assert float(count) == 2 * NUM_ANCHORS
