"""From committed chunks to batches: every row once at any number of ranks, and errors that arrive instead of hanging."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from vkd import batches, feeding, planning
from vkd.clips import Clip
from vkd.errors import LabelsMissing, StorageError
from vkd.feeding import Fed, Feeder
from vkd.planning import FRAMES_ALIAS, Plan
from vkd.recipes.base import Batch
from vkd.rounds import Round, rounds_of_epoch
from vkd.run import Run
from vkd.schema import FRAMES, LABEL, LABELLED, STATUS, TRAIN, VAL
from vkd.stages import decode_or_reject
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet, Reject
from vkd.video.settings import Settings

pytestmark = pytest.mark.timeout(60)
COLUMNS = {FRAMES, LABEL, "example", "weight", "teacher.logits", "teacher.embedding"}
BATCH_SIZE = 4


def rounds_of(feeder: Feeder, epoch: int = 0) -> list[Round]:
    return rounds_of_epoch(feeder.sizes, epoch, every_examples=6, seed=0)


def stream(feeder: Feeder, epoch: int = 0) -> list[Fed]:
    return list(feeder.stream(rounds_of(feeder, epoch), BATCH_SIZE, seed=0))


def rows_of(fed: list[Fed]) -> list[tuple[bytes, int]]:
    """Each row that counts: its embedding, which no other clip has, and its class."""
    found = []
    for batch in (each.batch for each in fed):
        real = batch["weight"] > 0
        embeddings, classes = batch["teacher.embedding"][real].numpy(), batch[LABEL][real].tolist()
        found += [(embedding.tobytes(), number) for embedding, number in zip(embeddings, classes, strict=True)]
    return found


def stored_rows(run: Run, split: str, view: int = 0) -> Counter[tuple[bytes, int]]:
    """The labelled rows of a split, read straight from the store."""
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    label_set = LabelSet.open(run.labels.store, planning.label_specs(run, teachers)["teacher"])
    found: Counter[tuple[bytes, int]] = Counter()
    for chunk, rows in zip(plan.chunks, plan.rows(split), strict=True):
        table, classes = label_set.read(view, chunk), planning.label_numbers(plan.examples(chunk), plan.classes())
        embeddings, statuses = decode(table, "embedding"), table[STATUS].to_pylist()
        found.update((embeddings[i].tobytes(), int(classes[i])) for i in rows if statuses[i] == LABELLED)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("split", "num_rows"), [(TRAIN, 15), (VAL, 6)])
def test_every_row_exactly_once_per_epoch(labelled: Run, split: str, num_rows: int, world_size: int) -> None:
    expected = stored_rows(labelled, split)
    assert (expected.total(), len(expected)) == (num_rows, num_rows)
    for epoch in (0, 1):
        ranks = [stream(small.feeder_of(labelled, split, rank, world_size), epoch) for rank in range(world_size)]
        assert Counter(row for fed in ranks for row in rows_of(fed)) == expected
        assert len({len(fed) for fed in ranks}) == 1  # every rank runs every step


def test_ranks_share_the_batches_of_one_rank(labelled: Run) -> None:
    alone = stream(small.feeder_of(labelled))
    shared = zip(*(stream(small.feeder_of(labelled, TRAIN, rank, 3)) for rank in range(3)), strict=True)
    for one, parts in zip(alone, shared, strict=True):
        assert Counter(rows_of([one])) == Counter(rows_of(list(parts)))
        assert {(part.round, part.num_examples, part.last) for part in parts} == {(one.round, one.num_examples, one.last)}


def test_batches_have_every_column_in_its_type(labelled: Run) -> None:
    feeder = small.feeder_of(labelled)
    fed = stream(feeder)
    assert [each.num_examples for each in fed] == [len(each.batch["weight"]) for each in fed]
    assert sum(each.num_examples for each in fed) == 15
    assert [each.round for each in fed if each.last] == rounds_of(feeder)
    for batch in (each.batch for each in fed):
        assert set(batch) == COLUMNS
        assert (batch[FRAMES].dtype, batch[FRAMES].shape[1:]) == (torch.uint8, (2, 32, 32, 3))
        assert (batch["teacher.logits"].dtype, batch["teacher.logits"].shape[1:]) == (torch.float32, (5,))
        assert (batch[LABEL].dtype, batch["weight"].dtype) == (torch.int64, torch.float32)
        assert batch["weight"].all()
        assert set(batch[LABEL].tolist()) <= {0, 1}


def test_the_same_again(labelled: Run) -> None:
    feeder = small.feeder_of(labelled)
    assert_same(stream(feeder), stream(feeder))


def assert_same(a: list[Fed], b: list[Fed]) -> None:
    batches: list[list[Batch]] = [[each.batch for each in fed] for fed in (a, b)]
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_epochs_are_in_different_orders_of_the_same_rows(labelled: Run) -> None:
    feeder = small.feeder_of(labelled)
    first, second = rows_of(stream(feeder, 0)), rows_of(stream(feeder, 1))
    assert first != second
    assert Counter(first) == Counter(second)


def test_kept_frames_are_what_decoding_gives(labelled: Run) -> None:
    kept, decoded = small.feeder_of(labelled), small.feeder_of(small.changed(labelled, "data.keep_frames=none"))
    assert FRAMES_ALIAS in kept.sets
    assert FRAMES_ALIAS not in decoded.sets
    assert_same(stream(kept), stream(decoded))


def test_nothing_is_decoded_when_frames_are_kept(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "decode_or_reject", None)
    assert len(rows_of(stream(small.feeder_of(labelled)))) == 15


@pytest.mark.parametrize("world_size", [1, 3])
def test_rejected_rows_are_left_out(spoiled: Run, world_size: int) -> None:
    expected = stored_rows(spoiled, TRAIN)
    assert expected.total() == 10
    ranks = [stream(small.feeder_of(spoiled, TRAIN, rank, world_size)) for rank in range(world_size)]
    assert Counter(row for fed in ranks for row in rows_of(fed)) == expected
    assert all(each.batch["weight"].all() or len(each.batch["weight"]) == 1 for fed in ranks for each in fed)


def test_a_rank_without_rows_gets_one_masked_row(labelled: Run) -> None:
    feeders = [small.feeder_of(labelled, TRAIN, rank, 4) for rank in range(4)]
    single = [list(feeder.stream(rounds_of(feeder), 1, seed=0)) for feeder in feeders]
    real = [each.batch for fed in single for each in fed if each.batch["weight"].any()]
    masked = [each.batch for fed in single for each in fed if not each.batch["weight"].any()]
    assert (len(real), len(masked)) == (15, 45)
    for batch in masked:
        assert {name: (t.dtype, t.shape) for name, t in batch.items()} == {name: (t.dtype, t.shape) for name, t in real[0].items()}
        assert batch[LABEL].tolist() == [-1]
        assert all(tensor.isfinite().all() for tensor in batch.values())


def test_epochs_read_the_views_in_turn(unlabelled: Run, tmp_path: Path) -> None:
    run = small.changed(unlabelled, f"labels.store={tmp_path}", "data.views.count=2", "data.keep_frames=none")
    small.label(run)
    for epoch in range(3):
        expected = stored_rows(run, TRAIN, view=epoch % 2)
        fed = stream(small.feeder_of(run), epoch)
        assert Counter(rows_of(fed)) == expected
    assert not stored_rows(run, TRAIN, 0) & stored_rows(run, TRAIN, 1)


def test_frames_of_another_view_are_decoded_as_that_view(unlabelled: Run, tmp_path: Path) -> None:
    kept = small.changed(unlabelled, f"labels.store={tmp_path}", "data.views.count=2")
    small.label(kept)
    decoded = small.feeder_of(small.changed(kept, "data.keep_frames=none"))
    assert_same(stream(small.feeder_of(kept), 1), stream(decoded, 1))


def test_a_video_that_no_longer_decodes_is_counted_and_left_out(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_most(clips: Sequence[Clip], settings: Settings) -> Iterator[list[np.ndarray] | Reject]:
        for clip in clips:
            gone = "b_dull" in clip.uri
            yield Reject("decode", "missing", "gone", True) if gone else next(decode_or_reject([clip], settings))

    monkeypatch.setattr(batches, "decode_or_reject", decode_most)
    feeder = small.feeder_of(small.changed(labelled, "data.keep_frames=none"))
    fed = stream(feeder)
    assert feeder.unreadable == 5
    assert Counter(number for _, number in rows_of(fed)) == {1: 10}  # sharp
    assert Counter(rows_of(fed)) < stored_rows(labelled, TRAIN)


def test_no_labels_at_all_names_the_command(unlabelled: Run, tmp_path: Path) -> None:
    for partial in ("true", "false"):
        run = small.changed(unlabelled, f"labels.store={tmp_path}", f"labels.allow_partial={partial}")
        with pytest.raises(LabelsMissing, match=r"no labels teacher-.* -> vkd label RUN"):
            small.feeder_of(run)


@pytest.mark.parametrize("alias", ["teacher", FRAMES_ALIAS])
def test_missing_chunks_name_the_command_and_the_way_out(labelled: Run, tmp_path: Path, alias: str) -> None:
    run = small.copied(labelled, tmp_path)
    small.chunk_files(run, alias)[2].unlink()
    with pytest.raises(
        LabelsMissing, match=r"labels of 1 of 5 chunks are missing -> vkd label RUN, or set labels\.allow_partial=true"
    ) as raised:
        small.feeder_of(run)
    assert raised.value.exit_code == 2
    partial = small.feeder_of(small.changed(run, "labels.allow_partial=true"))
    assert partial.plan.chunks == [chunk for i, chunk in enumerate(Plan.of(run).chunks) if i != 2]
    assert len(rows_of(stream(partial))) == 15 - len(Plan.of(run).rows(TRAIN)[2])


def test_partial_labels_must_be_some(labelled: Run, tmp_path: Path) -> None:
    run = small.copied(labelled, tmp_path)
    for path in small.chunk_files(run, "teacher"):
        path.unlink()
    with pytest.raises(LabelsMissing, match="5 of 5 chunks"):
        small.feeder_of(small.changed(run, "labels.allow_partial=true"))


def test_a_view_that_lacks_is_missing_too(labelled: Run) -> None:
    with pytest.raises(LabelsMissing, match="5 of 5 chunks"):
        small.feeder_of(small.changed(labelled, "data.views.count=2"))


@pytest.mark.parametrize("damage", ["overwritten", "deleted"])
def test_what_a_reader_finds_reaches_the_consumer(labelled: Run, tmp_path: Path, damage: str) -> None:
    run = small.copied(labelled, tmp_path)
    feeder = small.feeder_of(run)
    position = rounds_of(feeder)[-1].chunks[-1]  # of the last round: the batches before it still come
    path = small.chunk_files(run, "teacher")[position]
    path.unlink()
    if damage == "overwritten":
        path.write_bytes(b"no parquet" * 100)
    threads = threading.active_count()
    fed: list[Fed] = []
    with pytest.raises(LabelsMissing if damage == "deleted" else StorageError):
        fed.extend(feeder.stream(rounds_of(feeder), BATCH_SIZE, seed=0))
    assert threading.active_count() == threads


def test_an_error_while_making_a_batch_reaches_the_consumer(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("the disk is gone")

    feeder = small.feeder_of(labelled)
    monkeypatch.setattr(batches, "decode", fail)
    with pytest.raises(StorageError, match="the disk is gone"):
        stream(feeder)


def test_a_consumer_may_stop_early(labelled: Run) -> None:
    feeder = small.feeder_of(labelled)
    threads = threading.active_count()
    feeding_: Iterator[Fed] = feeder.stream(rounds_of(feeder), 1, seed=0)
    next(feeding_)
    assert threading.active_count() > threads
    feeding_.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_rounds_are_read_ahead_but_not_all_at_once(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    feeder, loaded = small.feeder_of(labelled), list[int]()
    load, ahead = Feeder._load, threading.Event()

    def noted(self: Feeder, chunk: int, view: int) -> batches.Loaded:
        loaded.append(chunk)
        if len(loaded) > 1:
            ahead.set()
        return load(self, chunk, view)

    monkeypatch.setattr(Feeder, "_load", noted)
    rounds = [Round(epoch, i, (i,)) for epoch in range(8) for i in range(5)]
    steps = feeder.stream(rounds, 100, seed=0)  # one batch a round
    assert next(steps).round == rounds[0]
    assert ahead.wait(10)
    assert len(loaded) <= feeding.READ_AHEAD_BATCHES + 1
    assert [fed.round for fed in steps] == rounds[1:]
    assert Counter(loaded) == dict.fromkeys(range(5), 8)


def test_waiting_is_measured(labelled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    feeder, load = small.feeder_of(labelled), Feeder._load
    gate = threading.Event()

    def slow(self: Feeder, chunk: int, view: int) -> batches.Loaded:
        gate.wait(0.5)
        return load(self, chunk, view)

    monkeypatch.setattr(Feeder, "_load", slow)
    next(feeder.stream(rounds_of(feeder), BATCH_SIZE, seed=0))
    assert feeder.wait_s > 0.1
