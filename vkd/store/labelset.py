"""Label sets: one teacher's labels under one fingerprint, committed chunk by chunk.

    <store>/<alias>-<fingerprint>/labelset.json
                                 /view=0/<shard>/chunk-00042.a0.parquet      or, compacted,  .../<shard>/all.parquet

That a chunk file exists is its commit; which file of a chunk counts, `layout` says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from vkd.errors import LabelsMismatch, LabelsMissing, StorageError, VkdError
from vkd.rounds import Chunk
from vkd.schema import EXAMPLE_ID, LABELLED, REJECT_STAGE, STATUS, Columns, TensorType
from vkd.store import chunkfile, document, encodings, files, forgotten, layout
from vkd.store.chunkfile import ChunkInfo, ChunkRows, LabelSetSpec, Reject
from vkd.store.layout import ALL, DOCUMENT, ShardFiles, Source

__all__ = ["DOCUMENT", "ChunkRows", "LabelSet", "LabelSetSpec", "Reject", "Summary"]

MIN_PROBE_COSINE = 0.999
LISTINGS = 3  # how often a shard that changes meanwhile is listed again
NUM_READERS = 16  # concurrent footer reads: they wait for storage, not for a core
Result = TypeVar("Result")


@dataclass(frozen=True)
class Summary:
    """Counts over the committed chunks of one view; `rejects` by kind."""

    num_chunks: int
    num_labelled: int
    num_rejected: int
    rejects: Mapping[str, int]


class LabelSet:
    """One folder of the store. Holds no state but what labelset.json says, so it may be sent to other processes."""

    def __init__(self, uri: str, told: Mapping[str, Any]) -> None:
        self.uri = uri
        self.recorded: Mapping[str, Any] = told["recorded"]
        self.fidelity: Mapping[str, Any] = told["fidelity"]
        try:
            tensors = {name: TensorType(t["dtype"], tuple(t["shape"])) for name, t in told["tensors"].items()}
            self.spec = LabelSetSpec(told["alias"], told["fields"], tensors, told["encodings"])
            self.probe = {name: document.array_of(array) for name, array in told["probe"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            action = "restore this file, or delete its folder and label again"
            raise StorageError(f"{DOCUMENT} is damaged: {type(error).__name__}: {error}", where=uri, action=action) from error

    @classmethod
    def create(cls, store: str, spec: LabelSetSpec, probe: Columns, recorded: Mapping[str, Any], fidelity: Mapping[str, Any]) -> LabelSet:
        """The set of a spec, made when absent. Raises LabelsMismatch when the one there has other fields or another probe."""
        uri = files.join(store, spec.name)
        if document.load(uri) is None:
            told: dict[str, Any] = {"alias": spec.alias, "fingerprint": spec.fingerprint, **spec.hashed}
            told |= {"recorded": dict(recorded), "fidelity": dict(fidelity)}
            told["probe"] = {name: document.told(value) for name, value in probe.items()}
            files.put(files.join(uri, DOCUMENT), json.dumps(told, indent=1, default=str).encode(), new=True)  # the first one's probe stays
        label_set = cls.open(store, spec)
        label_set.check_probe(probe)
        return label_set

    @classmethod
    def open(cls, store: str, spec: LabelSetSpec) -> LabelSet:
        """The set of a spec. Raises LabelsMissing, which names what differs in the nearest set of the same alias."""
        found = cls.find(store, spec)
        if found is None:
            raise LabelsMissing(f"no labels {spec.name}{document.nearest(store, spec)}", where=store, action="vkd label RUN")
        return found

    @classmethod
    def find(cls, store: str, spec: LabelSetSpec) -> LabelSet | None:
        """The set of a spec; None when there is none."""
        uri = files.join(store, spec.name)
        told = document.load(uri)
        if told is None:
            return None
        document.check_fields(uri, told, spec)
        return cls(uri, told)

    @classmethod
    def at(cls, uri: str) -> LabelSet:
        """The set in a folder, whatever its fields. Raises LabelsMissing when the folder holds none."""
        told = document.load(uri.rstrip("/"))
        if told is None:
            raise LabelsMissing("no label set here", where=uri, action="vkd label RUN, or name a folder with labelset.json")
        return cls(uri.rstrip("/"), told)

    def check_probe(self, outputs: Columns) -> None:
        """Compare a teacher's output on the probe with the set's own. Raises LabelsMismatch under a cosine of 0.999."""
        for name in sorted(set(self.probe) | set(outputs)):
            theirs, ours = self.probe.get(name), None if name not in outputs else document.flat(outputs[name])
            same_shape = theirs is not None and ours is not None and theirs.shape == ours.shape
            found = encodings.cosine(np.float64(theirs).ravel(), np.float64(ours).ravel()) if same_shape else float("nan")
            if not found >= MIN_PROBE_COSINE:
                raise LabelsMismatch(
                    f"probe of {name!r} differs: cosine {found:.4f}, at least {MIN_PROBE_COSINE} is asked",
                    where=self.uri,
                    action="this machine's teacher computes something else: mend its files or precision, or label into another store",
                )

    def write(self, view: int, chunk: Chunk, rows: ChunkRows, attempt: int = 0, num_rows: int | None = None) -> bytes | None:
        """Commit one chunk: its file's content, or None when another writer was first.

        `num_rows` is what the plan says: another count means that a block was cut, and is refused.
        """
        if num_rows is not None and len(rows.example_ids) != num_rows:
            what = f"a block of {len(rows.example_ids)} rows is not the chunk of {num_rows}"
            raise VkdError(what, where=f"{chunk.shard}/{chunk.index}", action="report this: one chunk must stay one block")
        return self._commit(view, chunk, chunkfile.to_table(rows, self.spec), attempt)

    def amend(self, view: int, chunk: Chunk, rows: ChunkRows, redone: Sequence[int]) -> int:
        """Commit the next attempt of a chunk, with the `redone` rows of `rows` and all others bit by bit as they are stored.

        Returns the highest attempt. A stored label is not given up for a reject, and what was forgotten stays forgotten. Raises
        LabelsMissing when the chunk was never committed.
        """
        fresh = chunkfile.to_table(rows.only(redone), self.spec)
        now = fresh[STATUS].to_pylist()

        def better(stored: pa.Table) -> list[int]:
            if stored[EXAMPLE_ID].to_pylist() != list(rows.example_ids):
                raise VkdError("the rows are not those of the stored chunk", where=f"{chunk.shard}/{chunk.index}", action="report this")
            was, stages = stored[STATUS].to_pylist(), stored[REJECT_STAGE].to_pylist()
            return [row for row in redone if stages[row] != forgotten.STAGE and (now[row] == LABELLED or was[row] != LABELLED)]

        return self._replace(view, chunk, fresh, better)

    def forget(self, view: int, chunk: Chunk, example_ids: Collection[str]) -> int:
        """Commit the next attempt of a chunk with these examples rejected for good, and return the highest attempt.

        The earlier attempts stay until they are deleted. Raises LabelsMissing when the chunk was never committed.
        """
        ids = self.read(view, chunk, ())[EXAMPLE_ID].to_pylist()
        fresh = chunkfile.to_table(ChunkRows(ids, dict.fromkeys(range(len(ids)), forgotten.REJECT), {}), self.spec)

        def remaining(stored: pa.Table) -> list[int]:
            stages = stored[REJECT_STAGE].to_pylist()
            return [row for row, example_id in enumerate(ids) if example_id in example_ids and stages[row] != forgotten.STAGE]

        return self._replace(view, chunk, fresh, remaining)

    def read(
        self, view: int, chunk: Chunk, columns: Sequence[str] | None = None, verify: bool = False, attempt: int | None = None
    ) -> pa.Table:
        """One chunk's highest attempt: id and status with the given labels, or everything; `verify` checks the digest.

        An `attempt` from `committed` saves the listing. Raises LabelsMissing, and StorageError for a corrupt file.
        """
        guess = None if attempt is None else Source(attempt, layout.chunk_name(chunk.index, attempt))
        if guess is not None:
            with suppress(FileNotFoundError):
                return self._read(view, chunk, guess, columns, verify)[1]
        return self._read_newest(view, chunk, columns, verify)[1]

    def committed(self, view: int) -> dict[Chunk, int]:
        """The highest attempt of every chunk that is there; one listing per shard (and the footer of a compacted one)."""
        shards = layout.shards_of(self.uri, view)
        return {Chunk(s, i): source.attempt for s in shards for i, source in sorted(self._listed(view, s).sources.items())}

    def missing(self, view: int, planned: Sequence[Chunk]) -> list[Chunk]:
        """The planned chunks that are not there, in planned order."""
        there = {shard: self._listed(view, shard).sources for shard in {chunk.shard for chunk in planned}}
        return [chunk for chunk in planned if chunk.index not in there[chunk.shard]]

    def views(self) -> list[int]:
        """Numbers of the views that have a folder."""
        return layout.views_of(self.uri)

    def compact(self, view: int, shard: str, num_chunks: int) -> None:
        """Put the chunks of a complete shard in one file, then drop theirs; may be repeated after a crash or a new attempt.

        The file is made in memory; one process at a time per shard. Raises LabelsMissing when the shard is not complete.
        """
        folder = layout.folder_of(self.uri, view, shard)

        def put_together(listed: ShardFiles) -> None:
            lacking = [index for index in range(num_chunks) if index not in listed.sources]
            if lacking:
                what = f"{len(lacking)} of {num_chunks} chunks lack, the first is {lacking[0]}"
                raise LabelsMissing(what, where=folder, action="vkd label RUN, then compact")
            if any(listed.sources[index].name != ALL for index in range(num_chunks)):
                parts = (self._read(view, Chunk(shard, index), listed.sources[index], None, True) for index in range(num_chunks))
                files.put(files.join(folder, ALL), chunkfile.to_bytes(parts, one_group_each=True))

        self._settled(view, shard, put_together, ask=True)
        for name in layout.list_shard(folder, ask=True).superseded:
            files.delete(files.join(folder, name))

    def summary(self, view: int) -> Summary:
        """Counts of one view, from footers only."""
        infos = [info for _, info in self._facts(view)]
        rejects = sum((Counter(info.rejects) for info in infos), Counter[str]())
        num_rejected = sum(rejects.values())
        return Summary(len(infos), sum(info.num_rows for info in infos) - num_rejected, num_rejected, dict(sorted(rejects.items())))

    def rejecting(self, view: int) -> set[Chunk]:
        """The chunks that have rejects, from footers only."""
        return {chunk for chunk, info in self._facts(view) if info.rejects}

    def newest_times(self, count: int = 200) -> list[float]:
        """When the newest chunk files were committed, ascending, in seconds since 1970."""
        return sorted(
            time for _, _, folder in layout.folders_of(self.uri) for name, _, time in files.list_infos(folder) if layout.is_chunk(name)
        )[-count:]

    def _listed(self, view: int, shard: str) -> ShardFiles:
        return layout.list_shard(layout.folder_of(self.uri, view, shard))

    def _settled(self, view: int, shard: str, act: Callable[[ShardFiles], Result], ask: bool = False) -> Result:
        """What `act` gives for a listing of a shard; a file that is taken away meanwhile asks for another listing."""
        for _ in range(LISTINGS):
            with suppress(FileNotFoundError):
                return act(layout.list_shard(layout.folder_of(self.uri, view, shard), ask=ask))
        where, action = layout.folder_of(self.uri, view, shard), "let the other command on this store end, then run the same command again"
        raise StorageError("files that are listed are gone", where=where, action=action)

    def _read(self, view: int, chunk: Chunk, source: Source, columns: Sequence[str] | None, verify: bool) -> tuple[ChunkInfo, pa.Table]:
        uri = files.join(layout.folder_of(self.uri, view, chunk.shard), source.name)
        return chunkfile.read(uri, chunk.index, columns, verify, source.stamp)

    def _read_newest(
        self, view: int, chunk: Chunk, columns: Sequence[str] | None, verify: bool, ask: bool = False
    ) -> tuple[ChunkInfo, pa.Table]:
        def read_listed(listed: ShardFiles) -> tuple[ChunkInfo, pa.Table]:
            source = listed.sources.get(chunk.index)
            if source is None:
                what = f"chunk {chunk.index} of shard {chunk.shard}, view {view} is not labelled"
                raise LabelsMissing(what, where=self.uri, action="vkd label RUN")
            return self._read(view, chunk, source, columns, verify)

        return self._settled(view, chunk.shard, read_listed, ask)

    def _newest(self, view: int, chunk: Chunk) -> tuple[int, pa.Table]:
        """The highest attempt and all of its rows. Asks for the files that matter by name, since a listing may be late."""
        info, table = self._read_newest(view, chunk, None, True, ask=True)
        while True:
            try:
                after = Source(info.attempt + 1, layout.chunk_name(chunk.index, info.attempt + 1))
                info, table = self._read(view, chunk, after, None, True)
            except FileNotFoundError:
                return info.attempt, table

    def _replace(self, view: int, chunk: Chunk, fresh: pa.Table, choose: Callable[[pa.Table], list[int]]) -> int:
        """Commit the next attempt with the rows of `fresh` that `choose` names for the stored table; nothing when it names none."""
        while True:
            attempt, stored = self._newest(view, chunk)
            rows = choose(stored)
            if not rows:
                return attempt
            if self._commit(view, chunk, chunkfile.replaced(stored, fresh, rows), attempt + 1):
                return attempt + 1  # else another writer was faster: once more, upon its rows

    def _commit(self, view: int, chunk: Chunk, table: pa.Table, attempt: int) -> bytes | None:
        data = chunkfile.to_bytes([(chunkfile.info_of(table, chunk.index, attempt), table)], one_group_each=False)
        where = files.join(layout.folder_of(self.uri, view, chunk.shard), layout.chunk_name(chunk.index, attempt))
        return data if files.put(where, data, new=True) else None

    def _facts(self, view: int) -> list[tuple[Chunk, ChunkInfo]]:
        shards = layout.shards_of(self.uri, view)
        with ThreadPoolExecutor(NUM_READERS) as pool:
            found = pool.map(lambda shard: self._settled(view, shard, partial(self._infos, view, shard)), shards)
            return [(Chunk(shard, info.index), info) for shard, infos in zip(shards, found, strict=True) for info in infos]

    def _infos(self, view: int, shard: str, listed: ShardFiles) -> list[ChunkInfo]:
        folder, sources = layout.folder_of(self.uri, view, shard), listed.sources
        found = [info for info in listed.compacted if sources[info.index].name == ALL]
        for source in sources.values():
            found += [] if source.name == ALL else chunkfile.infos(files.join(folder, source.name))
        return found
