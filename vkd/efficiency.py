"""How busy each stage was, how near training came to what the resources allow, and which stage to scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STUDENT = "student"
LITTLE_WAIT = 0.1  # of the student's time: less, and labelling is no bottleneck
FULL = 0.8  # of all cores at useful work: more, and only more cores help


@dataclass(frozen=True)
class Stage:
    """A pool of workers: how many, and the seconds (of the clock, of CPUs) that they worked, over all of them."""

    num_workers: int
    busy_s: float
    cpu_s: float

    @property
    def waits(self) -> bool:
        """Its work is done elsewhere, on a GPU: its CPUs are idle while it is busy."""
        return self.cpu_s < 0.5 * self.busy_s


@dataclass(frozen=True)
class Efficiency:
    """Of one start of training with its labelling: `stages` by name, `elapsed_s` of training, `wait_s` of it without data."""

    stages: Mapping[str, Stage]
    elapsed_s: float
    wait_s: float
    num_examples: int
    num_cores: float
    handed_over_bytes: int = 0
    spilled_bytes: int = 0

    @property
    def busy(self) -> dict[str, float]:
        """The share of its workers' time that each stage was busy."""
        return {name: min(1.0, stage.busy_s / (stage.num_workers * self.elapsed_s)) for name, stage in self.stages.items()}

    @property
    def data_wait(self) -> float:
        return self.wait_s / self.elapsed_s

    @property
    def share_of_bound(self) -> float:
        """Speed as a share of what the resources allow: all cores at useful work, or the busiest stage that needs no cores, always busy."""
        cores = sum(stage.cpu_s for stage in self.stages.values()) / (self.num_cores * self.elapsed_s)
        return min(1.0, max([cores, *(self.busy[name] for name, stage in self.stages.items() if stage.waits)]))

    @property
    def to_scale(self) -> str:
        """What makes the whole faster."""
        busiest = max(self.stages, key=lambda name: self.busy[name])
        if sum(stage.cpu_s for stage in self.stages.values()) > FULL * self.num_cores * self.elapsed_s:
            return "cores"
        if self.data_wait < LITTLE_WAIT or busiest == STUDENT:
            return STUDENT
        return busiest

    def line(self) -> str:
        """All of it for a person."""
        busy = ", ".join(f"{name} {share:.0%}" for name, share in self.busy.items())
        speed = f"{self.num_examples / self.elapsed_s:.1f} clips/s, {self.share_of_bound:.0%} of what the resources allow"
        spilled = f"{self.spilled_bytes / 1e6:.0f} MB spilled" if self.spilled_bytes else "nothing spilled"
        store = f"{self.handed_over_bytes / 1e6:.1f} MB through the object store, {spilled}"
        return f"busy: {busy}; data-wait {self.data_wait:.0%}; {speed}; {store}; to go faster, scale: {self.to_scale}"

    def figures(self) -> dict[str, float]:
        """All of it for a machine."""
        found = {f"busy.{name}": share for name, share in self.busy.items()}
        found |= {"data_wait": self.data_wait, "examples_per_s": self.num_examples / self.elapsed_s, "share_of_bound": self.share_of_bound}
        return found | {"handed_over_bytes": self.handed_over_bytes, "spilled_bytes": self.spilled_bytes}
