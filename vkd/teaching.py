"""A teacher at work on decoded chunks: it labels what its set lacks, its answers are checked, and each chunk is committed."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vkd import planning, schema
from vkd.errors import TeacherError
from vkd.metrics.label_statistics import Spread, Statistics, label_statistics
from vkd.rounds import Chunk
from vkd.schema import FRAMES, Columns, TensorType
from vkd.stages import ITEM, KEPT, REJECT, STATS, Job, carried, commit, device, recorded
from vkd.store.encodings import fidelity
from vkd.store.labelset import ChunkRows, LabelSet, Reject

LOGITS = "logits"
THUMBNAIL_PX = 32
MIN_CLIPS = 8  # that look different, before outputs are judged
MIN_PIXEL_RMS = 4.0  # of 255: clips that differ less look alike, and so may their labels
MIN_LABEL_SPREAD = 1e-4
# what a teacher's code may raise; VkdError is none of them and goes through
RAISED = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, NameError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
MAX_MESSAGE_CHARS = 300


class Teach:
    """One teacher on one device: labels the chunks that its set lacks and commits them."""

    def __init__(self, job: Job, alias: str, num_threads: int, last: bool) -> None:
        import torch  # the driver imports this module too, and needs no torch yet

        torch.set_num_threads(num_threads)
        torch.backends.cudnn.allow_tf32 = False  # a set that declares fp32 must be fp32
        self.job, self.alias, self.last, self.spec = job, alias, last, job.specs[alias]
        self.teacher = planning.build_teachers(job.teachers)[alias]
        if self.teacher.identity() != self.spec.fields["teacher"]:
            raise TeacherError(
                "this node has other weight files than the driver", where=alias, action="install the same package everywhere"
            )
        self.teacher.load(device())
        self.first_clips = _FirstClips(alias, self.spec.tensors)
        probe = self._answers(self.teacher.probe_batch())
        measured = {name: fidelity(probe[name], tensor, self.spec.encodings[name]) for name, tensor in self.spec.tensors.items()}
        self.set = LabelSet.create(job.store, self.spec, probe, recorded(), measured)

    def __call__(self, batch: Columns) -> Columns:
        item = self.job.items[int(batch[ITEM][0])]
        stats = json.loads(batch[STATS][0])
        rejects = {row: Reject(**json.loads(text)) for row, text in enumerate(batch[REJECT].tolist()) if text}
        if self.alias in stats["lacks"]:
            started_s, clock_s = time.process_time(), time.monotonic()
            ids = self.job.plan.examples(item.chunk)[schema.EXAMPLE_ID].to_pylist()
            given = {name: batch[carried(name)] for name in planning.columns_for([self.teacher])}
            if self.alias in self.job.column:
                given[FRAMES] = batch[self.job.column[self.alias]]
            labels, rejects = self._labels(given, rejects, item.chunk, len(ids))
            good = [row for row in range(len(ids)) if row not in rejects]
            told = (
                self._describe(self._inputs(given, ids, good), {name: [rows[row] for row in good] for name, rows in labels.items()})
                if good
                else {}
            )
            commit(self.job, self.set, item, ChunkRows(ids, rejects, labels))
            stats["teach_s"][self.alias] = time.process_time() - started_s
            stats["busy_s"][self.alias] = time.monotonic() - clock_s
            stats |= {name: stats[name] | measured for name, measured in told.items()}
        if not self.last:
            return batch | {STATS: np.array([json.dumps(stats)] * len(batch[ITEM]))}
        stats["rejected"] = Counter(reject.kind for reject in rejects.values() if reject != KEPT)
        stats["labelled"] = len(batch[ITEM]) - len(rejects) if stats["lacks"] else 0
        stats["elsewhere"] = 0 if stats["lacks"] else self.job.plan.examples(item.chunk).num_rows
        return {STATS: np.array([json.dumps(stats)])}

    def _labels(
        self, given: Columns, rejects: Mapping[int, Reject], chunk: Chunk, num_rows: int
    ) -> tuple[dict[str, list[np.ndarray]], dict[int, Reject]]:
        """Labels of all rows (zeros where rejected), checked against the contract; rows that raise or are not finite are rejected."""
        labels = {name: [np.zeros(_shape(tensor, 0), tensor.dtype)] * num_rows for name, tensor in self.spec.tensors.items()}
        found = dict(rejects)
        good = [row for row in range(num_rows) if row not in rejects]
        for rows, answered in self._asked(given, good, found, chunk):
            for name, tensor in self.spec.tensors.items():
                self._check_shapes(name, tensor, answered[name], len(rows))
                for row, answer in zip(rows, answered[name], strict=True):
                    labels[name][row] = answer
                    if not np.isfinite(answer).all():
                        found[row] = Reject("teach", "not_finite", f"{name} is not finite", True, 1)
        return labels, found

    def _check_shapes(self, name: str, tensor: TensorType, answered: Sequence[np.ndarray] | np.ndarray, num_rows: int) -> None:
        shapes = {np.shape(answer) for answer in answered}
        if len(answered) != num_rows or any(shape != _shape(tensor, *shape[:1]) for shape in shapes):
            what = f"{name} has {len(answered)} rows of {', '.join(sorted(map(str, shapes)))}, not {num_rows} of {tensor.shape}"
            raise TeacherError(what, where=self.alias, action="mend emits")

    def _inputs(self, given: Columns, ids: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """uint8 [n, d]: what tells alike examples from others; those without frames are all others."""
        if FRAMES in given:
            return thumbnails(given[FRAMES][np.array(rows, np.int64)])
        return np.array([np.frombuffer(hashlib.sha256(ids[row].encode()).digest(), np.uint8) for row in rows])

    def _asked(self, given: Columns, rows: list[int], rejects: dict[int, Reject], chunk: Chunk) -> list[tuple[list[int], Columns]]:
        """Answers for all rows at once, or, when the teacher raises, for each alone; one at which it raises again is rejected.

        Raises TeacherError when it raises at every clip: then no clip is to blame.
        """
        if not rows:
            return []
        try:
            return [(rows, self._answers({name: column[np.array(rows)] for name, column in given.items()}))]
        except RAISED as error:
            first = _told(error)
        answered = []
        for row in rows:
            try:
                answered.append(([row], self._answers({name: column[row : row + 1] for name, column in given.items()})))
            except RAISED as error:
                rejects[row] = Reject("teach", "teacher_error", _told(error), False, 2)
        if not answered and len(rows) > 1:
            where = f"{self.alias}, chunk {chunk.index} of shard {chunk.shard}"
            raise TeacherError(f"raises at every clip: {first}", where=where, action="mend the teacher, then run the same command again")
        return answered

    def _answers(self, batch: Columns) -> Columns:
        answered = self.teacher(batch)
        if lacking := sorted(set(self.spec.tensors) - set(answered)):
            raise TeacherError(f"gives no {lacking[0]!r}, which it says it emits", where=self.alias, action="mend emits")
        return {name: answered[name] for name in self.spec.tensors}

    def _describe(self, seen: np.ndarray, labels: Mapping[str, Sequence[np.ndarray]]) -> dict[str, dict[str, Statistics]]:
        """Fidelity and statistics of labelled rows. Raises TeacherError when the first clips show that labels say nothing of clips."""
        flat = {name: _flat(labels[name], tensor) for name, tensor in self.spec.tensors.items()}
        self.first_clips.add(seen, flat)
        inputs = [row.tobytes() for row in seen]
        fidelities, statistics = {}, {}
        for name, tensor in self.spec.tensors.items():
            rows = labels[name] if tensor.ragged else np.stack(labels[name])
            fidelities[f"{self.alias}.{name}"] = fidelity(rows, tensor, self.spec.encodings[name])
            statistics[f"{self.alias}.{name}"] = label_statistics(flat[name], inputs, logits=name == LOGITS)
        return {"fidelity": fidelities, "statistics": statistics}


class _FirstClips:
    """The first clips that look different: once there are enough of them, their labels must differ too."""

    def __init__(self, alias: str, tensors: Mapping[str, TensorType]) -> None:
        self.alias, self.judged = alias, False
        self.inputs, self.seen = Spread(), set[bytes]()
        # whole numbers, say a class, and single values may be the same for many clips
        names = [name for name, tensor in tensors.items() if tensor.dtype.startswith("float") and np.prod(tensor.row_shape) > 1]
        self.labels = {name: Spread() for name in names}

    def add(self, seen: np.ndarray, labels: Mapping[str, np.ndarray]) -> None:
        """Raises TeacherError, which names the label, when labels hardly differ though clips do."""
        if self.judged:
            return
        new = sorted({key: i for i, row in enumerate(seen) if (key := row.tobytes()) not in self.seen}.values())
        self.seen |= {row.tobytes() for row in seen}
        self.inputs.add(seen[new])
        for name, spread in self.labels.items():
            spread.add(labels[name][new])
        if len(self.seen) < MIN_CLIPS or self.inputs.rms < MIN_PIXEL_RMS:
            return
        self.judged = True
        for name, spread in self.labels.items():
            if spread.relative < MIN_LABEL_SPREAD:
                what = f"{name} is the same for {len(self.seen)} clips that look different (relative spread {spread.relative:.1g})"
                action = "check its weights and its preprocessing; a teacher must tell clips apart"
                raise TeacherError(what, where=self.alias, action=action)


def _shape(tensor: TensorType, length: int = 0) -> tuple[int, ...]:
    """The shape of one row, `length` long if that may vary."""
    return (length, *tensor.row_shape) if tensor.ragged else tensor.row_shape


def _flat(rows: Sequence[np.ndarray], tensor: TensorType) -> np.ndarray:
    """[n, d]: a row each, of a ragged one its mean, zeros when it is empty."""
    if not tensor.ragged:
        return np.stack([row.ravel() for row in rows])
    return np.stack([row.sum(axis=0).ravel() / max(len(row), 1) for row in rows])


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """uint8 [n, d]: every few pixels of each clip, enough to tell whether two clips look alike."""
    step = max(1, frames.shape[2] // THUMBNAIL_PX)
    return frames[:, :, ::step, ::step].reshape(len(frames), -1)


def _told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE_CHARS]
