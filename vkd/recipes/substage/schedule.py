"""The cascade: which parts of the student learn in which epochs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

HEADS = "heads."


class Cascade(Protocol):
    """Epochs of the phases."""

    @property
    def warmup(self) -> int: ...
    @property
    def per_stage(self) -> int: ...
    @property
    def joint(self) -> int: ...


@dataclass(frozen=True)
class Step:
    """One phase: its exits by number, the substage that it adds, and whether all of them learn as one."""

    name: str
    epochs: int
    exits: tuple[int, ...]
    newest: int
    joint: bool = False
    warmup: bool = False


def steps_of(cascade: Cascade, num_substages: int, prefix: bool) -> list[Step]:
    """Warm-up of the last exit, a phase for each substage, then all exits together; phases without epochs are left out.

    Without `prefix` only the newest exit of a phase is supervised.
    """
    last = num_substages - 1
    exits = [tuple(range(k + 1)) if prefix else (k,) for k in range(num_substages)]
    steps = [Step("warm-up", cascade.warmup, (last,), last, warmup=True)]
    steps += [Step(f"substage {k + 1}", cascade.per_stage, exits[k], k) for k in range(num_substages)]
    steps.append(Step("joint", cascade.joint, exits[last], last, joint=True))
    return [step for step in steps if step.epochs]


def parts_of(student: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Parameters of each substage: those of its module, and those registered between it and the one before.

    So the stem belongs to the first substage, and what follows the last module, with the heads, to the last.
    """
    parts: list[list[str]] = [[] for _ in names]
    owner = len(names) - 1
    for parameter in reversed([name for name, _ in student.named_parameters()]):
        if parameter.startswith(HEADS):
            parts[-1].append(parameter)
            continue
        owner = next((number for number, name in enumerate(names) if parameter.startswith(f"{name}.")), owner)
        parts[owner].append(parameter)
    return parts
