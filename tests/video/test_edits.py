"""What edits do to a frame."""

from __future__ import annotations

import numpy as np
import pytest
from video.clipmaker import counter_frame

from vkd.copies import Crop, Look, Overlay, Phone, Recompression
from vkd.video.edits import edit_of, fitted

FRAME = counter_frame(0b10110010, 160, 96)


def edited(look: Look, number: int = 0) -> np.ndarray:
    return edit_of(look, (160, 96))(FRAME, number)


def test_a_crop_keeps_a_corner_or_the_centre() -> None:
    assert np.array_equal(edited(Crop(0.75, 1.0, 0.0)), FRAME[:72, 40:])
    assert np.array_equal(edited(Crop(0.75, 0.5, 0.5)), FRAME[12:84, 20:140])


def test_an_overlay_hides_little_but_its_bars() -> None:
    plain = np.abs(edited(Overlay(0.0, "Some Words", 0.2, 0.3, 0.6)).astype(int) - FRAME) > 0
    assert 0.05 < plain.any(axis=2).mean() < 0.4
    barred = edited(Overlay(0.15, "Some Words", 0.2, 0.3, 0.6))
    assert not barred[:14].any()
    assert not barred[-14:, 80:].any()


def test_filming_shrinks_noises_and_shakes_as_its_seed_says() -> None:
    look = Phone((0.1,) * 8, 0.01, 1.0, 0.5, 5.0, 3)
    assert np.array_equal(edited(look), edited(look))
    assert not np.array_equal(edited(look), edited(look, 1))
    film = edited(look).astype(int)
    assert abs(film[:5].mean() - 22) < 5, "the border is what lies around the screen"
    small = edited(Phone((0.1,) * 8, 0.0, 1.0, 0.0, 0.0, 3))
    inside = fitted(FRAME, (128, 76)).astype(int)
    assert np.abs(small[10:86, 16:144] - inside).mean() < 15


def test_other_looks() -> None:
    assert edited(Recompression(0.5, 40)).shape == (48, 80, 3)
    assert edited(None) is FRAME


@pytest.mark.parametrize("size_px", [(160, 96), (100, 100), (48, 90)])
def test_fitting_keeps_the_aspect(size_px: tuple[int, int]) -> None:
    result = fitted(np.full((96, 160, 3), 200, np.uint8), size_px)
    assert result.shape == (size_px[1], size_px[0], 3)
    shown_px = min(size_px[0], 160 / 96 * size_px[1]) ** 2 * 96 / 160
    assert (result[:, :, 0] > 100).sum() == pytest.approx(shown_px, rel=0.05)
