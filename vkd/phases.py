"""Training in phases: which parameters learn in which epochs, and what is done between epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vkd import gather, schema
from vkd.checkpoint import Best
from vkd.feeding import Fed, Feeder
from vkd.recipes.base import Distiller, Phase
from vkd.rounds import Round


class Notes(Protocol):
    """A table of labels that changes between epochs; it is told what the student says of the clips that it trains on."""

    def prepare(self, epoch: int) -> int:
        """Make what an epoch reads; the number of its version."""

    def note(self, round_: Round, examples: Tensor, probs: Tensor) -> None:
        """Keep what was said of a round's examples."""

    def metrics(self) -> Mapping[str, float]:
        """Numbers to note once a round."""


class Between:
    """What is done between the epochs of a distiller with phases, on every rank: labels, validation, the best weights.

    A phase ends with the weights that had its lowest score on held-out clips; with none held out, with its last.
    """

    def __init__(self, distiller: Distiller, held_out: Feeder | None = None, notes: Notes | None = None, batch_size: int = 32) -> None:
        self.distiller, self.held_out, self.notes, self.batch_size = distiller, held_out, notes, batch_size
        self.best: Best | None = None
        self._examples: list[Tensor] = []
        self._probs: list[Tensor] = []

    def before_epoch(self, epoch: int) -> None:
        if self.notes is not None:
            self.notes.prepare(epoch)

    def after_step(self, fed: Fed) -> None:
        """Note what the student said; a round is handed over whole, before its checkpoint is written."""
        if self.notes is None or self.distiller.said is None:
            return
        self._examples.append(fed.batch[schema.EXAMPLE])
        self._probs.append(self.distiller.said.float().cpu())
        if fed.last:
            self.notes.note(fed.round, torch.cat(self._examples), torch.cat(self._probs))
            self._examples, self._probs = [], []

    def after_epoch(self, phase: int, last: bool, device: str) -> None:
        """Validate; after the `last` epoch of a phase, go back to its best weights."""
        score, best = self.score(device), self.best
        # without a score the newest is the best, and any number is better than NaN
        if best is None or best.phase != phase or score < best.score or math.isnan(best.score) or math.isinf(score):
            best = self.best = Best(phase, score, {name: tensor.detach().clone() for name, tensor in self.distiller.state_dict().items()})
        if last:
            self.distiller.load_state_dict(best.weights)

    @torch.no_grad()
    def score(self, device: str) -> float:
        """Mean score over the held-out clips of all ranks; infinite when there are none."""
        if self.held_out is None or not sum(self.held_out.sizes):
            return math.inf
        modes = [(module, module.training) for module in self.distiller.modules()]
        self.distiller.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for fed in self.held_out.stream(self.held_out.one_pass(), self.batch_size, seed=0):
            batch = {name: tensor.to(device) for name, tensor in fed.batch.items()}
            total += torch.stack([part.double().cpu() for part in self.distiller.score(batch)])
        for module, training in modes:
            module.training = training
        value, count = gather.sum_over_ranks(total.to(device)).tolist()
        return value / count if count else math.inf


def phase_of(phases: Sequence[Phase], epoch: int) -> tuple[int, range]:
    """The number of the phase that an epoch belongs to, and its epochs; past the end, the last one that has any."""
    first, found = 0, (0, range(0))
    for number, phase in enumerate(phases):
        if phase.epochs:
            found = number, range(first, first + phase.epochs)
            if epoch < first + phase.epochs:
                break
        first += phase.epochs
    return found


def set_trainable(distiller: Distiller, phase: Phase) -> None:
    """Freeze what the phase does not train: no gradient, and eval mode for modules that hold nothing else."""
    distiller.train()
    if phase.rates is not None:
        for name, parameter in distiller.named_parameters():
            parameter.requires_grad_(phase.rate(name) > 0)
    for module in distiller.modules():
        held = list(module.parameters())
        if held and not any(parameter.requires_grad for parameter in held):
            module.eval()


def parameter_groups(module: nn.Module, weight_decay: float, phase: Phase) -> list[dict[str, object]]:
    """Trained parameters by the scale of their learning rate; weight decay for matrices and kernels, none for norms and biases."""
    scales: dict[float, None] = {}
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for name, _ in trained:
        scales.setdefault(phase.rate(name))
    groups: list[dict[str, object]] = []
    for scale in scales:
        mine = [p for name, p in trained if phase.rate(name) == scale]
        groups.append({"params": [p for p in mine if p.ndim > 1], "weight_decay": weight_decay, "scale": scale})
        groups.append({"params": [p for p in mine if p.ndim <= 1], "weight_decay": 0.0, "scale": scale})
    return groups
