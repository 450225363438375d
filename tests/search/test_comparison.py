"""Batched scores of stored codes against one pair at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from search.corpora import networks, regions

from vkd.search import comparison
from vkd.search.packed import unpack


@pytest.mark.parametrize("kind", ["binary", "attention", "plain"])
def test_scores_are_those_of_exact_whatever_the_lengths_and_order(kind: str) -> None:
    nets = networks(kind)
    codes = [nets.index(regions(length, seed)).fine for seed, length in enumerate((7, 30, 4, 7, 9, 30, 1, 7))]
    found = comparison.scores(nets.fine, codes[0], codes)
    floats = [unpack(code).float() if kind == "binary" else torch.from_numpy(code).float() for code in codes]
    plain = copy.deepcopy(nets.fine).to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        expected = [float(plain.exact(floats[0], target)) for target in floats]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert len(set(np.round(expected, 4))) > 4


def test_more_maps_than_fit_at_once_and_targets_of_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = networks()
    codes = [nets.index(regions(8, seed)).fine for seed in range(5)]
    together = comparison.scores(nets.fine, codes[0], codes)
    monkeypatch.setattr(comparison, "BATCH_CELLS", 130)
    assert comparison.scores(nets.fine, codes[0], codes) == pytest.approx(together, abs=1e-6)
    long = np.concatenate([codes[1]] * 300)
    with torch.inference_mode():
        expected = float(nets.fine.exact(unpack(codes[0]).float(), unpack(long).float()))
    assert comparison.scores(nets.fine, codes[0], [long]).tolist() == [pytest.approx(expected, abs=1e-6)]
