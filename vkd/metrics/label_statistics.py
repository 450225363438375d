"""What a teacher's labels look like as a whole: their norm, their entropy, how often different clips get the same label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Num

Statistics = dict[str, float]


def label_statistics(rows: Num[np.ndarray, "n d"], inputs: Sequence[bytes], *, logits: bool) -> Statistics:
    """Of at least one row: `clips`, mean and deviation of the norm, share of `duplicates`, and for logits the mean entropy.

    Duplicates are rows that equal another one though their `inputs` differ; rows of the same input count once.
    """
    values = rows.astype(np.float64)
    norms = np.linalg.norm(values, axis=1)
    different = {key: row.tobytes() for key, row in zip(inputs, rows, strict=True)}
    found = {
        "clips": float(len(rows)),
        "norm_mean": float(norms.mean()),
        "norm_std": float(norms.std()),
        "distinct": float(len(different)),
        "duplicates": 1.0 - len(set(different.values())) / len(different) if len(different) > 1 else 0.0,
    }
    return found | ({"entropy_nats": float(_entropy_nats(values).mean())} if logits else {})


def pooled(a: Mapping[str, float], b: Mapping[str, float]) -> Statistics:
    """The statistics of two sets of rows together; duplicates are those within each set."""
    clips, distinct = a["clips"] + b["clips"], a["distinct"] + b["distinct"]
    share = b["clips"] / clips
    found = {name: (1 - share) * a[name] + share * b[name] for name in ("norm_mean", "entropy_nats") if name in a}
    variance = (1 - share) * a["norm_std"] ** 2 + share * b["norm_std"] ** 2 + share * (1 - share) * (a["norm_mean"] - b["norm_mean"]) ** 2
    duplicates = (a["duplicates"] * a["distinct"] + b["duplicates"] * b["distinct"]) / distinct
    return found | {"clips": clips, "norm_std": float(np.sqrt(variance)), "distinct": distinct, "duplicates": duplicates}


class Spread:
    """How far rows lie from their mean. Takes rows as they come; exact also where they hardly differ (Welford's way)."""

    def __init__(self) -> None:
        self._count, self._squares, self._deviations = 0, 0.0, 0.0
        self._mean = np.zeros(0)

    def add(self, rows: Num[np.ndarray, "n d"]) -> None:
        for row in rows.astype(np.float64):
            self._count += 1
            self._squares += float(row @ row)
            before = row - self._mean if self._count > 1 else np.zeros_like(row)
            self._mean = self._mean + before / self._count if self._count > 1 else row
            self._deviations += float(before @ (row - self._mean))

    @property
    def rms(self) -> float:
        """Root of the mean squared deviation, over all values."""
        return float(np.sqrt(self._deviations / max(1, self._count * self._mean.size)))

    @property
    def relative(self) -> float:
        """The deviation as a share of the rows' length: 0 when all rows are equal."""
        return float(np.sqrt(self._deviations / self._squares)) if self._squares else 0.0


def _entropy_nats(logits: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Of the softmax of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    entropy: Float[np.ndarray, " n"] = np.log(total) - (weights * shifted).sum(axis=1) / total
    return entropy
