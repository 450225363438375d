"""Near-duplicates of unlabelled videos: which edits each copy of a source gets, and what it truly shows. Pure; nothing is rendered here.

A source is known by its frames at a fixed rate, numbered from 0. The kinds of edit are those that users of video sites make
(Jiang et al., VCDB, ECCV 2014; Kordopatis-Zilos et al., FIVR, IEEE TMM 2019).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2

import numpy as np
from pydantic import Field, NonNegativeInt

from vkd import schema
from vkd.clips import uniform_numbers
from vkd.compute import Part, Place
from vkd.errors import ConfigError

SPLITS = (schema.TRAIN, schema.VAL, "test")
ORIGINAL, PARTIAL, DISTRACTOR = "original", "partial", "distractor"
# Columns. Two videos are no negatives for each other when one's family is the other's family or host, or when their hosts are one.
SOURCE, FAMILY, COPY, HOST = "source", "family", "copy", "host"
KINDS = ("crop", "speed", "reversal", "cuts", "recompression", "overlay", "phone")
MIN_SHARE, MAX_SHARE = 0.1, 0.4  # of a partial copy that shows its source
MIN_SPEED_OCTAVES, MAX_SPEED_OCTAVES = log2(1.2), 1.0
CORNERS = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # where what a crop keeps lies: the centre, or a corner
EDITION = 1  # of the edits: another one gives copies other names


class Copies(Part):
    """Copies of each video of `data.source`, rendered into `out`: `per_video` of each, the share `partial` of them partial.

    `split`: how many sources are for training, validation and test (none: the source's column `split`, else all for training).
    Only the first `max_length_s` of a video are copied, at `fps`, its shorter side made `side_px`. The videos of the folders
    `distractors` get no copies: they are more videos to search, in the split test.
    """

    out: Place
    per_video: int = Field(default=12, ge=0)
    partial: float = Field(default=0.5, ge=0, le=1)
    split: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = None
    seed: int = 0
    fps: float = Field(default=8.0, gt=0, le=60)
    side_px: int = Field(default=240, ge=32, le=1080)
    max_length_s: float = Field(default=20.0, ge=1)
    distractors: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """Folders of videos beside those of the source."""
        return (self.out, *self.distractors)

    @property
    def digest(self) -> str:
        """Of all that must stay the same while a manifest of copies grows."""
        return schema.digest(self.model_dump_json(exclude={"out", "per_video", "distractors"}), EDITION, num_chars=8)

    @property
    def max_frames(self) -> int:
        return max(1, int(self.fps * self.max_length_s))


@dataclass(frozen=True)
class Crop:
    """Keep this share of both sides; `x` and `y` say where: 0 left or top, 1 right or bottom."""

    side: float
    x: float
    y: float


@dataclass(frozen=True)
class Overlay:
    """Letterbox bars of this share of the height (or none), a box with text and a logo; places and `hue` in [0, 1)."""

    bars: float
    text: str
    x: float
    y: float
    hue: float


@dataclass(frozen=True)
class Phone:
    """Filmed from a screen: each corner (8 numbers) lies this share of the sides inside the picture, which shakes by `shake` of them."""

    corners: tuple[float, ...]
    shake: float
    gamma: float
    blur_px: float
    noise: float  # standard deviation, of 255
    seed: int


@dataclass(frozen=True)
class Recompression:
    """Sides made smaller by `scale`, encoded at a bad quality."""

    scale: float
    crf: int


Look = Crop | Overlay | Phone | Recompression | None


@dataclass(frozen=True)
class Pasted:
    """The part of a partial copy that shows the source, in frames: where it begins there, and in the source."""

    first: int
    source_first: int
    num_frames: int


@dataclass(frozen=True)
class Copy:
    """One copy. `shown`: frame by frame the number of the source's frame, or `~n` for frame n of the host. `look` edits the source's."""

    source: str
    number: int
    kind: str
    shown: tuple[int, ...]
    look: Look = None
    host: str | None = None
    pasted: Pasted | None = None

    def name(self, how: Copies) -> str:
        """A file name that no other copy has, nor this one rendered in another way."""
        digest = schema.digest(self, EDITION, how.fps, how.side_px, how.max_length_s, num_chars=8)
        return f"{key(self.source)}-{self.number:02d}-{self.kind}-{digest}.mp4"


def key(source: str) -> str:
    """A source's name as a file name."""
    stem = source.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return f"{re.sub('[^A-Za-z0-9_]+', '_', stem)[:40]}-{schema.digest(source, num_chars=8)}"


def splits(sources: Sequence[str], how: Copies) -> dict[str, str]:
    """The split of each source: a seeded shuffle, cut by the counts of `split`. Raises ConfigError when they do not add up."""
    counts = how.split or (len(sources), 0, 0)
    if sum(counts) != len(sources):
        what = f"{list(counts)} are {sum(counts)} sources, data.source has {len(sources)}"
        raise ConfigError(what, where="data.copies.split", action="say how many of them are for training, validation and test")
    names = [name for name, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    shuffled = sorted(sources, key=lambda source: schema.digest("split", how.seed, source))
    return dict(zip(shuffled, names, strict=True))


def plan(how: Copies, num_frames: Mapping[str, int], split_of: Mapping[str, str]) -> list[Copy]:
    """The copies of every source whose number of frames is known, by source and number. A partial one needs a host in the same split."""
    planned = []
    for source in sorted(num_frames):
        hosts = [other for other in num_frames if other != source and split_of[other] == split_of[source]]
        kinds = sorted(KINDS, key=lambda kind, source=source: schema.digest("kind", how.seed, source, kind))  # type: ignore[misc]
        for number in range(how.per_video):
            drawn = f"copies/{how.seed}/{source}/{number}"
            partial_before, partial = (int(how.partial * n + 1e-9) for n in (number, number + 1))
            if partial == partial_before:
                kind = kinds[(number - partial_before) % len(kinds)]
                planned.append(Copy(source, number, kind, _timeline(kind, num_frames[source], drawn), _look(kind, drawn)))
            elif hosts:
                host = max(hosts, key=lambda other, drawn=drawn: schema.digest(drawn, other))  # type: ignore[misc]
                planned.append(_partial(source, number, host, num_frames, how))
    return planned


def _timeline(kind: str, num_frames: int, drawn: str) -> tuple[int, ...]:
    """The frames that a copy of the whole source shows."""
    u = uniform_numbers(f"{drawn}/timeline", 2)
    if kind == "reversal":
        return tuple(range(num_frames))[::-1]
    if kind == "speed":
        octaves = (MIN_SPEED_OCTAVES + (MAX_SPEED_OCTAVES - MIN_SPEED_OCTAVES) * u[0]) * (1 if u[1] < 0.5 else -1)
        return tuple(int(i * 2**octaves) for i in range(max(1, ceil(num_frames / 2**octaves))) if int(i * 2**octaves) < num_frames)
    if kind == "cuts" and num_frames > 1:
        num_pieces = min(num_frames, 4 + int(4 * u[0]))
        num_dropped = max(1, round(num_pieces * (0.25 + 0.35 * u[1])))
        dropped = set(np.argsort(uniform_numbers(f"{drawn}/cuts", num_pieces))[:num_dropped].tolist())
        edges = np.linspace(0, num_frames, num_pieces + 1).astype(int).tolist()
        return tuple(i for piece in range(num_pieces) if piece not in dropped for i in range(edges[piece], edges[piece + 1]))
    return tuple(range(num_frames))


def _look(kind: str, drawn: str, mild: bool = False) -> Look:
    u = uniform_numbers(f"{drawn}/look", 16).tolist()
    if kind == "crop":
        x, y = CORNERS[int(len(CORNERS) * u[0])]
        return Crop(0.8 + 0.15 * u[1] if mild else 0.6 + 0.3 * u[1], x, y)
    if kind == "overlay":
        text = "".join(chr(ord("a") + int(26 * v)) if v < 0.85 else " " for v in uniform_numbers(f"{drawn}/text", 12))
        return Overlay(0.0 if mild or u[0] < 0.5 else 0.08 + 0.08 * u[1], text.title(), u[2], u[3], u[4])
    if kind == "phone":
        corners = tuple(0.01 + 0.09 * v for v in u[:8])
        return Phone(corners, 0.004 + 0.012 * u[8], 0.65 + 0.9 * u[9], 0.4 + 0.8 * u[10], 4 + 8 * u[11], int(u[12] * 2**32))
    return Recompression(0.3 + 0.3 * u[0], 36 + int(8 * u[1])) if kind == "recompression" else None


def _partial(source: str, number: int, host: str, num_frames: Mapping[str, int], how: Copies) -> Copy:
    """A part of the source between two parts of the host. The host is looped only where it is too short for the largest share."""
    drawn = f"copies/{how.seed}/{source}/{number}"
    u = uniform_numbers(f"{drawn}/partial", 6).tolist()
    here, there = num_frames[source], num_frames[host]
    num_shown = max(1, min(round((0.5 + 0.5 * u[0]) * here), int(MAX_SHARE * how.max_frames)))
    min_share = min(max(MIN_SHARE, num_shown / how.max_frames, num_shown / (num_shown + there)), MAX_SHARE)
    num_host = ceil(num_shown / (min_share + (MAX_SHARE - min_share) * u[1]) - 1e-9) - num_shown
    source_first = int(u[2] * (here - num_shown + 1))
    first = 1 + int(u[3] * (num_host - 1))
    host_first = int(u[4] * (max(there - num_host, 0) + 1))
    around = [~((host_first + i) % there) for i in range(num_host)]
    shown = (*around[:first], *range(source_first, source_first + num_shown), *around[first:])
    look = _look(("crop", "overlay", "plain")[int(3 * u[5])], drawn, mild=True)
    return Copy(source, number, PARTIAL, shown, look, host, Pasted(first, source_first, num_shown))
