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
    """How far rows lie from their mean, as a share of their length: 0 when all are equal. Takes rows as they come."""

    def __init__(self) -> None:
        self._count, self._mean_square = 0, 0.0
        self._mean: np.ndarray | None = None
        self._deviation = 0.0  # sum of squared distances from the mean

    def add(self, rows: Num[np.ndarray, "n d"]) -> None:
        for row in rows.astype(np.float64):
            self._count += 1
            self._mean_square += (float(row @ row) - self._mean_square) / self._count
            before = row if self._mean is None else row - self._mean
            self._mean = row if self._mean is None else self._mean + before / self._count
            self._deviation += float(before @ (row - self._mean))  # Welford: exact also where rows hardly differ

    @property
    def value(self) -> float:
        return float(np.sqrt(max(self._deviation, 0.0) / self._count / self._mean_square)) if self._mean_square else 0.0


def _entropy_nats(logits: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Of the softmax of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    entropy: Float[np.ndarray, " n"] = np.log(total) - (weights * shifted).sum(axis=1) / total
    return entropy
