"""Parameters and inputs drawn by a formula, so that golden values can be made with any implementation (spec of dns, 8.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COMPARATOR = {"conv1": (32, 1, 3, 3), "conv2": (64, 32, 3, 3), "conv3": (128, 64, 3, 3), "fconv": (1, 128, 1, 1)}
ATTENTION = {"attention.transform.weight": (512, 512), "attention.transform.bias": (512,), "attention.context_vector.weight": (1, 512)}


def h(n: int, k: int) -> Tensor:
    """n values in [-0.5, 0.5), the k-th series; in place, since the largest has 34 million."""
    x = torch.arange(1, n + 1, dtype=torch.float64).mul_(12.9898).add_(78.233 * (k + 1)).sin_().mul_(43758.5453)
    return x.sub_(x.floor()).sub_(0.5)


def parameters(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state dict of float64, in the order of the names."""
    state = {}
    for k, (name, shape) in enumerate(shapes.items()):
        values = h(math.prod(shape), k).view(*shape)
        if len(shape) > 1:
            values *= 2 * math.sqrt(3) / math.sqrt(math.prod(shape[1:]))
        else:
            values = 0.2 * values + (1 if name.endswith("weight") else 0)
        state[name] = values
    return state


def comparator(prefix: str) -> dict[str, Sequence[int]]:
    """Names and shapes of the comparator's parameters."""
    pairs = [
        (f"{prefix}{name}.{end}", shape if end == "weight" else shape[:1])
        for name, shape in COMPARATOR.items()
        for end in ("weight", "bias")
    ]
    return dict(pairs)


def query() -> Tensor:
    return F.normalize(h(24 * 9 * 512, 101).view(24, 9, 512), dim=-1)


def target() -> Tensor:
    """Of 18 frames: the query's from the fourth on, with noise."""
    noise = F.normalize(h(18 * 9 * 512, 102).view(18, 9, 512), dim=-1)
    return F.normalize(query()[(torch.arange(18) + 3) % 24] + 0.5 * noise, dim=-1)
