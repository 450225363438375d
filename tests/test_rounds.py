"""Rounds, batches and rank slices, as properties: every row once, the same at any number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.rounds import Chunk, Round, Row, batches_of_round, chunks_of, length_batches, num_steps, rank_slice, rounds_from, rounds_of_epoch

chunk_rows = st.lists(st.lists(st.integers(0, 63), max_size=9, unique=True).map(sorted), max_size=12)
every = st.integers(1, 40)
batch_sizes = st.integers(1, 16)
seeds = st.integers(0, 2**32)
world_sizes = st.integers(1, 8)


def batches_of_epoch(rows: list[list[int]], epoch: int, every_examples: int, batch_size: int, seed: int) -> list[list[Row]]:
    rounds = rounds_of_epoch([len(r) for r in rows], epoch, every_examples, seed)
    return [batch for round_ in rounds for batch in batches_of_round(rows, round_, batch_size, seed)]


@given(st.integers(0, 300), st.integers(1, 64))
def test_chunks_cover_a_shard(num_examples: int, chunk_size: int) -> None:
    chunks = chunks_of("s", num_examples, chunk_size)
    assert chunks == [Chunk("s", i) for i in range(len(chunks))]
    assert (len(chunks) - 1) * chunk_size < num_examples <= len(chunks) * chunk_size or num_examples == len(chunks) == 0


@given(chunk_rows, st.integers(0, 5), every, batch_sizes, seeds, world_sizes)
def test_every_row_exactly_once_per_epoch_at_any_world_size(
    rows: list[list[int]], epoch: int, every_examples: int, batch_size: int, seed: int, world_size: int
) -> None:
    batches = batches_of_epoch(rows, epoch, every_examples, batch_size, seed)
    trained: Counter[Row] = Counter()
    for batch in batches:
        slices = [rank_slice(batch, rank, world_size) for rank in range(world_size)]
        assert [row for part in slices for row in part] == batch
        trained.update(batch)
    assert trained == Counter(Row(c, r) for c, numbers in enumerate(rows) for r in numbers)


@given(st.integers(0, 5000), st.integers(1, 64))
def test_rank_slices_are_contiguous_and_even(num_rows: int, world_size: int) -> None:
    batch = [Row(0, i) for i in range(num_rows)]
    slices = [rank_slice(batch, rank, world_size) for rank in range(world_size)]
    assert [row for part in slices for row in part] == batch
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1


@given(chunk_rows, every, batch_sizes, seeds)
def test_only_the_last_batch_of_a_round_is_short(rows: list[list[int]], every_examples: int, batch_size: int, seed: int) -> None:
    for round_ in rounds_of_epoch([len(r) for r in rows], 0, every_examples, seed):
        batches = batches_of_round(rows, round_, batch_size, seed)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size
        assert {row.chunk for batch in batches for row in batch} == set(round_.chunks)


@given(chunk_rows, st.integers(0, 5), every, seeds)
def test_rounds_are_as_large_as_asked_but_the_last(rows: list[list[int]], epoch: int, every_examples: int, seed: int) -> None:
    sizes = [len(r) for r in rows]
    rounds = rounds_of_epoch(sizes, epoch, every_examples, seed)
    assert [(r.epoch, r.index) for r in rounds] == [(epoch, i) for i in range(len(rounds))]
    assert sorted(c for r in rounds for c in r.chunks) == [c for c, size in enumerate(sizes) if size]
    for round_ in rounds[:-1]:
        assert sum(sizes[c] for c in round_.chunks) >= every_examples
    for round_ in rounds:  # and no larger than needed
        assert sum(sizes[c] for c in round_.chunks[:-1]) < every_examples


@given(chunk_rows, st.integers(0, 4), every, seeds)
def test_a_resume_has_exactly_what_is_left(rows: list[list[int]], epochs: int, every_examples: int, seed: int) -> None:
    sizes = [len(r) for r in rows]
    whole = list(rounds_from(sizes, (0, 0), epochs, every_examples, seed))
    assert whole == [r for epoch in range(epochs) for r in rounds_of_epoch(sizes, epoch, every_examples, seed)]
    for i, round_ in enumerate(whole):
        assert list(rounds_from(sizes, (round_.epoch, round_.index), epochs, every_examples, seed)) == whole[i:]
        after = (round_.epoch, round_.index + 1)  # the position that a checkpoint at this round's end records
        assert list(rounds_from(sizes, after, epochs, every_examples, seed)) == whole[i + 1 :]
    assert list(rounds_from(sizes, (epochs, 0), epochs, every_examples, seed)) == []


@given(chunk_rows, st.integers(0, 4), every, batch_sizes, seeds)
def test_num_steps_is_what_is_produced(rows: list[list[int]], epochs: int, every_examples: int, batch_size: int, seed: int) -> None:
    produced = sum(len(batches_of_epoch(rows, epoch, every_examples, batch_size, seed)) for epoch in range(epochs))
    assert num_steps([len(r) for r in rows], range(epochs), every_examples, batch_size, seed) == produced


@given(chunk_rows, st.integers(0, 5), every, batch_sizes, seeds)
def test_the_same_again(rows: list[list[int]], epoch: int, every_examples: int, batch_size: int, seed: int) -> None:
    first = batches_of_epoch(rows, epoch, every_examples, batch_size, seed)
    assert first == batches_of_epoch(rows, epoch, every_examples, batch_size, seed)


def test_epochs_rounds_and_seeds_differ() -> None:
    sizes, rows = [8] * 20, [list(range(8))] * 20
    orders = {tuple(c for r in rounds_of_epoch(sizes, epoch, 40, seed) for c in r.chunks) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25
    shuffles = [
        batches_of_round(rows, Round(epoch, index, (0, 1, 2)), 24, seed)[0] for epoch in (0, 1) for index in (0, 1) for seed in (0, 1)
    ]
    assert len({tuple(batch) for batch in shuffles}) == 8


@given(st.lists(st.integers(1, 300), max_size=70), st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_every_example_is_in_one_batch(lengths: list[int], batch_size: int, pool_batches: int, seed: int) -> None:
    batches = length_batches(lengths, batch_size, np.random.default_rng(seed), pool_batches)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert all(batches)
    assert batches == length_batches(lengths, batch_size, np.random.default_rng(seed), pool_batches)


def test_larger_pools_pad_less() -> None:
    lengths = np.random.default_rng(0).integers(4, 300, 512).tolist()

    def padded(pool_batches: int) -> int:
        batches = length_batches(lengths, 16, np.random.default_rng(1), pool_batches)
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    assert sum(lengths) < padded(32) < padded(4) < padded(1)
    assert padded(32) < 1.05 * sum(lengths)


@given(chunk_rows, batch_sizes, seeds)
def test_batches_of_similar_lengths_have_every_row_once(rows: list[list[int]], batch_size: int, seed: int) -> None:
    round_, lengths = Round(0, 0, tuple(range(len(rows)))), [[row % 7 for row in mine] for mine in rows]
    batches = batches_of_round(rows, round_, batch_size, seed, lengths)
    assert sorted(row for batch in batches for row in batch) == [Row(chunk, row) for chunk, mine in enumerate(rows) for row in mine]
    assert len(batches) == num_steps([len(mine) for mine in rows], [0], 10**9, batch_size, seed)
    assert batches == batches_of_round(rows, round_, batch_size, seed, lengths)


def test_golden_order() -> None:
    rounds = rounds_of_epoch([4, 0, 4, 4, 2], epoch=1, every_examples=6, seed=7)
    assert [r.chunks for r in rounds] == [(3, 0), (2, 4)]  # a change here breaks every resume
    assert batches_of_round([[0, 1, 2, 3]], Round(1, 0, (0,)), 3, 7) == [
        [Row(chunk=0, row=3), Row(chunk=0, row=0), Row(chunk=0, row=1)],
        [Row(chunk=0, row=2)],
    ]


@pytest.mark.parametrize(("num_rows", "world_size", "sizes"), [(7, 3, [2, 3, 2]), (1, 4, [0, 0, 1, 0]), (0, 2, [0, 0]), (8, 8, [1] * 8)])
def test_known_slices(num_rows: int, world_size: int, sizes: list[int]) -> None:
    batch = [Row(0, i) for i in range(num_rows)]
    assert [len(rank_slice(batch, rank, world_size)) for rank in range(world_size)] == sizes
