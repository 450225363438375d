"""The one train loop: plain torch, any number of ranks, no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vkd import checkpoint, gather
from vkd.checkpoint import Position
from vkd.errors import ConfigError
from vkd.feeding import Fed, Feeder
from vkd.phases import Between, parameter_groups, phase_of, set_trainable
from vkd.recipes.base import Distiller, Losses, Phase
from vkd.rounds import Round, num_steps, rounds_from
from vkd.run import Train
from vkd.schema import WEIGHT
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
        self.phases = distiller.phases() or [Phase("all", train.epochs)]
        self.between = Between(distiller) if distiller.phases() else None
        self.enter(0)
        bf16 = train.precision == "bf16" or (train.precision == "auto" and device == "cuda")
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
        self.to_device = ToDevice(device)
        self.watch: Callable[[Fed, int, int], None] | None = None  # sees each step's input, its number and their total, and changes nothing

    def enter(self, epoch: int) -> None:
        """Be in an epoch's phase: what learns, in which mode, with a new optimizer."""
        self.phase_number, _ = phase_of(self.phases, epoch)
        self.phase = self.phases[self.phase_number]
        self.distiller.enter(self.phase_number)
        self.distiller.zero_grad(set_to_none=True)  # what is frozen now would keep its last one, and count in the norm
        set_trainable(self.distiller, self.phase)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.distiller, self.train.weight_decay, self.phase), lr=self.train.learning_rate
        )

    def fit(
        self,
        feeder: Feeder,
        every_examples: int,
        position: Position,
        on_round: Callable[[RoundReport, Position], None],
        on_step: Callable[[Position], None] = lambda _: None,
    ) -> Position:
        """Train from `position` to the end; on every rank `on_round` is called once a round is trained, `on_step` after any other step.

        After a restart the loop must have entered the position's epoch before its weights were restored.
        """
        train, meter = self.train, _Meter(feeder)
        total = num_steps(feeder.sizes, range(train.epochs), every_examples, train.batch_size, train.seed)
        for epoch, rounds in self._parts(feeder, every_examples, position):
            first_step, steps_of_phase = self._begin(epoch, feeder, every_examples, position)
            model = _parallel(self.distiller, self.device)
            for fed in feeder.stream(rounds, train.batch_size, train.seed, position.batch):
                torch.manual_seed(_seed(train.seed, position.step, feeder.rank))  # a start from here draws the same
                if self.watch is not None:
                    self.watch(fed, position.step, total)
                rate = learning_rate(position.step - first_step, steps_of_phase, train, self.phase.schedule)
                meter.add(self._step(model, fed, rate), fed)
                position = _after(position, fed)
                if fed.last:
                    meter.require_some(sum(feeder.sizes), self.device)
                    on_round(meter.report(fed, position.step, total, rate), position)
                else:
                    on_step(position)
            if self.between is not None:
                number, epochs = phase_of(self.phases, epoch)
                self.between.after_epoch(number, epoch == epochs[-1], self.device)
        return position

    def _parts(self, feeder: Feeder, every_examples: int, position: Position) -> Iterator[tuple[int, list[Round]]]:
        """(first epoch, rounds) to train without a pause: all that is left, or one epoch each when something is done between them."""
        train, start = self.train, (position.epoch, position.round)
        left = list(rounds_from(feeder.sizes, start, train.epochs, every_examples, train.seed))
        if self.between is None:
            yield position.epoch, left
            return
        # the position's epoch even when all of it is trained: what follows may not be done
        for epoch in range(position.epoch, train.epochs):
            yield epoch, [round_ for round_ in left if round_.epoch == epoch]

    def _begin(self, epoch: int, feeder: Feeder, every_examples: int, position: Position) -> tuple[int, int]:
        """What comes before the epochs from this one on; the step at which its phase began, and how many steps that has."""
        train = self.train
        _, epochs = phase_of(self.phases, epoch)
        if epoch == epochs.start and (epoch > position.epoch or (position.round, position.batch) == (0, 0)):
            if phase_of(self.phases, epoch)[0] != self.phase_number:
                self.enter(epoch)
            self.distiller.begin()
        if self.between is not None:
            self.between.before_epoch(epoch)
        before, during = (
            num_steps(feeder.sizes, part, every_examples, train.batch_size, train.seed) for part in (range(epochs.start), epochs)
        )
        return before, during

    def snapshot(self, position: Position, loss: float | None = None) -> dict[str, bytes]:
        """The files of a checkpoint; `loss` is that of the round that ends there, and is not kept where phases have each their own."""
        if self.between is None:
            return checkpoint.snapshot(position, self.distiller, self.optimizer, loss)
        return checkpoint.snapshot(position, self.distiller, self.optimizer, best=self.between.best)

    def restore(self, folder: str) -> Position:
        """Be where a finished checkpoint was written."""
        self.enter(checkpoint.position(folder).epoch)
        if self.between is not None:
            self.between.best = checkpoint.best_of_phase(folder)
        return checkpoint.restore(folder, self.distiller, self.optimizer)

    @property
    def resumes_inside_rounds(self) -> bool:
        """Whether a checkpoint inside a round holds everything: what was noted of its first steps is not in it."""
        return self.between is None or self.between.notes is None

    def metrics(self) -> dict[str, float]:
        """Numbers of the distiller and of its labels, since the last call."""
        notes = self.between.notes if self.between is not None else None
        return {**self.distiller.metrics(), **(notes.metrics() if notes is not None else {})}

    def _step(self, model: nn.Module, fed: Fed, rate: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)  # checkpoints from before there were scales have none
        batch = self.to_device(fed.batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            losses: Losses = model(batch)
        loss, means = gather.total_loss(losses)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.distiller.parameters(), self.train.clip_norm)
        self.optimizer.step()
        if self.between is not None:
            self.between.after_step(fed)
        return means


class _Meter:
    """Sums over one round."""

    def __init__(self, feeder: Feeder) -> None:
        self.feeder = feeder
        self.num_planned = self.num_kept = 0  # examples so far: of all ranks, and those of this rank that count
        self._reset()

    def _reset(self) -> None:
        self.started_s, self.waited_s = time.monotonic(), self.feeder.wait_s
        self.names: list[str] = []  # of every loss of every step, with its mean, and the examples of the step
        self.means: list[Tensor] = []
        self.counts: list[int] = []
        self.num_examples = 0

    def add(self, losses: dict[str, Tensor], fed: Fed) -> None:
        self.names += losses
        self.means += losses.values()
        self.counts += [fed.num_examples] * len(losses)
        self.num_examples += fed.num_examples
        self.num_planned += fed.num_examples
        self.num_kept += int(fed.batch[WEIGHT].sum())

    def require_some(self, num_in_epoch: int, device: str) -> None:
        """Raises ConfigError when a whole epoch had nothing to learn from: the student would end as it began. On every rank or none."""
        if self.num_planned < num_in_epoch or gather.sum_over_ranks(torch.tensor(float(self.num_kept), device=device)):
            return
        action = "vkd verify RUN --rejects lists what cannot be read; a threshold of the recipe may leave out all others"
        raise ConfigError(f"none of {self.num_planned} examples had anything to learn from", where="recipe", action=action)

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


def learning_rate(step: int, total: int, train: Train, schedule: str = "cosine") -> float:
    """Of a step of a phase of `total` steps: linear warm-up, then a cosine to zero at the last step; or linear all the way up."""
    warmup = total if schedule == "linear" else max(1, round(train.warmup_fraction * total))
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
