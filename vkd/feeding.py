"""Committed chunks -> batches of tensors: rounds are read ahead."""

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

from vkd import planning, schema
from vkd.batches import FrameBatches, Loaded
from vkd.planning import Plan
from vkd.recipes.base import Batch, Batches
from vkd.rounds import Chunk, Round, Row, batches_of_round, rank_slice
from vkd.run import Run
from vkd.store.labelset import LabelSet, LabelSetSpec
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
    reads: Collection[Future[Loaded]]


@dataclass
class Feeder:
    """Feeds one rank of a run from its label sets; `split` says which examples.

    `wait_s` is how long the consumer waited for batches; `left_out` counts what is unreadable and what not every set has labelled.
    `beat` is called while waiting, and for each batch. `store` has the label sets that examples name; None: the run's own.
    """

    run: Run
    plan: Plan
    sets: Mapping[str, Labels]
    split: str
    rank: int = 0
    world_size: int = 1
    wait_s: float = 0.0
    left_out: int = 0
    beat: Callable[[], None] = lambda: None
    store: str | None = None
    rows: list[list[int]] = field(init=False)
    lengths: list[list[int]] | None = field(init=False)

    def __post_init__(self) -> None:
        self.rows, length = self.plan.rows(self.split), self.run.recipe.length
        self.lengths = None if length is None else self.plan.values(length, self.rows)
        self.classes = self.plan.classes()
        self.batches = self._new_batches()

    def _new_batches(self) -> Batches:
        run, sampling = self.run, planning.student_sampling(self.run)
        if sampling is None:
            return run.recipe.batches(self.plan, self.store or run.labels.store, run.train.seed, learning=self.split == schema.TRAIN)
        tensors = {(alias, name): t for alias, s in self.sets.items() for name, t in s.spec.tensors.items()}
        decoding = planning.decoding(run, [sampling]).share(self.world_size * NUM_THREADS)
        return FrameBatches(tensors, run.data.views, sampling, decoding)

    @property
    def unreadable(self) -> int:
        """Clips that were labelled once and could not be read now."""
        return self.batches.unreadable

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
                batches = batches_of_round(self.rows, round_, batch_size, seed, self.lengths)
                first = skip if round_ is rounds[0] else 0
                for number, batch in enumerate(batches[first:], first):
                    mine = rank_slice(batch, self.rank, self.world_size)
                    reads = chunks.values() if number == first and self.world_size > 1 else ()
                    made = makers.submit(self._batch, mine, chunks, round_.epoch)
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

    def _read_ahead(self, rounds: Sequence[Round], pool: ThreadPoolExecutor) -> Iterator[tuple[Round, dict[int, Future[Loaded]]]]:
        """Each round with its chunks being read, one round ahead of the one that is asked for."""
        reading: deque[tuple[Round, dict[int, Future[Loaded]]]] = deque()
        for round_ in rounds:
            view = self.run.stored_view(round_.epoch)
            reading.append((round_, {i: pool.submit(self._load, i, view) for i in round_.chunks}))
            if len(reading) > 1:
                yield reading.popleft()
        yield from reading

    def _load(self, position: int, view: int) -> Loaded:
        chunk = self.plan.chunks[position]
        tables = {alias: label_set.read(view, chunk).combine_chunks() for alias, label_set in self.sets.items()}
        examples = self.plan.examples(chunk)
        usable = np.ones(examples.num_rows, bool)
        for table in tables.values():
            usable &= np.array([status == schema.LABELLED for status in table[schema.STATUS].to_pylist()])
        numbers = position * self.plan.chunk_size + np.arange(examples.num_rows)
        return Loaded(tables, usable, planning.label_numbers(examples, self.classes), numbers, examples)

    def _batch(self, rows: Sequence[Row], chunks: Mapping[int, Future[Loaded]], epoch: int) -> Batch:
        """Tensors of the usable rows."""
        by_chunk: dict[int, list[int]] = {}
        for row in rows:
            if chunks[row.chunk].result().usable[row.row]:
                by_chunk.setdefault(row.chunk, []).append(row.row)
        return self.batches([(chunks[chunk].result(), np.array(inside)) for chunk, inside in by_chunk.items()], epoch)


def open_sets(run: Run, plan: Plan) -> tuple[Plan, dict[str, LabelSet]]:
    """The run's label sets, and the plan cut to what they hold.

    Raises LabelsMissing, with the command that makes them, unless `labels.allow_partial`. Of a `live` run only what is held out is kept.
    """
    live, teachers = run.labels.mode == "live", planning.build_teachers(run.recipe.teachers)
    sets = {alias: LabelSet.open(run.store, spec) for alias, spec in planning.label_specs(run, teachers).items()}
    views = [run.held_out_view] if live else range(run.data.views.count)
    lacking = {chunk for label_set in sets.values() for view in views for chunk in label_set.missing(view, plan.chunks)}
    planning.refuse_lacking(lacking, plan, run.store, allowed=live or run.labels.allow_partial)
    return plan.without(lacking), sets
