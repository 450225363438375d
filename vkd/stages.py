"""What workers do to one chunk: decode it and commit what they made. Plain functions of data, without Ray; teaching.py has the teachers."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from vkd import schema
from vkd.clips import Clip, ViewPolicy
from vkd.errors import VideoError
from vkd.models import ModelSpec
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.schema import FRAMES, Columns
from vkd.store.labelset import ChunkRows, LabelSet, LabelSetSpec, Reject
from vkd.video import guard
from vkd.video.settings import Settings

ITEM, REJECT, STATS = "item", "reject", "stats"


class Item(NamedTuple):
    """One view of one chunk, and the label sets that lack it."""

    view: int
    chunk: Chunk
    lacks: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What every worker of one labelling execution needs to know."""

    plan: Plan
    views: ViewPolicy
    decoding: Settings
    store: str
    teachers: Mapping[str, ModelSpec]
    specs: Mapping[str, LabelSetSpec]
    column: Mapping[str, str]  # label set -> the column that holds its frames
    items: Sequence[Item]


def decode(job: Job, batch: Columns) -> Columns:
    """Decode one chunk once for all samplings; a video that cannot be used becomes rejected rows."""
    (number,) = batch[ITEM].tolist()
    item, started_s = job.items[number], time.process_time()
    examples = job.plan.examples(item.chunk).select([schema.EXAMPLE_ID, schema.URI, schema.START_S, schema.END_S]).to_pylist()
    frames = [np.zeros((len(examples), s.num_frames, s.size_px, s.size_px, 3), np.uint8) for s in job.decoding.samplings]
    rejects: dict[int, Reject] = {}
    clips = [clip_of(example, job.views, item.view) for example in examples]
    before_s = guard.here(job.decoding).cpu_s
    for row, decoded in enumerate(decode_or_reject(clips, job.decoding)):
        if isinstance(decoded, Reject):
            rejects[row] = decoded
            continue
        for column, clip in zip(frames, decoded, strict=True):
            column[row] = clip
    columns = {f"{FRAMES}.{i}": column for i, column in enumerate(frames)}
    if FRAMES_ALIAS in item.lacks:
        kept = {FRAMES_ALIAS: columns[job.column[FRAMES_ALIAS]]}
        commit(LabelSet.open(job.store, job.specs[FRAMES_ALIAS]), item, examples, rejects, kept)
    decode_s = time.process_time() - started_s + guard.here(job.decoding).cpu_s - before_s
    stats = {"decode_s": decode_s, "teach_s": {}, "fidelity": {}, "statistics": {}}
    return columns | {
        ITEM: np.full(len(examples), number),
        REJECT: np.array([json.dumps(asdict(rejects[i])) if i in rejects else "" for i in range(len(examples))]),
        STATS: np.array([json.dumps(stats)] * len(examples)),
    }


def decode_or_reject(clips: Sequence[Clip], settings: Settings) -> Iterator[list[np.ndarray] | Reject]:
    """Of each clip the frames for each sampling, or a Reject when the video cannot be used. The one place that takes VideoErrors."""
    child = guard.here(settings)
    for decoded in child.decode(clips):
        if isinstance(decoded, VideoError):
            decoder = settings.backend if settings.backend != "auto" else "pyav"  # which has the last word
            yield Reject("decode", decoded.kind, str(decoded), decoded.permanent, child.attempts, decoder)
        else:
            yield decoded


def clip_of(example: Mapping[str, Any], views: ViewPolicy, view: int) -> Clip:
    """View `view` of an example (a row of the plan), ready to decode."""
    example_id = example[schema.EXAMPLE_ID]
    key = f"{views.seed}/{example_id}/{view}"
    return Clip(example[schema.URI], example[schema.START_S], example[schema.END_S], views.view(example_id, view), key)


def commit(label_set: LabelSet, item: Item, examples: Sequence[Mapping[str, Any]], rejects: Mapping[int, Reject], labels: Columns) -> None:
    rows = ChunkRows([example[schema.EXAMPLE_ID] for example in examples], rejects, labels)
    label_set.write(item.view, item.chunk, rows, num_rows=len(examples))


def recorded() -> dict[str, str]:
    """Facts that are recorded with a label set but not hashed."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "av", "decord2")}
    return versions | {"python": platform.python_version()}


def device() -> str:
    """`cuda` where this process has a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
