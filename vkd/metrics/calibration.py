"""How far a classifier's confidence is from how often it is right."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def expected_calibration_error(probs: Float[np.ndarray, "n c"], classes: Int[np.ndarray, " n"], num_bins: int = 10) -> float:
    """Mean over rows of |accuracy - confidence| of the row's bin, bins of equal width in (0, 1] (Guo et al. 2017)."""
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == classes
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = [abs(right[bins == i].mean() - confidence[bins == i].mean()) * (bins == i).mean() for i in np.unique(bins)]
    return float(sum(gaps))
