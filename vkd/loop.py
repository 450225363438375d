"""The one train loop: plain torch, any number of ranks, no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vkd import gather
from vkd.checkpoint import Position
from vkd.feeding import Fed, Feeder
from vkd.recipes.base import Distiller, Losses
from vkd.rounds import num_steps, rounds_from
from vkd.run import Train
from vkd.transfer import ToDevice


@dataclass(frozen=True)
class RoundReport:
    """What one round did on this rank: mean losses over all ranks, speed over all ranks, and where time went."""

    epoch: int
    round: int
    step: int
    num_steps: int
    losses: dict[str, float]
    examples_per_s: float
    wait_fraction: float
    learning_rate: float
    unreadable: int
    left_out: int


class Loop:
    """Trains a distiller from a feeder; `attempt` is where checkpoints go."""

    def __init__(self, distiller: Distiller, train: Train, device: str) -> None:
        self.distiller, self.train, self.device = distiller.to(device), train, device
        self.optimizer = torch.optim.AdamW(_parameter_groups(distiller, train.weight_decay), lr=train.learning_rate)
        bf16 = train.precision == "bf16" or (train.precision == "auto" and device == "cuda")
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
        self.to_device = ToDevice(device)
        self.watch: Callable[[Fed, int, int], None] | None = None  # sees each step's input, its number and their total, and changes nothing

    def fit(
        self,
        feeder: Feeder,
        every_examples: int,
        position: Position,
        on_round: Callable[[RoundReport, Position], None],
        on_step: Callable[[Position], None] = lambda _: None,
    ) -> Position:
        """Train from `position` to the end; on every rank `on_round` is called once a round is trained, `on_step` after any other step."""
        train = self.train
        total = num_steps(feeder.sizes, train.epochs, every_examples, train.batch_size, train.seed)
        left = list(rounds_from(feeder.sizes, (position.epoch, position.round), train.epochs, every_examples, train.seed))
        model = _parallel(self.distiller, self.device)
        self.distiller.train()
        meter = _Meter(feeder)
        for fed in feeder.stream(left, train.batch_size, train.seed, position.batch):
            torch.manual_seed(_seed(train.seed, position.step, feeder.rank))  # a start from here draws the same
            if self.watch is not None:
                self.watch(fed, position.step, total)
            rate = learning_rate(position.step, total, train)
            losses = self._step(model, fed, rate)
            meter.add(losses, fed.num_examples)
            position = _after(position, fed)
            if fed.last:
                on_round(meter.report(fed, position.step, total, rate), position)
            else:
                on_step(position)
        return position

    def _step(self, model: nn.Module, fed: Fed, rate: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.to_device(fed.batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            losses: Losses = model(batch)
        loss, means = gather.total_loss(losses)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.distiller.parameters(), self.train.clip_norm)
        self.optimizer.step()
        return means


class _Meter:
    """Sums over one round."""

    def __init__(self, feeder: Feeder) -> None:
        self.feeder = feeder
        self._reset()

    def _reset(self) -> None:
        self.started_s, self.waited_s = time.monotonic(), self.feeder.wait_s
        self.names: list[str] = []  # of every loss of every step, with its mean, and the examples of the step
        self.means: list[Tensor] = []
        self.counts: list[int] = []
        self.num_examples = 0

    def add(self, losses: dict[str, Tensor], num_examples: int) -> None:
        self.names += losses
        self.means += losses.values()
        self.counts += [num_examples] * len(losses)
        self.num_examples += num_examples

    def losses(self) -> dict[str, float]:
        """Means over the round. They become numbers here and not in each step, where a GPU would be waited for."""
        sums: dict[str, float] = {}
        for name, mean, num_examples in zip(self.names, torch.stack(self.means).tolist(), self.counts, strict=True):
            sums[name] = sums.get(name, 0.0) + mean * num_examples
        return {name: total / self.num_examples for name, total in sums.items()}

    def report(self, fed: Fed, step: int, total: int, rate: float) -> RoundReport:
        losses = self.losses()
        elapsed_s = max(time.monotonic() - self.started_s, 1e-9)
        waited_s = self.feeder.wait_s - self.waited_s
        speed = self.num_examples / elapsed_s
        lost = self.feeder.unreadable, self.feeder.left_out
        self._reset()
        return RoundReport(fed.round.epoch, fed.round.index, step, total, losses, speed, waited_s / elapsed_s, rate, *lost)


def learning_rate(step: int, total: int, train: Train) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    warmup = max(1, round(train.warmup_fraction * total))
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = torch.tensor((step - warmup) / max(1, total - warmup))
    return train.learning_rate * 0.5 * (1 + torch.cos(torch.pi * progress)).item()


def _after(position: Position, fed: Fed) -> Position:
    """The position after one step; the round number moves on when the round ends. (epoch, round) past the end are simply not there."""
    done = position.step + 1, position.num_examples + fed.num_examples
    if fed.last:
        return Position(fed.round.epoch, fed.round.index + 1, *done)
    return Position(fed.round.epoch, fed.round.index, *done, position.batch + 1)


def _parameter_groups(module: nn.Module, weight_decay: float) -> Sequence[dict[str, object]]:
    """Weight decay for matrices and kernels, none for norms and biases."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _parallel(distiller: Distiller, device: str) -> nn.Module:
    if gather.world()[1] == 1:
        return distiller
    return DistributedDataParallel(distiller, device_ids=None if device == "cpu" else [torch.cuda.current_device()])


def _seed(*parts: int) -> int:
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % 2**63
    return mixed


def as_metrics(report: RoundReport) -> dict[str, float]:
    """Flat numbers of a round, for TensorBoard and Ray Train."""
    flat = asdict(report)
    losses = flat.pop("losses")
    return {f"loss/{name}": value for name, value in losses.items()} | flat
