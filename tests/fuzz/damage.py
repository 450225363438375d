"""Damaged videos from real ones, the same for the same seed: what storage, networks, broken writers and attackers leave behind."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

Random = np.random.Generator
HUGE_PX = 30_000
ENCODINGS = (
    (".webm", "libvpx-vp9"),
    (".mkv", "libvpx"),
    (".mov", "mjpeg"),
    (".m2ts", "mpeg2video"),
    (".flv", "libx264"),
    (".mkv", "libx265"),
)
BOXES = (b"moov", b"mvhd", b"trak", b"tkhd", b"mdia", b"mdhd", b"minf", b"stbl", b"stsd", b"stts", b"stsz", b"stsc", b"stco", b"mdat")
SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".wmv", ".flv", ".m2ts", ".3gp", ".ogv")


def write_sources(clips: Sequence[Path], folder: Path) -> list[Path]:
    """The clips themselves, and half a second of each in other containers and codecs."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(clips)
    for number, (suffix, codec) in enumerate(ENCODINGS):
        found.append(_encoded(clips[number % len(clips)], folder / f"{number}_{codec}{suffix}", codec))
    return found


def _encoded(source: Path, target: Path, codec: str, num_frames: int = 15) -> Path:
    options = {"threads": "1"} | ({"x265-params": "log-level=none"} if codec == "libx265" else {})
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index, frame in zip(range(num_frames), old.decode(video=0), strict=False):
            small = frame.reformat(96, 64, stream.pix_fmt)
            small.pts, small.time_base = index, Fraction(1, 25)
            small.pict_type = av.video.frame.PictureType.NONE
            new.mux(stream.encode(small))
        new.mux(stream.encode(None))
    return target


def write_damaged(sources: Sequence[Path], folder: Path, count: int, seed: int = 0) -> list[Path]:
    """`count` files in `folder`; their names tell the damage. Every kind is made of every source before one is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    contents, kinds = [source.read_bytes() for source in sources], list(DAMAGES)
    written = []
    for number in range(count):
        kind, source = kinds[number % len(kinds)], (number // len(kinds)) % len(sources)
        rng = np.random.default_rng([seed, number])
        suffix = str(rng.choice(SUFFIXES)) if kind == "wrong_extension" else sources[source].suffix
        path = folder / f"{number:05d}_{kind}{suffix}"
        path.write_bytes(DAMAGES[kind](contents[source], rng))
        written.append(path)
    return written


def _truncated(data: bytes, rng: Random) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def _without_start(data: bytes, rng: Random) -> bytes:
    return data[int(rng.integers(1, len(data))) :]


def _flipped(data: bytes, rng: Random, end: int | None = None) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, end or len(data), int(rng.integers(1, 200))).tolist():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _header_flipped(data: bytes, rng: Random) -> bytes:
    return _flipped(data, rng, end=min(len(data), 1024))


def _random_span(data: bytes, rng: Random) -> tuple[int, int]:
    start, end = sorted(rng.integers(0, len(data), 2).tolist())
    return start, end


def _zeroed(data: bytes, rng: Random) -> bytes:
    start, end = _random_span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def _noise_inside(data: bytes, rng: Random) -> bytes:
    start, end = _random_span(data, rng)
    return data[:start] + rng.bytes(end - start) + data[end:]


def _cut_out(data: bytes, rng: Random) -> bytes:
    start, end = _random_span(data, rng)
    return data[:start] + data[end:]


def _repeated_span(data: bytes, rng: Random) -> bytes:
    start, end = _random_span(data, rng)
    return data[:end] + data[start:end] + data[end:]


def _swapped(data: bytes, rng: Random) -> bytes:
    """Two boxes of an mp4 in the other order, or in other containers two spans."""
    boxes = top_boxes(data)
    if len(boxes) > 1:
        first, second = sorted(rng.choice(len(boxes), 2, replace=False).tolist())
        boxes[first], boxes[second] = boxes[second], boxes[first]
        return b"".join(data[start:end] for start, end in boxes)
    a, b, c = sorted(rng.integers(0, len(data), 3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _renamed_box(data: bytes, rng: Random) -> bytes:
    here = [name for name in BOXES if name in data]
    return data.replace(here[int(rng.integers(len(here)))], b"free", 1) if here else _header_flipped(data, rng)


def _empty(data: bytes, rng: Random) -> bytes:
    return b""


def _random_bytes(data: bytes, rng: Random) -> bytes:
    return data[: int(rng.integers(64))] + rng.bytes(int(rng.integers(1, 40_000)))


def _error_page(data: bytes, rng: Random) -> bytes:
    return b"<html><head><title>404 Not Found</title></head><body>" + b"sorry " * int(rng.integers(500)) + b"</body></html>"


def _joined(data: bytes, rng: Random) -> bytes:
    return data[: len(data) // 2] + data


def _wrong_extension(data: bytes, rng: Random) -> bytes:
    return data


def _huge_size(data: bytes, rng: Random) -> bytes:
    """A box, RIFF chunk or other element that claims to be larger than any file."""
    here = [name for name in (*BOXES, b"RIFF", b"hdrl", b"movi", b"idx1") if name in data]
    if not here:
        return _stomped(data, int(rng.integers(4, min(len(data), 512))), b"\xff" * 4)
    name = here[int(rng.integers(len(here)))]
    place, is_riff = data.index(name), name in (b"RIFF", b"idx1")
    return _stomped(data, place + 4 if is_riff else place - 4, bytes(rng.choice([0xFF, 0x7F, 0x00], 1).astype(np.uint8)) + b"\xff\xff\xff")


def _huge_count(data: bytes, rng: Random) -> bytes:
    """A table that claims to have billions of entries."""
    here = [name for name in (b"stts", b"stsz", b"stsc", b"stco", b"stss", b"ctts", b"elst") if name in data]
    if not here:
        return _stomped(data, int(rng.integers(4, min(len(data), 512))), b"\x7f\xff\xff\xff")
    name = here[int(rng.integers(len(here)))]
    return _stomped(data, data.index(name) + (12 if name == b"stsz" else 8), b"\x7f\xff\xff\xf0")


def declared_duration(data: bytes, duration_s: float) -> bytes:
    """An mp4 whose headers (version 0) and table of times claim a duration; what the frames say of it is left as it is."""
    for name, scale_at, length_at in ((b"mvhd", 16, 20), (b"mdhd", 16, 20), (b"tkhd", None, 24)):
        place, scale = data.find(name), 1000
        while place > 0:
            if scale_at is not None:
                (scale,) = struct.unpack(">I", data[place + scale_at : place + scale_at + 4])
            ticks = min(int(duration_s * scale), 2**32 - 2)
            data = _stomped(data, place + length_at, struct.pack(">I", ticks))
            place = data.find(name, place + 4)
    return data


def _long(data: bytes, rng: Random) -> bytes:
    if b"mvhd" in data:
        data = data.replace(b"elst", b"free")  # an edit list would bound it
        data = declared_duration(data, float(rng.choice([1e4, 1e6, 1e9])))
        if rng.integers(2):  # a few ticks a second: as long as the field can say
            data = _stomped(data, data.index(b"mdhd") + 16, struct.pack(">I", int(rng.choice([0, 1, 2**32 - 1]))))
        return data
    if b"avih" in data:  # microseconds a frame, number of frames
        data = _stomped(data, data.index(b"avih") + 8, struct.pack("<I", int(rng.choice([0, 2**31 - 1, 2**32 - 1]))))
        return _stomped(data, data.index(b"avih") + 24, struct.pack("<I", 2**32 - 1))
    place = data.find(b"\x44\x89\x88")  # Matroska's Duration, a float64
    return (
        _header_flipped(data, rng) if place < 0 else _stomped(data, place + 3, struct.pack(">d", float(rng.choice([1e12, 1e300, np.nan]))))
    )


def _long_table(data: bytes, rng: Random) -> bytes:
    """Frames that the table of times lays hours apart."""
    place = data.find(b"stts")
    return _long(data, rng) if place < 0 else _stomped(data, place + 16, struct.pack(">I", int(rng.choice([10**6, 10**9, 2**32 - 1]))))


def _large(data: bytes, rng: Random) -> bytes:
    """A container that claims large frames."""
    for name, places, form in ((b"tkhd", (80, 84), ">I"), (b"avc1", (28, 30), ">H"), (b"avih", (40, 44), "<I"), (b"strf", (12, 16), "<I")):
        place = data.find(name)
        for offset in places if place > 0 else ():
            data = _stomped(data, place + offset, struct.pack(form, HUGE_PX << 16 if name == b"tkhd" else HUGE_PX))
    place = data.find(b"\xb0\x81")  # Matroska's PixelWidth of one byte
    return data if place < 0 else _stomped(data, place, b"\xb0\x81\xff")


def _large_bitstream(data: bytes, rng: Random) -> bytes:
    return large_jpeg(data) if b"\xff\xc0\x00\x11" in data else _large(data, rng)


def large_jpeg(data: bytes, px: int = HUGE_PX) -> bytes:
    """A Motion JPEG whose container tells the truth and whose every frame claims 30000 x 30000 px."""
    place = data.find(b"\xff\xc0\x00\x11")
    while place > 0:
        data = _stomped(data, place + 5, struct.pack(">HH", px, px))
        place = data.find(b"\xff\xc0\x00\x11", place + 9)
    return data


def top_boxes(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of the outermost boxes of an mp4; empty when it is none."""
    found, start = [], 0
    while start + 8 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size < 8 or not data[start + 4 : start + 8].isalnum():
            return []
        found.append((start, min(start + size, len(data))))
        start += size
    return found


def _stomped(data: bytes, place: int, new: bytes) -> bytes:
    place = max(place, 0)
    return data[:place] + new + data[place + len(new) :] if place + len(new) <= len(data) else data


DAMAGES: dict[str, Callable[[bytes, Random], bytes]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "header_flipped": _header_flipped,
    "zeroed": _zeroed,
    "swapped": _swapped,
    "huge_duration": _long,
    "huge_size": _huge_size,
    "huge_frames": _large,
    "huge_bitstream": _large_bitstream,
    "huge_count": _huge_count,
    "hours_apart": _long_table,
    "noise_inside": _noise_inside,
    "without_start": _without_start,
    "cut_out": _cut_out,
    "repeated_span": _repeated_span,
    "renamed_box": _renamed_box,
    "joined": _joined,
    "wrong_extension": _wrong_extension,
    "random_bytes": _random_bytes,
    "error_page": _error_page,
    "empty": _empty,
}


def smallest(corpus: Path) -> list[Path]:
    """The smallest clip of each kind of file in the corpus: damage of small files is quick to make and to decode."""
    found = ((corpus / folder).rglob(f"*{suffix}") for folder, suffix in (("wagon", ".mp4"), ("weizmann", ".avi"), ("asl", ".mkv")))
    return [min(paths, key=lambda path: (path.stat().st_size, path.name)) for paths in found]
