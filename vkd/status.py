"""What a label store holds, told from listings and file footers: no Ray, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from vkd.errors import ConfigError
from vkd.store import files
from vkd.store.labelset import DOCUMENT, LabelSet

PLANNED = "planned.json"  # beside labelset.json: how much the newest `vkd label` set out to label
RATE_WINDOW_S = 600.0


@dataclass(frozen=True)
class SetStatus:
    """One view of one label set; rate and time left come from the commits of the last ten minutes."""

    name: str
    view: int
    labelled: int
    rejected: dict[str, int]
    planned: int | None
    clips_per_s: float | None
    left_s: float | None

    def cells(self) -> Sequence[str]:
        reasons = ", ".join(f"{count} {kind}" for kind, count in self.rejected.items()) or "0"
        rate = "-" if self.clips_per_s is None else f"{self.clips_per_s:.1f}"
        left = "-" if self.left_s is None else f"{self.left_s / 60:.1f} min"
        return self.name, str(self.view), str(self.labelled), reasons, "?" if self.planned is None else str(self.planned), rate, left


def store_status(store: str, now_s: float) -> list[SetStatus]:
    """Every view of every label set. Raises ConfigError when the folder is no store."""
    names = [name for name in files.list_names(store) if files.exists(files.join(store, name, DOCUMENT))]
    if not names:
        raise ConfigError("no label sets here", where=store, action="vkd label RUN makes them, or name another store")
    return [_status(files.join(store, name), view, now_s) for name in names for view in LabelSet.at(files.join(store, name)).views()]


def note_planned(label_set_uri: str, num_examples: int) -> None:
    """Record how many clips a view of the set is to have, for the time left."""
    files.put(files.join(label_set_uri, PLANNED), json.dumps({"num_examples": num_examples}).encode())


def _status(uri: str, view: int, now_s: float) -> SetStatus:
    label_set = LabelSet.at(uri)
    summary = label_set.summary(view)
    done = summary.num_labelled + summary.num_rejected
    planned = _planned(uri)
    recent = [time_s for time_s in label_set.newest_times() if now_s - time_s < RATE_WINDOW_S]
    rate = None
    if len(recent) > 1 and recent[-1] > recent[0]:
        rate = (len(recent) - 1) * done / summary.num_chunks / (recent[-1] - recent[0])
    left_s = max(planned - done, 0) / rate if planned is not None and rate else None
    return SetStatus(label_set.spec.name, view, summary.num_labelled, dict(summary.rejects), planned, rate, left_s)


def _planned(uri: str) -> int | None:
    try:
        planned = files.read_json(files.join(uri, PLANNED), ("num_examples",))["num_examples"]
    except FileNotFoundError:
        return None
    return planned if isinstance(planned, int) else None
