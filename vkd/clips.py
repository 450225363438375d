"""What part of space-time is looked at: spans, views and samplings, all pure functions of data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vkd import schema
from vkd.errors import ManifestError

Decoding = Literal["exact", "keyframe"]
MAX_DURATION_S = 7 * 86400.0  # of one video; what claims more is taken for damage


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClipPlan(_Config):
    """How a video is cut into clips: the whole of it, windows of `length_s` every `stride_s`, or `count` equal parts."""

    plan: Literal["whole", "windows", "count"] = "whole"
    length_s: float | None = Field(default=None, gt=0)
    stride_s: float | None = Field(default=None, gt=0)
    count: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _complete(self) -> ClipPlan:
        if self.plan == "windows" and self.length_s is None:
            raise ValueError("plan: windows needs length_s")
        if self.plan == "count" and self.count is None:
            raise ValueError("plan: count needs count")
        return self

    def spans_s(self, duration_s: float | None) -> list[tuple[float, float | None]]:
        """(start, end) of each clip in seconds; end None means the end of the video.

        A video shorter than one window gives one clip, all of it; so does an impossible duration, and decoding rejects that.
        """
        impossible = duration_s is not None and not 0 <= duration_s <= MAX_DURATION_S
        if self.plan == "whole" or (self.plan == "count" and self.count == 1) or impossible:
            return [(0.0, duration_s)]
        if duration_s is None:
            raise ManifestError(f"clips.plan {self.plan} needs duration_s", action="vkd manifest SOURCE OUT --probe header")
        if self.plan == "count":
            edges = np.linspace(0.0, duration_s, (self.count or 1) + 1)
            return [(float(a), float(b)) for a, b in pairwise(edges)]
        length_s = self.length_s or duration_s
        stride_s = self.stride_s or length_s
        num_clips = 1 + max(0, int(np.floor((duration_s - length_s) / stride_s + 1e-9)))
        return [(i * stride_s, min(i * stride_s + length_s, duration_s)) for i in range(num_clips)]


class SplitPlan(_Config):
    """Which clips are held out: none, those that a column names, the last part of each video, or whole groups of videos."""

    by: Literal["none", "column", "time", "group"] = "none"
    holdout: float = Field(default=0.25, gt=0, lt=1)
    gap_s: float = Field(default=0.0, ge=0)
    group: str = schema.VIDEO_ID
    seed: int = 0


class Sampling(_Config):
    """How one model looks at a view: which frames of the span, and how large."""

    num_frames: int = Field(default=8, ge=1)
    size_px: int = Field(default=224, ge=8)
    mode: Literal["uniform", "fps", "segment_random"] = "uniform"
    fps: float | None = Field(default=None, gt=0)
    resize: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _complete(self) -> Sampling:
        if (self.mode == "fps") != (self.fps is not None):
            raise ValueError("fps is given exactly when mode is fps")
        return self

    def timestamps_s(self, start_s: float, end_s: float, key: str) -> Float[np.ndarray, " num_frames"]:
        """Ascending timestamps in [start, end): segment centres, a fixed rate from the start, or one random point a segment."""
        span_s = max(end_s - start_s, 0.0)
        if self.mode == "fps":
            times_s = start_s + np.arange(self.num_frames) / (self.fps or 1.0)
            return np.minimum(times_s, np.nextafter(end_s, start_s)) if span_s > 0 else np.full(self.num_frames, start_s)
        within = uniform_numbers(key, self.num_frames) if self.mode == "segment_random" else np.full(self.num_frames, 0.5)
        times: Float[np.ndarray, " num_frames"] = start_s + (np.arange(self.num_frames) + within) / self.num_frames * span_s
        return times


@dataclass(frozen=True)
class View:
    """A crop box in [0, 1] of the region (left, top, right, bottom), a flip, and how frames are sought."""

    region: Literal["square", "frame"] = "square"
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False
    decoding: Decoding = "exact"

    def box_px(self, width_px: int, height_px: int) -> tuple[float, float, float, float]:
        """The crop in pixels of a frame; `square` is the largest centred square."""
        side = min(width_px, height_px)
        region_w, region_h = (side, side) if self.region == "square" else (width_px, height_px)
        x0, y0 = (width_px - region_w) / 2, (height_px - region_h) / 2
        left, top, right, bottom = self.crop
        return x0 + left * region_w, y0 + top * region_h, x0 + right * region_w, y0 + bottom * region_h


class ViewPolicy(_Config):
    """How views are drawn: view 0 is the whole region, later ones are random crops and flips."""

    region: Literal["square", "frame"] = "square"
    min_scale: float = Field(default=0.5, gt=0, le=1)
    flip: bool = True
    decoding: Decoding = "exact"
    seed: int = 0

    def view(self, example_id: str, index: int) -> View:
        """View `index` of an example: the same on every machine, whatever the number of views."""
        if index == 0:
            return View(self.region, decoding=self.decoding)
        scale, x, y, coin = uniform_numbers(f"view/{self.seed}/{example_id}/{index}", 4)
        side = float(np.sqrt(self.min_scale + (1 - self.min_scale) * scale))
        left, top = float(x * (1 - side)), float(y * (1 - side))
        return View(self.region, (left, top, left + side, top + side), bool(self.flip and coin < 0.5), self.decoding)


@dataclass(frozen=True)
class Clip:
    """One view of one example: all that decoding needs to know besides the sampling.

    `end_s` None means the end of the video; `key` seeds random sampling.
    """

    uri: str
    start_s: float
    end_s: float | None
    view: View
    key: str


def uniform_numbers(key: str, count: int) -> Float[np.ndarray, " count"]:
    """`count` numbers in [0, 1), a pure function of the key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(seed)).random(count)


def plan_examples(videos: pa.Table, plan: ClipPlan) -> pa.Table:
    """One row per clip of each video, in manifest order; other columns of the video pass through.

    A manifest that has its own `start_s`/`end_s` (moments) keeps them: each row is one example.
    """
    _check_videos(videos)
    if schema.START_S in videos.column_names:
        spans = [[span] for span in zip(videos[schema.START_S].to_pylist(), videos[schema.END_S].to_pylist(), strict=True)]
    else:
        spans = [plan.spans_s(duration_s) for duration_s in videos[schema.DURATION_S].to_pylist()]
    rows = np.repeat(np.arange(len(spans)), [len(s) for s in spans])
    table = videos.take(pa.array(rows, pa.int64()))
    # floats, whatever the manifest's type: ids hash their text, and 2 and 2.0 are one moment
    starts_s = [float(a) for s in spans for a, _ in s]
    ends_s = [None if b is None else float(b) for s in spans for _, b in s]
    video_ids = table[schema.VIDEO_ID].to_pylist()
    ids = [schema.digest(v, a, b, num_chars=24) for v, a, b in zip(video_ids, starts_s, ends_s, strict=True)]
    new: dict[str, Any] = {
        schema.EXAMPLE_ID: pa.array(ids, pa.string()),
        schema.START_S: pa.array(starts_s, pa.float64()),
        schema.END_S: pa.array(ends_s, pa.float64()),
    }
    kept = [name for name in table.column_names if name not in new]
    return pa.table(new | {name: table[name] for name in kept})


def _check_videos(videos: pa.Table) -> None:
    """Raises ManifestError for rows that our manifests cannot have: one written by hand may hold anything."""
    if videos.num_rows == 0:
        return
    spans = (schema.START_S, schema.END_S) if schema.START_S in videos.column_names else (schema.DURATION_S,)
    kinds = {schema.VIDEO_ID: pa.types.is_string, **dict.fromkeys(spans, _is_number)}
    kinds |= {schema.URI: pa.types.is_string} if schema.URI in videos.column_names else {}
    for name, fits in kinds.items():
        there = name in videos.column_names
        empty = there and name not in (schema.DURATION_S, schema.END_S) and videos[name].null_count
        if not there or empty or not fits(videos[name].type):
            what = f"the column {name!r} {'is absent' if not there else 'has empty rows' if empty else f'is {videos[name].type}'}"
            raise ManifestError(what, where="manifest", action="build the manifest with vkd manifest SOURCE OUT")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def assign_splits(examples: pa.Table, plan: SplitPlan) -> list[str]:
    """`train`, `val` or `gap` of each example; the gap is used by neither side."""
    if plan.by == "none":
        return [schema.TRAIN] * examples.num_rows
    if plan.by == "column":
        _require(examples, schema.SPLIT, plan)
        return [_known_split(value) for value in examples[schema.SPLIT].to_pylist()]
    if plan.by == "group":
        _require(examples, plan.group, plan)
        return [_group_split(str(value), plan) for value in examples[plan.group].to_pylist()]
    columns = (examples[name].to_pylist() for name in (schema.START_S, schema.END_S, schema.DURATION_S))
    return [_time_split(start_s, end_s, duration_s, plan) for start_s, end_s, duration_s in zip(*columns, strict=True)]


def _known_split(name: str | None) -> str:
    if name in (None, schema.TRAIN, schema.VAL, schema.GAP):
        return name or schema.TRAIN
    if name in ("valid", "validation", "test", "holdout"):
        return schema.VAL
    raise ManifestError(f"split {name!r} is unknown", where="data.split", action="name splits train, val or gap in the manifest")


def _group_split(group: str, plan: SplitPlan) -> str:
    return schema.VAL if uniform_numbers(f"split/{plan.seed}/{group}", 1)[0] < plan.holdout else schema.TRAIN


def _time_split(start_s: float, end_s: float | None, duration_s: float | None, plan: SplitPlan) -> str:
    if duration_s is None or end_s is None:
        raise ManifestError("data.split.by time needs duration_s", action="vkd manifest SOURCE OUT --probe header")
    boundary_s = (1 - plan.holdout) * duration_s
    if start_s >= boundary_s - 1e-9:
        return schema.VAL
    return schema.TRAIN if end_s <= boundary_s - plan.gap_s + 1e-9 else schema.GAP


def _require(examples: pa.Table, column: str, plan: SplitPlan) -> None:
    if column not in examples.column_names:
        raise ManifestError(
            f"data.split.by {plan.by} needs the column {column!r}; it has {', '.join(examples.column_names)}",
            action="build the manifest from a table that has it, or change data.split",
        )
