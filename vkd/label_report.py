"""What a labelling did, added up chunk by chunk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vkd import stages
from vkd.efficiency import Stage
from vkd.metrics.label_statistics import Statistics, pooled

LOOK_S = 1.0


@dataclass
class LabelReport:
    """What one labelling did: examples counted once per view, seconds summed over workers.

    `decode_s` and `teach_s` are CPU seconds, `busy_s` those of the clock, by stage; `pools` says how many workers each has.
    """

    planned: int = 0
    present: int = 0
    elsewhere: int = 0  # labelled by other drivers meanwhile
    other_drivers: int = 0
    labelled: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0
    decode_s: float = 0.0
    teach_s: Counter[str] = field(default_factory=Counter)
    busy_s: Counter[str] = field(default_factory=Counter)
    pools: dict[str, int] = field(default_factory=dict)
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)

    @property
    def done(self) -> int:
        return self.labelled + self.rejected.total() + self.elsewhere

    def stages(self) -> dict[str, Stage]:
        """How much each pool worked."""
        cpu_s = {stages.DECODE: self.decode_s, **self.teach_s}
        return {name: Stage(num_workers, self.busy_s[name], cpu_s.get(name, 0.0)) for name, num_workers in self.pools.items()}

    def add(self, stats: Mapping[str, Any]) -> None:
        """Count one chunk."""
        self.labelled += stats["labelled"]
        self.elsewhere += stats["elsewhere"]
        self.rejected.update(stats["rejected"])
        self.decode_s += stats["decode_s"]
        self.teach_s.update(stats["teach_s"])
        self.busy_s.update(stats["busy_s"])
        for name, measured in stats["fidelity"].items():
            self.fidelity[name] = _worst(self.fidelity.get(name, measured), measured)
        for name, told in stats["statistics"].items():
            self.statistics[name] = pooled(self.statistics[name], told) if name in self.statistics else told


class Rates:
    """A labelling's figures as they go: how busy each stage was since the last look, and what is done."""

    def __init__(self) -> None:
        self._looked_s, self._busy_s = time.monotonic(), Counter[str]()

    def of(self, report: LabelReport) -> dict[str, float]:
        """Nothing when the last look was just now."""
        elapsed_s = time.monotonic() - self._looked_s
        if elapsed_s < LOOK_S:
            return {}
        stages = report.stages().items()
        busy = {f"busy.{name}": min(1.0, (s.busy_s - self._busy_s[name]) / (s.num_workers * elapsed_s)) for name, s in stages}
        self._looked_s, self._busy_s = self._looked_s + elapsed_s, Counter(report.busy_s)
        return busy | {"labelled": report.labelled, "rejected": report.rejected.total()}


def _worst(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """The worse of two fidelities, figure by figure: the lower cosine and PSNR, the larger error."""
    lower_is_worse = ("cosine", "psnr")
    return {k: (min if k.startswith(lower_is_worse) else max)(a[k], b[k]) for k in a.keys() & b.keys()}
