"""How the losses of substages are weighed: who lags behind the teacher's feature distribution counts more."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOMENTUM = 0.9
MIN_BASE = 1e-6  # a student that is the teacher has no discrepancy to divide by


class Harmoniser(nn.Module):
    """Running feature-distribution losses of N substages against what they were at the end of the first phase that knew them."""

    ema: Tensor
    base: Tensor

    def __init__(self, num_substages: int, temperature: float, clip: tuple[float, float]) -> None:
        super().__init__()
        self.temperature, self.clip = temperature, clip
        self.register_buffer("ema", torch.full((num_substages,), torch.nan))
        self.register_buffer("base", torch.full((num_substages,), torch.nan))

    @torch.no_grad()
    def add(self, substage: int, loss: Float[Tensor, ""]) -> None:
        """Take in a substage's newest loss, the same on every rank."""
        old, new = self.ema[substage], loss.detach().float()
        self.ema[substage] = torch.where(old.isnan(), new, MOMENTUM * old + (1 - MOMENTUM) * new)

    @torch.no_grad()
    def start(self) -> None:
        """From now on losses are compared with what they are now; those that are compared already stay so."""
        self.base.copy_(torch.where(self.base.isnan(), self.ema, self.base))

    @torch.no_grad()
    def weights(self) -> Float[Tensor, " n"]:
        """N * softmax(log(loss / base) / temperature), clipped, with a mean of 1; all 1 before anything is known."""
        ratio = (self.ema.clamp_min(MIN_BASE) / self.base.clamp_min(MIN_BASE)).nan_to_num(1.0)
        return harmonised(ratio, self.temperature, self.clip)


def harmonised(ratio: Float[Tensor, " n"], temperature: float, clip: tuple[float, float]) -> Float[Tensor, " n"]:
    """Weights of substages with a mean of 1, from how much of its discrepancy each still has."""
    weights = len(ratio) * torch.softmax(ratio.log() / temperature, dim=0)
    weights = weights.clamp(*clip)
    return weights / weights.mean()
