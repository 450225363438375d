"""Chunks, epochs and rounds: which rank trains which row when. Pure arithmetic, no data is touched.

A *chunk* is the unit of work, commit and feeding; an *epoch* is a seeded permutation of chunks; a *round* is a run of
chunks of that permutation, the unit of training between two checkpoints. Batches are drawn from the shuffled rows of
one round, so they are the same at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

POOL_BATCHES = 8  # batches of similar lengths are cut from so many at once


@dataclass(frozen=True, order=True)
class Chunk:
    """Rows `[index * C, (index + 1) * C)` of one manifest shard's examples."""

    shard: str
    index: int


class Row(NamedTuple):
    """One example: its chunk's position in the plan, and its row inside the chunk."""

    chunk: int
    row: int


@dataclass(frozen=True)
class Round:
    """One round: positions of its chunks in the plan, in training order."""

    epoch: int
    index: int
    chunks: tuple[int, ...]


def chunks_of(shard: str, num_examples: int, chunk_size: int) -> list[Chunk]:
    """The chunks of one shard; the last may be short."""
    return [Chunk(shard, i) for i in range(-(-num_examples // chunk_size))]


def rounds_of_epoch(sizes: Sequence[int], epoch: int, every_examples: int, seed: int) -> list[Round]:
    """The rounds of one epoch: every chunk once, each round at least `every_examples` rows but the last.

    `sizes[i]` is the number of rows of chunk i that train.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(sizes))
    rounds: list[Round] = []
    current: list[int] = []
    num_rows = 0
    for chunk in order.tolist():
        if sizes[chunk] == 0:
            continue
        current.append(chunk)
        num_rows += sizes[chunk]
        if num_rows >= every_examples:
            rounds.append(Round(epoch, len(rounds), tuple(current)))
            current, num_rows = [], 0
    if current:
        rounds.append(Round(epoch, len(rounds), tuple(current)))
    return rounds


def batches_of_round(
    rows: Sequence[Sequence[int]], round_: Round, batch_size: int, seed: int, lengths: Sequence[Sequence[int]] | None = None
) -> list[list[Row]]:
    """Global batches of a round: its rows shuffled, cut every `batch_size`; only one may be short.

    `rows[i]` are the row numbers of chunk i that train, `lengths[i]` how long each of them is: then batches are of similar ones.
    """
    flat = [Row(chunk, row) for chunk in round_.chunks for row in rows[chunk]]
    rng = np.random.default_rng([seed, round_.epoch, round_.index, 1])
    if lengths is not None:
        found = length_batches([length for chunk in round_.chunks for length in lengths[chunk]], batch_size, rng)
        return [[flat[i] for i in batch] for batch in found]
    shuffled = [flat[i] for i in rng.permutation(len(flat)).tolist()]
    return [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]


def length_batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator, pool_batches: int = POOL_BATCHES) -> list[list[int]]:
    """Every example once, in batches of similar length; only one batch may be short.

    Examples are shuffled, then sorted by length within pools of `pool_batches` batches: the fewer, the more random and the more padded.
    """
    order, pool = rng.permutation(len(lengths)), batch_size * pool_batches
    pools = [sorted(order[start : start + pool].tolist(), key=lambda i: lengths[i]) for start in range(0, len(order), pool)]
    batches = [pool[start : start + batch_size] for pool in pools for start in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches)).tolist()]


def rank_slice(batch: Sequence[Row], rank: int, world_size: int) -> list[Row]:
    """The rows of one rank: contiguous parts whose sizes differ by at most one; may be empty."""
    bounds = np.linspace(0, len(batch), world_size + 1).round().astype(int)
    return list(batch[bounds[rank] : bounds[rank + 1]])


def num_steps(sizes: Sequence[int], epochs: Sequence[int], every_examples: int, batch_size: int, seed: int) -> int:
    """Optimizer steps of some epochs: a schedule's length."""
    return sum(
        -(-sum(sizes[c] for c in r.chunks) // batch_size) for epoch in epochs for r in rounds_of_epoch(sizes, epoch, every_examples, seed)
    )


def rounds_from(sizes: Sequence[int], start: tuple[int, int], epochs: int, every_examples: int, seed: int) -> Iterator[Round]:
    """All rounds from position `start` = (epoch, round) on: what is left after a resume."""
    for epoch in range(start[0], epochs):
        for round_ in rounds_of_epoch(sizes, epoch, every_examples, seed):
            if (epoch, round_.index) >= start:
                yield round_
