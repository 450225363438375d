"""Sums and gathers over ranks; without a process group they are the values themselves."""

from __future__ import annotations

from typing import Any

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


def of_rank_0(text: str | None) -> str | None:
    """What rank 0 says, on every rank: a look at storage may show each something else."""
    told = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def of_all(text: str) -> list[str]:
    """What each rank says, by rank."""
    told = [text] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(told, text)
    return told


def rows_over_ranks(x: Tensor) -> Tensor:
    """The rows of all ranks, in rank order, of each rank's x [n, ...]; n may differ between ranks, and be 0.

    Every rank must call it, and differentiate what it gets, the same number of times. On a GPU it waits for the lengths.
    """
    gathered: Tensor = x if world()[1] == 1 else _AllRows.apply(x)  # type: ignore[no-untyped-call]
    return gathered


class _AllRows(torch.autograd.Function):
    """A row that all ranks see is in the loss of each of them, so its gradient is the sum of what all ranks' losses say of it.

    With that sum, each rank counts only the anchors that it owns, and `total_loss` is right for the anchors of others too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rank, world_size = world()
        lengths = _gathered(torch.tensor([len(x)], device=x.device), world_size)
        counts: list[int] = torch.cat(lengths).tolist()
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([part[:count] for part, count in zip(_gathered(padded, world_size), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total: Tensor = sum_over_ranks(gradients[0].contiguous())[ctx.own]
        return total


def _gathered(x: Tensor, world_size: int) -> list[Tensor]:
    """x of each rank; they have one shape."""
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x)
    return parts


def total_loss(losses: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to differentiate, and each loss's global mean: a tensor without gradient, since a float would wait for a GPU.

    Each sum is divided by its count over all ranks, and scaled by the world size, since DDP averages gradients: the
    gradient is that of the global mean, whatever the number of ranks and however rows fall on them.
    """
    names = sorted(losses)
    local = torch.stack([torch.stack([part.detach().float() for part in losses[name]]) for name in names])
    sums, counts = sum_over_ranks(local).unbind(dim=1)
    counts = counts.clamp_min(1.0)
    terms = [losses[name][0] / count for name, count in zip(names, counts, strict=True)]
    return torch.stack(terms).sum() * world()[1], dict(zip(names, sums / counts, strict=True))
