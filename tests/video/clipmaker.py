"""Small clips whose frames show their own index, for tests of decoding."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH_PX, HEIGHT_PX = 96, 64
TICKS_PER_S = 1000


def counter_frame(index: int, width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX) -> np.ndarray:
    """A noisy frame of 2 x 4 dark or bright blocks: the 8 bits of `index`, most significant first."""
    bits = (index >> np.arange(7, -1, -1)) & 1
    grey = np.kron(bits.reshape(2, 4), np.ones((height_px // 2, width_px // 4), int)) * 180 + 38
    grey += np.random.default_rng(index).integers(-20, 21, grey.shape)
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.uint8)


def index_of(frame: np.ndarray) -> int:
    """The index that a decoded (and resized) counter frame shows."""
    rows, columns = frame.shape[0] // 4, frame.shape[1] // 8
    bits = frame[rows :: 2 * rows, columns :: 2 * columns].mean(axis=2)[:2, :4] > 128
    return int(np.packbits(bits.reshape(-1))[0])


def make_clip(
    path: Path,
    times_s: Sequence[float],
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    size_px: tuple[int, int] = (WIDTH_PX, HEIGHT_PX),
) -> Path:
    """A clip of one counter frame per presentation time, without sound.

    The container follows the suffix. x264 defaults: no B-frames, a keyframe every 10 frames.
    """
    defaults = {"libx264": {"bf": "0", "g": "10", "sc_threshold": "0", "preset": "ultrafast"}}
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=defaults.get(codec, {}) | (options or {}))
        stream.width, stream.height = size_px
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS_PER_S)
        stream.time_base = Fraction(1, TICKS_PER_S)
        for index, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(counter_frame(index, *size_px), format="rgb24")
            frame.pts, frame.time_base = round(time_s * TICKS_PER_S), Fraction(1, TICKS_PER_S)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def make_sound(path: Path, duration_s: float = 1.0) -> Path:
    """A file that has sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, int(duration_s * 16000), 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rotate_mp4(path: Path, degrees_clockwise: int) -> None:
    """Patch the display matrix of an mp4 made here, as phones write it."""
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees_clockwise]
    one = 1 << 16
    plain = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", a * one, b * one, 0, -b * one, a * one, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    start = data.index(plain, data.index(b"tkhd"))
    path.write_bytes(data[:start] + turned + data[start + len(plain) :])


def cut(path: Path, fraction: float) -> Path:
    """Keep the first part of a file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def has_encoder(codec: str) -> bool:
    """Whether this build of FFmpeg writes the codec."""
    try:
        av.Codec(codec, "w")
    except av.FFmpegError:
        return False
    return True
