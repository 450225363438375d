"""What workers do to one chunk: decode it, let a teacher label it, commit. Plain functions of data, without Ray."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from vkd import planning, schema
from vkd.clips import Clip, ViewPolicy
from vkd.errors import TeacherError, VideoError
from vkd.models import ModelSpec
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.rounds import Chunk
from vkd.schema import FRAMES, Columns
from vkd.store import forgotten
from vkd.store.encodings import fidelity
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
    wanted = [schema.EXAMPLE_ID, schema.VIDEO_ID, schema.URI, schema.START_S, schema.END_S]
    examples = job.plan.examples(item.chunk).select(wanted).to_pylist()
    frames = [np.zeros((len(examples), s.num_frames, s.size_px, s.size_px, 3), np.uint8) for s in job.decoding.samplings]
    gone = forgotten.noted(job.store)  # asked for each chunk: takedowns need not wait for the end of a long labelling
    rejects = {row: forgotten.REJECT for row, example in enumerate(examples) if example[schema.VIDEO_ID] in gone}
    clips = {row: clip_of(example, job.views, item.view) for row, example in enumerate(examples) if row not in rejects}
    before_s = guard.here(job.decoding).cpu_s
    for row, decoded in zip(clips, decode_or_reject(list(clips.values()), job.decoding), strict=True):
        if isinstance(decoded, Reject):
            rejects[row] = decoded
            continue
        for column, clip in zip(frames, decoded, strict=True):
            column[row] = clip
    columns = {f"{FRAMES}.{i}": column for i, column in enumerate(frames)}
    if FRAMES_ALIAS in item.lacks:
        kept = {FRAMES_ALIAS: columns[job.column[FRAMES_ALIAS]]}
        _commit(LabelSet.open(job.store, job.specs[FRAMES_ALIAS]), item, examples, rejects, kept)
    decode_s = time.process_time() - started_s + guard.here(job.decoding).cpu_s - before_s
    stats = {"decode_s": decode_s, "teach_s": {}, "fidelity": {}}
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


class Teach:
    """One teacher on one device: labels the chunks that its set lacks and commits them."""

    def __init__(self, job: Job, alias: str, num_threads: int, last: bool) -> None:
        import torch  # decode workers import this module too, and need no torch

        torch.set_num_threads(num_threads)
        torch.backends.cudnn.allow_tf32 = False  # a set that declares fp32 must be fp32
        self.job, self.alias, self.last, self.spec = job, alias, last, job.specs[alias]
        self.teacher = planning.build_teachers(job.teachers)[alias]
        if self.teacher.identity() != self.spec.fields["teacher"]:
            raise TeacherError(
                "this node has other weight files than the driver", where=alias, action="install the same package everywhere"
            )
        self.teacher.load(device())
        probe = self._answers(self.teacher.probe_batch())
        measured = {name: fidelity(probe[name], tensor, self.spec.encodings[name]) for name, tensor in self.spec.tensors.items()}
        self.set = LabelSet.create(job.store, self.spec, probe, recorded(), measured)

    def __call__(self, batch: Columns) -> Columns:
        item = self.job.items[int(batch[ITEM][0])]
        stats = json.loads(batch[STATS][0])
        rejects = {row: Reject(**json.loads(text)) for row, text in enumerate(batch[REJECT].tolist()) if text}
        if self.alias in item.lacks:
            started_s = time.process_time()
            examples = self.job.plan.examples(item.chunk).select([schema.EXAMPLE_ID]).to_pylist()
            labels, rejects = self._labels(batch[self.job.column[self.alias]], rejects)
            _commit(self.set, item, examples, rejects, labels)
            stats["teach_s"][self.alias] = time.process_time() - started_s
            stats["fidelity"] |= self._fidelity(labels, rejects)
        if not self.last:
            return batch | {STATS: np.array([json.dumps(stats)] * len(batch[ITEM]))}
        stats["rejected"] = Counter(reject.kind for reject in rejects.values())
        stats["labelled"] = len(batch[ITEM]) - len(rejects)
        return {STATS: np.array([json.dumps(stats)])}

    def _labels(self, frames: np.ndarray, rejects: Mapping[int, Reject]) -> tuple[dict[str, np.ndarray], dict[int, Reject]]:
        """Labels of all rows (zeros where rejected), checked against the contract; rows that are not finite are rejected."""
        good = np.array([row for row in range(len(frames)) if row not in rejects], np.int64)
        answered = self._answers({FRAMES: frames[good]}) if len(good) else {}
        labels: dict[str, np.ndarray] = {}
        found = dict(rejects)
        for name, tensor in self.spec.tensors.items():
            labels[name] = np.zeros((len(frames), *tensor.row_shape), tensor.dtype)
            if not len(good):
                continue
            if answered[name].shape != (len(good), *tensor.row_shape):
                raise TeacherError(
                    f"{name} has shape {answered[name].shape}, not {tensor.row_shape} a row", where=self.alias, action="mend emits"
                )
            labels[name][good] = answered[name]
            finite = np.isfinite(answered[name].reshape(len(good), -1)).all(axis=1)
            found |= {int(row): Reject("teach", "not_finite", f"{name} is not finite", True, 1) for row in good[~finite]}
        return labels, found

    def _answers(self, batch: Columns) -> Columns:
        answered = self.teacher(batch)
        if lacking := sorted(set(self.spec.tensors) - set(answered)):
            raise TeacherError(f"gives no {lacking[0]!r}, which it says it emits", where=self.alias, action="mend emits")
        return {name: answered[name] for name in self.spec.tensors}

    def _fidelity(self, labels: Columns, rejects: Mapping[int, Reject]) -> dict[str, dict[str, float]]:
        good = [row for row in range(len(next(iter(labels.values())))) if row not in rejects]
        if not good:
            return {}
        return {f"{self.alias}.{name}": fidelity(labels[name][good], t, self.spec.encodings[name]) for name, t in self.spec.tensors.items()}


def _commit(label_set: LabelSet, item: Item, examples: Sequence[Mapping[str, Any]], rejects: Mapping[int, Reject], labels: Columns) -> None:
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
