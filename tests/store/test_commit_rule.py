"""The commit rule under whatever may happen: crashes, zombies, late listings, growth, retries and compaction at any moment.

A state machine works on a real label set. Each operation emits events (before and after each listing, read, write of a Parquet part,
rename or PUT, delete); at any one of them it may die, or let another operation run to its end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vkd.errors import LabelsMissing
from vkd.rounds import Chunk
from vkd.schema import LABELLED, STATUS, TensorType
from vkd.store import encodings, files
from vkd.store.housekeeping import drop_superseded, verify_files
from vkd.store.labelset import ChunkRows, LabelSet, LabelSetSpec, Reject

NUM_ROWS = 3  # of a chunk
NUM_CHUNKS = 2  # of a shard
TENSORS = {"x": TensorType("float32", (2,)), "ragged": TensorType("float32", (None, 1))}
SPEC = LabelSetSpec("teacher", {"teacher": {"version": 1}}, TENSORS, {"x": "fp32", "ragged": "fp32"})

Content = tuple[tuple[bool, int], ...]  # of each row: whether it is labelled, and who wrote it
row_sets = st.sets(st.integers(0, NUM_ROWS - 1))


class Crash(BaseException):
    """The process died."""


class Events:
    """Counts what an operation does to storage, and acts at one moment of it."""

    def __init__(self) -> None:
        self.left, self.act, self.dead = -1, lambda: None, False
        self.hidden: set[str] = set()  # names that listings do not show yet
        self.newest: str | None = None
        self.originals: list[tuple[Any, str, Any]] = []
        for owner, name in (
            (files, "list_infos"),
            (files, "read"),
            (files, "delete"),
            (pq.ParquetWriter, "write_table"),
            (os, "link"),
            (os, "replace"),
            (MemoryFileSystem, "pipe_file"),
        ):
            self._wrap(owner, name)
        self._wrap_unlink()

    def _wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = original(*args, **kwargs)
            if name in ("link", "replace", "pipe_file"):
                self.newest = str(args[1]).rsplit("/", 1)[-1]
            if name == "list_infos":
                result = [info for info in result if info[0] not in self.hidden]
            self.tick()
            return result

        self.originals.append((owner, name, original))
        setattr(owner, name, wrapped)

    def _wrap_unlink(self) -> None:
        original = os.unlink

        def unlink(*args: Any, **kwargs: Any) -> None:
            if self.dead:
                raise Crash  # who is dead does not tidy up
            original(*args, **kwargs)

        self.originals.append((os, "unlink", original))
        os.unlink = unlink

    def tick(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.act()

    def restore(self) -> None:
        for owner, name, original in self.originals:
            setattr(owner, name, original)

    @contextmanager
    def during(self, moment: int, act: Callable[[], None]) -> Iterator[None]:
        """Act when the `moment`-th event comes."""
        self.left, self.act = moment, act
        try:
            yield
        finally:
            self.left, self.dead = -1, False

    def die(self) -> None:
        self.dead = True
        raise Crash


class CommitRule(RuleBasedStateMachine):
    """Many processes on one label set."""

    remote = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = f"memory://{uuid.uuid4().hex}" if self.remote else tempfile.mkdtemp()
        self.set = LabelSet.create(self.folder, SPEC, {}, {}, {})
        self.manifests = [["s0"]]
        self.num_writers = 0
        self.seen: dict[Chunk, dict[int, Content]] = {}  # what was read of each attempt
        self.redone: dict[int, set[int]] = {}  # by writer
        self.events = Events()

    def teardown(self) -> None:
        self.events.restore()
        if self.remote:
            with suppress(FileNotFoundError):
                MemoryFileSystem().rm(self.folder, recursive=True)
        else:
            shutil.rmtree(self.folder)

    @property
    def chunks(self) -> list[Chunk]:
        return [Chunk(shard, i) for shard in sorted({s for m in self.manifests for s in m}) for i in range(NUM_CHUNKS)]

    def chunk(self, number: int) -> Chunk:
        return self.chunks[number % len(self.chunks)]

    def rows(self, chunk: Chunk, rejected: set[int]) -> ChunkRows:
        self.num_writers += 1
        writer = self.num_writers
        rejects = {row: Reject("decode", "timeout", str(writer), False) for row in rejected}
        x = np.array([[writer, row] for row in range(NUM_ROWS)], np.float32)
        ragged = [np.full((row, 1), writer, np.float32) for row in range(NUM_ROWS)]
        return ChunkRows([f"{chunk.shard}/{chunk.index}/{row}" for row in range(NUM_ROWS)], rejects, {"x": x, "ragged": ragged})

    # what processes do

    def write(self, chunk: Chunk, rejected: set[int]) -> None:
        self.set.write(0, chunk, self.rows(chunk, rejected), num_rows=NUM_ROWS)

    def amend(self, chunk: Chunk, rejected: set[int], redone: set[int]) -> None:
        rows = self.rows(chunk, rejected)
        self.redone[self.num_writers] = redone
        with suppress(LabelsMissing):
            self.set.amend(0, chunk, rows, sorted(redone))

    def compact(self, chunk: Chunk) -> None:
        with suppress(LabelsMissing):
            self.set.compact(0, chunk.shard, NUM_CHUNKS)

    def clean(self) -> None:
        drop_superseded(self.set)

    def operation(self, kind: str, number: int, rejected: set[int], redone: set[int]) -> Callable[[], None]:
        chunk = self.chunk(number)
        return {
            "write": lambda: self.write(chunk, rejected),
            "amend": lambda: self.amend(chunk, rejected, redone),
            "compact": lambda: self.compact(chunk),
            "clean": self.clean,
        }[kind]

    operations = st.tuples(st.sampled_from(["write", "amend", "compact", "clean"]), st.integers(0, 7), row_sets, row_sets)

    @rule(first=operations)
    def alone(self, first: tuple[Any, ...]) -> None:
        self.operation(*first)()

    @rule(first=operations, moment=st.integers(0, 24))
    def dies(self, first: tuple[Any, ...], moment: int) -> None:
        with self.events.during(moment, self.events.die), suppress(Crash):
            self.operation(*first)()

    @rule(first=operations, moment=st.integers(0, 24), second=operations)
    def while_another_works(self, first: tuple[Any, ...], moment: int, second: tuple[Any, ...]) -> None:
        with self.events.during(moment, self.operation(*second)):
            self.operation(*first)()

    @rule(wanted=st.integers(0, 7), rejected=row_sets)
    def label(self, wanted: int, rejected: set[int]) -> None:
        """A labelling process that does what lacks of one manifest."""
        shards = self.manifests[wanted % len(self.manifests)]
        for chunk in self.set.missing(0, [Chunk(shard, i) for shard in shards for i in range(NUM_CHUNKS)]):
            self.write(chunk, rejected)

    # what the world does

    @precondition(lambda self: len(self.manifests[0]) < 3)
    @rule()
    def grow(self) -> None:
        self.manifests[0].append(f"s{len(self.manifests[0])}")

    @precondition(lambda self: len(self.manifests) < 3)
    @rule(subset=st.sets(st.integers(0, 2), min_size=1), other=st.booleans())
    def another_manifest(self, subset: set[int], other: bool) -> None:
        shards = [shard for i, shard in enumerate(self.manifests[0]) if i in subset]
        self.manifests.append([*shards, *(["other"] if other else [])] or ["other"])

    @precondition(lambda self: self.events.newest)
    @rule()
    def listings_lag(self) -> None:
        self.events.hidden = {self.events.newest}

    @rule()
    def listings_catch_up(self) -> None:
        self.events.hidden = set()

    # what must hold

    def read(self, chunk: Chunk) -> Content | None:
        try:
            table = self.set.read(0, chunk, verify=True)
        except LabelsMissing:
            return None
        assert table["example_id"].to_pylist() == [f"{chunk.shard}/{chunk.index}/{row}" for row in range(NUM_ROWS)]
        labelled = [status == LABELLED for status in table[STATUS].to_pylist()]
        x, ragged, messages = encodings.decode(table, "x"), encodings.decode(table, "ragged"), table["reject_message"].to_pylist()
        for row, ok in enumerate(labelled):
            assert x[row, 1] == (row if ok else 0) and len(ragged[row]) == (row if ok else 0)
            assert (ragged[row] == x[row, 0]).all() and (messages[row] is None) == ok
        return tuple((ok, int(x[row, 0]) if ok else int(messages[row])) for row, ok in enumerate(labelled))

    @invariant()
    def each_chunk_is_missing_or_whole(self) -> None:
        for chunk in self.chunks if self.events.hidden else []:
            assert (found := self.read(chunk)) is None or len(found) == NUM_ROWS

    @invariant()
    def all_is_well_once_listings_have_caught_up(self) -> None:
        hidden, self.events.hidden = self.events.hidden, set()
        self.nothing_is_lost_or_mixed()
        self.counts_add_up()
        self.events.hidden = hidden

    def nothing_is_lost_or_mixed(self) -> None:
        committed = self.set.committed(0)
        for chunk in self.chunks:
            content, history = self.read(chunk), self.seen.setdefault(chunk, {})
            assert (content is None) == (chunk not in committed)
            if content is None:
                assert not history, "a committed chunk is gone"
                continue
            attempt = committed[chunk]
            assert attempt >= max(history, default=0), "a committed attempt is gone"
            assert history.get(attempt, content) == content, "a committed attempt has changed"
            if attempt not in history and history:
                self.check_heritage(history[max(history)], content)
            elif not history:
                self.check_heritage(None, content)
            history[attempt] = content

    def check_heritage(self, before: Content | None, now: Content) -> None:
        """Rows that no retry did again are one writer's; the others are labelled by that retry, or were rejected before."""
        if before is None:
            assert len({writer for _, writer in now if writer not in self.redone}) <= 1
            return
        for row, (old, new) in enumerate(zip(before, now, strict=True)):
            assert old == new or (row in self.redone.get(new[1], set()) and new >= (old[0], 0)), "a label is lost"

    def counts_add_up(self) -> None:
        for shards in self.manifests:
            planned = {Chunk(shard, i): NUM_ROWS for shard in shards for i in range(NUM_CHUNKS)}
            report = verify_files(self.set, 0, planned)
            assert not report.corrupt
            assert report.lacking == self.set.missing(0, list(planned))
            assert report.num_labelled + report.num_rejected == NUM_ROWS * (len(planned) - len(report.lacking))
            assert report.ok == (not report.lacking)
        found = self.set.summary(0)
        contents = [history[max(history)] for history in self.seen.values() if history]
        assert found.num_labelled == sum(ok for content in contents for ok, _ in content)
        assert found.num_rejected == sum(not ok for content in contents for ok, _ in content)


class CommitRuleOnObjects(CommitRule):
    remote = True


# what fails is told as it is: making it smaller may take longer than the test is given
FAST = settings(max_examples=12, stateful_step_count=15, phases=[Phase.generate], print_blob=True)
LONG = settings(FAST, max_examples=200, stateful_step_count=50)


def run(machine: type[CommitRule], profile: settings) -> None:
    case = machine.TestCase()
    case.settings = profile
    case.runTest()


@pytest.mark.parametrize("machine", [CommitRule, CommitRuleOnObjects])
def test_the_commit_rule(machine: type[CommitRule]) -> None:
    run(machine, FAST)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("machine", [CommitRule, CommitRuleOnObjects])
def test_the_commit_rule_for_long(machine: type[CommitRule]) -> None:
    run(machine, LONG)
