"""Whether a teacher is really used: label columns that say nothing, losses that do not care whose labels they get, losses that drown."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROWS_OF_COLUMN, ROWS_OF_DIMENSION = 32, 128  # clips that must agree before a column, or some of its dimensions, are called constant
DEAD_SHARE = 0.05  # of a column's dimensions: a few are a habit of networks
TOLERANCE = 1e-5  # of a dimension's size: below the step of every encoding
MIN_GRADIENT_SHARE = 0.01
MIN_MARGIN = 3.0  # standard errors
MIN_DIFFERENCES = 4
MIN_CHANGE = 1e-4  # of a loss when labels change: above the rounding of nondeterministic kernels
LEAK_GAIN, ROWS_OF_LEAK = 0.5, 16
MAX_MARGIN = 1e6
NUM_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what kind, where (a column or a loss), what, and the next action."""

    kind: str
    where: str
    what: str
    action: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} -> {self.action}"


@dataclass(frozen=True)
class Control:
    """Mean of a loss with the labels and with those of other clips; `margin`: their difference in standard errors, over batches."""

    labels: float
    shuffled: float
    margin: float | None
    depends: bool

    @property
    def gain(self) -> float:
        """By which share the loss is lower with the right labels."""
        return 1 - self.labels / self.shuffled if self.shuffled > 0 else 0.0


class Spans:
    """Lowest and highest value of each dimension (the last axis) of a label column. Takes rows as they come."""

    def __init__(self) -> None:
        self.num_rows, self.num_not_finite = 0, 0
        self._low, self._high = torch.empty(0), torch.empty(0)

    def add(self, rows: Float[Tensor, "n ..."]) -> None:
        """Rows that hold NaN or infinity are counted and left out."""
        if not len(rows):
            return
        values = rows.detach().reshape(len(rows), -1)
        finite = values.isfinite().all(dim=1)
        self.num_rows += len(rows)
        self.num_not_finite += int((~finite).sum())
        width = rows.shape[-1] if rows.ndim > 1 else 1
        values = values[finite].reshape(-1, width).float()
        if not len(values) or (len(self._low) and len(self._low) != width):  # a ragged axis has no dimensions
            return
        low, high = values.amin(dim=0).cpu(), values.amax(dim=0).cpu()
        self._low = torch.minimum(self._low, low) if len(self._low) else low
        self._high = torch.maximum(self._high, high) if len(self._high) else high

    @property
    def constant(self) -> Bool[Tensor, " d"]:
        """Dimensions that have one value in all rows."""
        return (self._high - self._low) <= TOLERANCE * torch.maximum(self._high.abs(), self._low.abs())

    def figures(self) -> dict[str, float]:
        """Rows seen, rows not finite, and shares of the dimensions that are constant, or zero."""
        zero = (self._low == 0) & (self._high == 0)
        shares = (float(found.float().mean()) if len(found) else 0.0 for found in (self.constant, zero))
        return {"rows": float(self.num_rows), "not_finite": float(self.num_not_finite)} | dict(
            zip(("constant", "zero"), shares, strict=True)
        )


def derangement(num_rows: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """A seeded order in which no row keeps its place (a single row must)."""
    cycle = rng.permutation(num_rows)
    order = np.empty_like(cycle)
    order[cycle] = np.roll(cycle, -1)
    return order


def margin(differences: Sequence[float]) -> float:
    """The mean in units of its standard error (Student's t), at most a million; 0 when all are 0. Of at least two."""
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    if abs(mean) >= MAX_MARGIN * error:
        return math.copysign(MAX_MARGIN, mean) if mean else 0.0
    return mean / error


def gradient_shares(norms: Mapping[str, float]) -> dict[str, float]:
    """Each norm's share of their sum; empty when there is no gradient, or one that is not finite."""
    total = math.fsum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if 0 < total < math.inf else {}


def changed(loss: float, other: float) -> bool:
    """Whether a loss became another one; NaN is another one."""
    return not abs(other - loss) <= MIN_CHANGE * abs(loss)


def wrong_columns(columns: Mapping[str, Spans]) -> Iterator[Finding]:
    """Columns that are not finite, constant, or partly dead; constancy is told once enough rows were seen."""
    for name, spans in columns.items():
        num_seen, constant = spans.num_rows - spans.num_not_finite, spans.constant
        dead = np.flatnonzero(constant.numpy())
        if spans.num_not_finite:
            what = f"NaN or infinity in the labels of {spans.num_not_finite} of {spans.num_rows} clips"
            yield Finding("not_finite", name, what, "mend the teacher, raise its version, then vkd label RUN")
        if len(dead) and len(dead) == len(constant):
            if num_seen >= ROWS_OF_COLUMN:
                what = f"the same label for all of {num_seen} clips: nothing can be learned from it"
                yield Finding("constant", name, what, "mend the teacher, or set the weights of what learns from it to 0")
        elif num_seen >= ROWS_OF_DIMENSION and len(dead) >= DEAD_SHARE * len(constant):
            which = ", ".join(map(str, dead[:NUM_SHOWN].tolist())) + (", ..." if len(dead) > NUM_SHOWN else "")
            what = f"{len(dead)} of {len(constant)} dimensions never change in {num_seen} clips ({which})"
            yield Finding("dead", name, what, "look at that layer of the teacher, or choose another label")


def by_kind(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of the losses of one kind added up: `fd/1` and `fd/2` are two of `fd`."""
    found: dict[str, float] = {}
    for name, share in shares.items():
        kind = name.partition("/")[0]
        found[kind] = found.get(kind, 0.0) + share
    return found


def drowned_losses(shares: Mapping[str, float], regularisers: Collection[str] = ()) -> Iterator[Finding]:
    """Losses whose largest share of the gradient so far is too small to matter; a regulariser may have none."""
    for name, share in shares.items():
        if share < MIN_GRADIENT_SHARE and name not in regularisers:
            what = f"{share:.2g} of the gradient that reaches the student: the other losses drown it"
            yield Finding("drowned", name, what, "raise its weight, or set it to 0")


def unused_labels(controls: Mapping[str, Control]) -> Iterator[Finding]:
    """Of a student that was trained for a while: losses that are not lower with the right labels."""
    for name, control in controls.items():
        if control.depends and control.margin is not None and control.margin < MIN_MARGIN:
            what = (
                f"{control.labels:.4g} with the teacher's labels, {control.shuffled:.4g} with those of other clips "
                f"({control.margin:.1f} standard errors apart): the student learns nothing about the clip from it"
            )
            yield Finding("unused", name, what, "check that labels and frames are of one clip and view, then learning rate and weight")


def ignored_labels(controls: Mapping[str, Control], needs: Sequence[str]) -> Iterator[Finding]:
    """Labels that a recipe asks for and no loss looks at."""
    if needs and controls and not any(control.depends for control in controls.values()):
        what = "no loss changes when these labels do: they are read and not used"
        yield Finding("ignored", ", ".join(needs), what, "mend the recipe's distiller")


def leaking_losses(controls: Mapping[str, Control]) -> Iterator[Finding]:
    """Of a student before its first step, which can know nothing yet: losses that are far lower with the right labels."""
    for name, control in controls.items():
        if control.depends and control.gain > LEAK_GAIN:
            what = f"{control.labels:.4g} with the teacher's labels before the first step, {control.shuffled:.4g} with those of other clips"
            yield Finding("leak", name, what, "look for the labels in what the student sees")
