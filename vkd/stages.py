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

from vkd import planning, schema
from vkd.clips import Clip, ViewPolicy
from vkd.errors import VideoError
from vkd.models import ModelSpec
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.schema import FRAMES, Columns
from vkd.store import forgotten
from vkd.store.labelset import ChunkRows, LabelSet, LabelSetSpec, Reject
from vkd.video import guard
from vkd.video.settings import Settings
from vkd.window import Key, Link

ITEM, REJECT, STATS = "item", "reject", "stats"
DECODE = "decode"
KEPT = Reject("retry", "kept", "not rejected before: stays as it is", permanent=True)  # marks a row, is never committed


class Item(NamedTuple):
    """One view of one chunk, and the label sets that lack it; or, in `redo`, each set's rejected rows that get another try."""

    view: int
    chunk: Chunk
    lacks: tuple[str, ...]
    redo: Mapping[str, tuple[int, ...]] | None = None
    round: int = 0  # of training, which is the first to read it


@dataclass(frozen=True)
class Job:
    """What every worker of one labelling execution needs to know."""

    plan: Plan
    views: ViewPolicy
    decoding: Settings
    store: str
    teachers: Mapping[str, ModelSpec]
    specs: Mapping[str, LabelSetSpec]
    column: Mapping[str, str]  # label set -> the column that holds its frames, if its teacher reads any
    items: Sequence[Item]
    num_views: int = 1  # item.view k shows what view k mod num_views shows
    link: Link | None = None  # to training, when that waits for what is committed
    columns: tuple[str, ...] = ()  # of the manifest, that some teacher needs


def decode(job: Job, batch: Columns) -> Columns:
    """Decode one chunk once for all samplings; a video that cannot be used becomes rejected rows. Without samplings nothing is decoded."""
    (number,) = batch[ITEM].tolist()
    item = job.items[number]
    if job.link is not None:
        job.link.wait_for_turn(item.round)
    started_s, clock_s = time.process_time(), time.monotonic()
    lacks = still_lacking(job, item)
    wanted = [schema.EXAMPLE_ID, schema.VIDEO_ID, schema.URI, schema.START_S, schema.END_S]
    planned = job.plan.examples(item.chunk)
    if not lacks:  # another driver was faster: one row tells the next stages so
        planned = planned.slice(0, 1)
    examples = planned.select([name for name in wanted if name in planned.column_names]).to_pylist()
    ids = [example[schema.EXAMPLE_ID] for example in examples]
    before_s = guard.here(job.decoding).cpu_s
    columns, rejects = _decoded(job, item, examples if lacks else [])
    if FRAMES_ALIAS in lacks:
        kept = {FRAMES_ALIAS: columns[job.column[FRAMES_ALIAS]]}
        commit(job, LabelSet.open(job.store, job.specs[FRAMES_ALIAS]), item, ChunkRows(ids, rejects, kept))
    decode_s = time.process_time() - started_s + guard.here(job.decoding).cpu_s - before_s
    busy_s = {DECODE: time.monotonic() - clock_s}
    stats = {"lacks": lacks, "decode_s": decode_s, "teach_s": {}, "busy_s": busy_s, "fidelity": {}, "statistics": {}}
    columns |= {carried(name): texts for name, texts in planning.text_columns(planned, job.columns).items()}
    return columns | {
        ITEM: np.full(len(examples), number),
        REJECT: np.array([json.dumps(asdict(rejects[i])) if i in rejects else "" for i in range(len(examples))]),
        STATS: np.array([json.dumps(stats)] * len(examples)),
    }


def carried(name: str) -> str:
    """How a manifest column is called on its way to the teachers."""
    return f"{schema.EXAMPLE}.{name}"


def still_lacking(job: Job, item: Item) -> list[str]:
    """The label sets that lack the item now: another driver may have been faster."""
    if item.redo is not None:
        return list(item.lacks)
    sets = {alias: LabelSet.find(job.store, job.specs[alias]) for alias in item.lacks}  # None: its teacher makes it
    return [alias for alias, label_set in sets.items() if label_set is None or label_set.missing(item.view, [item.chunk])]


def _decoded(job: Job, item: Item, examples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, np.ndarray], dict[int, Reject]]:
    """Frames of each sampling, zeros where a row is rejected or stays as it is."""
    num_rows = max(1, len(examples))
    frames = [np.zeros((num_rows, s.num_frames, s.size_px, s.size_px, 3), np.uint8) for s in job.decoding.samplings]
    redone = set(range(len(examples))) if item.redo is None else {row for rows in item.redo.values() for row in rows}
    gone = forgotten.noted(job.store)  # asked for each chunk: takedowns need not wait for the end of a long labelling
    rejects = {row: forgotten.REJECT for row in redone if examples[row][schema.VIDEO_ID] in gone}
    rejects |= {row: KEPT for row in range(len(examples)) if row not in redone}
    wanted = [row for row in range(len(examples)) if row not in rejects and job.decoding.samplings]
    clips = {row: clip_of(examples[row], job.views, item.view % job.num_views) for row in wanted}
    for row, decoded in zip(clips, decode_or_reject(list(clips.values()), job.decoding), strict=True):
        if isinstance(decoded, Reject):
            rejects[row] = decoded
            continue
        for column, clip in zip(frames, decoded, strict=True):
            column[row] = clip
    return {f"{FRAMES}.{i}": column for i, column in enumerate(frames)}, rejects


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


def commit(job: Job, label_set: LabelSet, item: Item, rows: ChunkRows) -> None:
    """Commit what was made of an item, and tell training, if it waits."""
    alias = label_set.spec.alias
    if item.redo is not None:
        label_set.amend(item.view, item.chunk, rows, item.redo[alias])
        return
    data = label_set.write(item.view, item.chunk, rows, num_rows=job.plan.examples(item.chunk).num_rows)
    if data is not None and job.link is not None:
        job.link.commit(Key(alias, item.view, item.chunk), item.round, data)


def recorded() -> dict[str, str]:
    """Facts that are recorded with a label set but not hashed."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "av", "decord2")}
    return versions | {"python": platform.python_version()}


def device() -> str:
    """`cuda` where this process has a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
