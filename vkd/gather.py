"""Sums over ranks; without a process group they are the values themselves."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over all ranks, without a gradient."""
    total = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def total_loss(losses: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, float]]:
    """The scalar to differentiate, and each loss's global mean.

    Each sum is divided by its count over all ranks, and scaled by the world size, since DDP averages gradients: the
    gradient is that of the global mean, whatever the number of ranks and however rows fall on them.
    """
    names = sorted(losses)
    local = torch.stack([torch.stack([part.detach().float() for part in losses[name]]) for name in names])
    sums, counts = sum_over_ranks(local).unbind(dim=1)
    counts = counts.clamp_min(1.0)
    terms = [losses[name][0] / count for name, count in zip(names, counts, strict=True)]
    return torch.stack(terms).sum() * world()[1], dict(zip(names, (sums / counts).tolist(), strict=True))
