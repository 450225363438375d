"""What edits do to single frames: crop, overlay, filming from a screen, making smaller."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vkd.copies import Crop, Look, Overlay, Phone, Recompression

Frame = UInt8[np.ndarray, "height width 3"]
Edit = Callable[[Frame, int], Frame]  # of a frame, and its number in the copy

SURROUNDINGS = (24, 22, 20)  # what a phone sees around a screen


def edit_of(look: Look, size_px: tuple[int, int]) -> Edit:
    """The edit of frames of this (width, height)."""
    match look:
        case Crop():
            return _cropping(look, size_px)
        case Overlay():
            return _overlaying(look, size_px)
        case Phone():
            return _filming(look, size_px)
        case Recompression():
            small = (max(16, round(size_px[0] * look.scale)), max(16, round(size_px[1] * look.scale)))
            return lambda frame, number: np.asarray(Image.fromarray(frame).resize(small, Image.Resampling.BILINEAR))
        case None:
            return lambda frame, number: frame


def fitted(frame: Frame, size_px: tuple[int, int]) -> Frame:
    """The frame as large as it can be within (width, height), in black bars."""
    height_px, width_px = frame.shape[:2]
    if (width_px, height_px) == size_px:
        return frame
    scale = min(size_px[0] / width_px, size_px[1] / height_px)
    small = Image.fromarray(frame).resize((max(1, round(width_px * scale)), max(1, round(height_px * scale))), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", size_px)
    canvas.paste(small, ((size_px[0] - small.width) // 2, (size_px[1] - small.height) // 2))
    return np.asarray(canvas)


def _cropping(crop: Crop, size_px: tuple[int, int]) -> Edit:
    width_px, height_px = (max(16, round(side_px * crop.side)) for side_px in size_px)
    left, top = round((size_px[0] - width_px) * crop.x), round((size_px[1] - height_px) * crop.y)
    return lambda frame, number: frame[max(top, 0) : top + height_px, max(left, 0) : left + width_px]


def _overlaying(overlay: Overlay, size_px: tuple[int, int]) -> Edit:
    width_px, height_px = size_px
    picture = Image.new("RGBA", size_px)
    draw = ImageDraw.Draw(picture)
    bar_px, unit_px = round(overlay.bars * height_px), max(4, height_px // 12)
    if bar_px:
        draw.rectangle((0, 0, width_px, bar_px), fill=(0, 0, 0, 255))
        draw.rectangle((0, height_px - bar_px, width_px, height_px), fill=(0, 0, 0, 255))
    colour = Image.new("HSV", (1, 1), (int(256 * overlay.hue), 200, 230)).convert("RGB").getpixel((0, 0))
    assert isinstance(colour, tuple)
    font = ImageFont.load_default(unit_px)
    box_px = (round(draw.textlength(overlay.text, font)) + unit_px, 2 * unit_px)
    left, top = round(overlay.x * max(width_px - box_px[0], 0)), round(height_px * (0.55 + 0.3 * overlay.y))
    draw.rectangle((left, top, left + box_px[0], top + box_px[1]), fill=(*colour, 190))
    draw.text((left + unit_px // 2, top + unit_px // 2), overlay.text, fill=(255, 255, 255, 255), font=font)
    at_px = (unit_px // 2 if overlay.x < 0.5 else width_px - 3 * unit_px, bar_px + unit_px // 2)
    draw.ellipse(
        (*at_px, at_px[0] + 2 * unit_px, at_px[1] + 2 * unit_px), fill=(255, 255, 255, 220), outline=(*colour, 255), width=unit_px // 2
    )

    def overlay_on(frame: Frame, number: int) -> Frame:
        image = Image.fromarray(frame)
        image.paste(picture, mask=picture)
        return np.asarray(image)

    return overlay_on


def _filming(phone: Phone, size_px: tuple[int, int]) -> Edit:
    sides = np.array(size_px, float)
    screen = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * sides
    seen = screen + np.reshape(phone.corners, (4, 2)) * sides * [[1, 1], [-1, 1], [-1, -1], [1, -1]]
    gamma = (255 * (np.arange(256) / 255) ** phone.gamma).round().astype(np.uint8).tolist() * 3

    def film(frame: Frame, number: int) -> Frame:
        random = np.random.Generator(np.random.Philox([phone.seed, number]))
        wave = np.sin(number * np.array([0.9, 1.3]) + phone.seed % 7) + 0.5 * random.standard_normal(2)
        warp = _perspective(seen + phone.shake * sides * wave, screen)
        image = Image.fromarray(frame).transform(
            size_px, Image.Transform.PERSPECTIVE, warp, Image.Resampling.BILINEAR, fillcolor=SURROUNDINGS
        )
        image = image.point(gamma).filter(ImageFilter.GaussianBlur(phone.blur_px))
        noise = random.standard_normal((size_px[1], size_px[0], 1), np.float32) * np.float32(phone.noise)
        noisy: Frame = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
        return noisy

    return film


def _perspective(at: Float[np.ndarray, "4 2"], of: Float[np.ndarray, "4 2"]) -> tuple[float, ...]:
    """The 8 numbers by which Pillow finds, for each point of the result, the point of the picture: `at` becomes `of`."""
    rows, values = [], []
    for (x, y), (u, v) in zip(at, of, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return tuple(np.linalg.solve(np.array(rows), np.array(values)).tolist())
