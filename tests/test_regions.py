"""Sequences of region features: which frames are seen, how videos are padded and batched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.regions import augmented_frames, collate, tiled


class Drawn(np.random.Generator):
    """A generator that draws what it is told."""

    def __init__(self, kind: float, window: int = 0, keeps: list[float] | None = None, order: list[int] | None = None) -> None:
        super().__init__(np.random.PCG64())
        self.kind, self.window, self.keeps, self.order = kind, window, keeps, order

    def random(self, size: int | None = None) -> object:  # type: ignore[override]
        return self.kind if size is None else np.array(self.keeps)

    def integers(self, low: int, high: int) -> int:  # type: ignore[override]
        assert (low, high) == (4, 16)
        return self.window

    def shuffle(self, windows: np.ndarray) -> None:  # type: ignore[override]
        windows[:] = windows[self.order]


def seen(num_frames: int, kind: float, **drawn: Any) -> list[int]:
    return augmented_frames(num_frames, Drawn(kind, **drawn)).tolist()


@pytest.mark.parametrize("length", range(1, 10))
def test_short_videos_are_doubled(length: int) -> None:
    video = torch.arange(length).float()[:, None, None].expand(-1, 2, 3)
    long = tiled(video)
    assert len(long) == {1: 4, 2: 4, 3: 6}.get(length, length)
    assert long[:, 0, 0].tolist() == [i % length for i in range(len(long))]


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="reject"):
        tiled(torch.zeros(0, 9, 4))


def test_each_kind_of_augmentation() -> None:
    ten = list(range(10))
    assert seen(10, 0.05, window=4, keeps=[0.9, 0.3, 0.31]) == [0, 1, 2, 3, 8, 9, 0, 1]
    assert seen(10, 0.05, window=4, keeps=[0.1, 0.2, 0.0]) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]  # never all
    assert seen(10, 0.15, window=5, order=[1, 0]) == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert seen(9, 0.15, window=15, order=[0]) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5]
    assert seen(10, 0.2) == [0, 2, 4, 6, 8]
    assert seen(10, 0.3) == [i // 2 for i in range(20)]
    assert seen(149, 0.39) == [i // 2 for i in range(298)]
    assert seen(150, 0.39) == list(range(150))
    assert seen(10, 0.4) == ten[::-1]
    assert seen(10, 0.5) == seen(10, 0.99) == ten
    assert seen(8, 0.4) == list(range(8))
    assert seen(1000, 0.99) == list(range(300))
    assert seen(1000, 0.45) == list(range(999, 699, -1))


@given(st.integers(1, 400), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_augmentation_keeps_to_the_video(num_frames: int, seed: int) -> None:
    frames = augmented_frames(num_frames, np.random.default_rng(seed))
    assert 1 <= len(frames) <= 300
    assert set(frames.tolist()) <= set(range(num_frames))
    assert np.array_equal(frames, augmented_frames(num_frames, np.random.default_rng(seed)))


def test_windows_under_a_fixed_generator() -> None:
    """What a run draws, a later version must draw again: of windows of 6 the third is dropped, two of 13 change places."""
    dropped, shuffled = (augmented_frames(20, np.random.default_rng(seed)).tolist() for seed in (3, 11))
    assert dropped == [*range(12), 18, 19, 0, 1, 2, 3]
    assert shuffled == [*range(13, 20), *range(6), *range(13)]


def test_half_of_the_videos_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    same = [np.array_equal(augmented_frames(200, rng), np.arange(200)) for _ in range(2000)]
    assert 0.56 < np.mean(same) < 0.64  # of 200 frames slow motion is none


def test_collate() -> None:
    videos = [torch.full((length, 2, 3), float(length)) for length in (2, 4, 1)]
    regions, mask = collate(videos)
    assert regions.shape == (3, 4, 2, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert regions[:, :, 1, 2].tolist() == [[2, 2, 0, 0], [4, 4, 4, 4], [1, 0, 0, 0]]
