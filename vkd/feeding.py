"""Committed chunks -> batches of tensors: rounds are read ahead, frames come from the store or from the videos."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from vkd import planning, schema
from vkd.errors import LabelsMissing
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.recipes.base import Batch
from vkd.rounds import Chunk, Round, Row, batches_of_round, rank_slice
from vkd.run import Run
from vkd.stages import clip_of, decode_or_reject
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet, LabelSetSpec, Reject
from vkd.transfer import pinned
from vkd.window import Awaited

READ_AHEAD_BATCHES = 8  # refilled in bursts of half: makers that work side by side disturb the trainer's threads less
NUM_THREADS = 2
BEAT_S = 1.0


class Labels(Protocol):
    """Labels of every chunk of a plan: a label set, one that is being filled, or a table that changes between epochs."""

    @property
    def spec(self) -> LabelSetSpec: ...

    def read(self, view: int, chunk: Chunk, columns: Sequence[str] | None = None) -> pa.Table: ...


@dataclass(frozen=True)
class Fed:
    """One step's input for one rank; `last` ends its round."""

    round: Round
    batch: Batch
    num_examples: int
    last: bool


class _Pending(NamedTuple):
    """One step's input while it is made: `num_mine` rows are planned for this rank; a round's first step has the round's `reads`."""

    round: Round
    num_examples: int
    last: bool
    num_mine: int
    batch: Future[Batch]
    reads: Collection[Future[_Loaded]]


@dataclass(frozen=True)
class _Loaded:
    """One chunk in memory: each label set's table, which rows every set has labelled, their classes and numbers."""

    tables: Mapping[str, pa.Table]
    usable: np.ndarray
    classes: np.ndarray
    numbers: np.ndarray
    examples: pa.Table


@dataclass
class Feeder:
    """Feeds one rank of a run from its label sets; `split` says which examples.

    `wait_s` is how long the consumer waited for batches; `unreadable` counts clips that were labelled once and no longer decode,
    `left_out` those and what not every set has labelled. `beat` is called while waiting, and for each batch.
    """

    run: Run
    plan: Plan
    sets: Mapping[str, Labels]
    split: str
    rank: int = 0
    world_size: int = 1
    wait_s: float = 0.0
    unreadable: int = 0
    left_out: int = 0
    beat: Callable[[], None] = lambda: None
    rows: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.plan.rows(self.split)
        self.classes = self.plan.classes()
        self.sampling = planning.student_sampling(self.run)
        self.decoding = planning.decoding(self.run, [self.sampling]).share(self.world_size * NUM_THREADS)
        self.tensors = {(alias, name): t for alias, s in self.sets.items() for name, t in s.spec.tensors.items()}

    @property
    def sizes(self) -> list[int]:
        """Rows of this split in each chunk of the plan."""
        return [len(rows) for rows in self.rows]

    def one_pass(self, epoch: int = 0) -> list[Round]:
        """Every chunk that has rows, in plan order, as a round of its own."""
        return [Round(epoch, number, (chunk,)) for number, chunk in enumerate(chunk for chunk, size in enumerate(self.sizes) if size)]

    def stream(self, rounds: Sequence[Round], batch_size: int, seed: int, skip: int = 0) -> Iterator[Fed]:
        """Every batch of the rounds, in order, less the first `skip`; the next round is read while this one trains. Adds to `wait_s`."""
        pending: deque[_Pending] = deque()
        with ThreadPoolExecutor(NUM_THREADS) as readers, ThreadPoolExecutor(NUM_THREADS) as makers, self._stopped_after():
            ahead = self._read_ahead(rounds, readers)
            for round_, chunks in ahead:
                batches = batches_of_round(self.rows, round_, batch_size, seed)
                first = skip if round_ is rounds[0] else 0
                for number, batch in enumerate(batches[first:], first):
                    mine = rank_slice(batch, self.rank, self.world_size)
                    reads = chunks.values() if number == first and self.world_size > 1 else ()
                    made = makers.submit(self._batch, mine, chunks, round_.epoch % self.run.data.views.count)
                    pending.append(_Pending(round_, len(batch), number == len(batches) - 1, len(mine), made, reads))
                    if len(pending) == READ_AHEAD_BATCHES:
                        while len(pending) > READ_AHEAD_BATCHES // 2:
                            yield self._next(pending)
            while pending:
                yield self._next(pending)

    def _next(self, pending: deque[_Pending]) -> Fed:
        round_, num_examples, last, num_mine, made, reads = pending.popleft()
        self._wait_for([*reads, made])
        batch = made.result()
        self.left_out += num_mine - int(batch[schema.WEIGHT].sum())
        return Fed(round_, batch, num_examples, last)

    def _wait_for(self, futures: Iterable[Future[Any]]) -> None:
        """Ranks wait for whole rounds: else one would wait for data, and the others in a step for that one."""
        started_s = time.monotonic()
        self.beat()
        for future in futures:
            while not future.done():
                wait([future], BEAT_S)
                self.beat()
        self.wait_s += time.monotonic() - started_s

    @contextmanager
    def _stopped_after(self) -> Iterator[None]:
        """Readers that wait for a commit stop waiting once nobody wants what they read."""
        awaited = [label_set for label_set in self.sets.values() if isinstance(label_set, Awaited)]
        for label_set in awaited:
            label_set.stopped.clear()
        try:
            yield
        finally:
            for label_set in awaited:
                label_set.stopped.set()

    def _read_ahead(self, rounds: Sequence[Round], pool: ThreadPoolExecutor) -> Iterator[tuple[Round, dict[int, Future[_Loaded]]]]:
        """Each round with its chunks being read, one round ahead of the one that is asked for."""
        reading: deque[tuple[Round, dict[int, Future[_Loaded]]]] = deque()
        for round_ in rounds:
            view = self.run.stored_view(round_.epoch)
            reading.append((round_, {i: pool.submit(self._load, i, view) for i in round_.chunks}))
            if len(reading) > 1:
                yield reading.popleft()
        yield from reading

    def _load(self, position: int, view: int) -> _Loaded:
        chunk = self.plan.chunks[position]
        tables = {alias: label_set.read(view, chunk).combine_chunks() for alias, label_set in self.sets.items()}
        examples = self.plan.examples(chunk)
        usable = np.ones(examples.num_rows, bool)
        for table in tables.values():
            usable &= np.array([status == schema.LABELLED for status in table[schema.STATUS].to_pylist()])
        numbers = position * self.plan.chunk_size + np.arange(examples.num_rows)
        return _Loaded(tables, usable, planning.label_numbers(examples, self.classes), numbers, examples)

    def _batch(self, rows: Sequence[Row], chunks: Mapping[int, Future[_Loaded]], view: int) -> Batch:
        """Tensors of the usable rows; one masked row of weight 0 when there are none, so that every rank runs every step."""
        by_chunk: dict[int, list[int]] = {}
        for row in rows:
            if chunks[row.chunk].result().usable[row.row]:
                by_chunk.setdefault(row.chunk, []).append(row.row)
        parts = [self._columns(chunks[chunk].result(), np.array(inside), view) for chunk, inside in by_chunk.items()]
        parts = [part for part in parts if len(part[schema.WEIGHT])]
        if not parts:
            parts = [self._masked_row()]
        return {name: pinned(torch.from_numpy(np.concatenate([part[name] for part in parts]))) for name in parts[0]}

    def _columns(self, chunk: _Loaded, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        if FRAMES_ALIAS in chunk.tables:
            frames = np.asarray(decode(chunk.tables[FRAMES_ALIAS], FRAMES_ALIAS, rows))
        else:
            rows, frames = self._decode_videos(chunk.examples, rows, view)
        columns = {schema.FRAMES: frames, schema.LABEL: chunk.classes[rows], schema.EXAMPLE: chunk.numbers[rows]}
        columns[schema.WEIGHT] = np.ones(len(rows), np.float32)
        for alias, name in self.tensors:
            if alias != FRAMES_ALIAS:
                columns[f"{alias}.{name}"] = np.array(decode(chunk.tables[alias], name, rows))
        return columns

    def _decode_videos(self, examples: pa.Table, rows: np.ndarray, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames decoded now; a video that no longer decodes is counted and left out."""
        found, frames = [], []
        clips = [clip_of(example, self.run.data.views, view) for example in examples.take(rows).to_pylist()]
        for row, decoded in zip(rows.tolist(), decode_or_reject(clips, self.decoding), strict=True):
            if isinstance(decoded, Reject):
                self.unreadable += 1
                continue
            frames += decoded
            found.append(row)
        shape = (0, self.sampling.num_frames, self.sampling.size_px, self.sampling.size_px, 3)
        return np.array(found, np.int64), np.stack(frames) if frames else np.zeros(shape, np.uint8)

    def _masked_row(self) -> dict[str, np.ndarray]:
        shape = (1, self.sampling.num_frames, self.sampling.size_px, self.sampling.size_px, 3)
        columns: dict[str, np.ndarray] = {schema.FRAMES: np.zeros(shape, np.uint8), schema.WEIGHT: np.zeros(1, np.float32)}
        columns |= {name: np.full(1, -1) for name in (schema.LABEL, schema.EXAMPLE)}
        for (alias, name), tensor in self.tensors.items():
            if alias != FRAMES_ALIAS:
                columns[f"{alias}.{name}"] = np.zeros((1, *tensor.row_shape), np.float32)
        return columns


def open_sets(run: Run, plan: Plan) -> tuple[Plan, dict[str, LabelSet]]:
    """The run's label sets, and the plan cut to what they hold.

    Raises LabelsMissing, with the command that makes them, unless `labels.allow_partial`. Of a `live` run only what is held out is kept.
    """
    live, teachers = run.labels.mode == "live", planning.build_teachers(run.recipe.teachers)
    sets = {alias: LabelSet.open(run.store, spec) for alias, spec in planning.label_specs(run, teachers).items()}
    views = [run.held_out_view] if live else range(run.data.views.count)
    lacking = {chunk for label_set in sets.values() for view in views for chunk in label_set.missing(view, plan.chunks)}
    if lacking and not ((live or run.labels.allow_partial) and len(lacking) < len(plan.chunks)):
        what = f"labels of {len(lacking)} of {len(plan.chunks)} chunks are missing"
        raise LabelsMissing(what, where=run.store, action="vkd label RUN, or set labels.allow_partial=true")
    return plan.without(lacking), sets
