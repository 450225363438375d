"""Label sets: one teacher's labels under one fingerprint, committed chunk by chunk.

    <store>/<alias>-<fingerprint>/labelset.json
                                 /view=0/<shard>/chunk-00042.a0.parquet      or, compacted,  .../<shard>/all.parquet

That a chunk file exists is its commit; of one chunk's files the highest attempt wins, and `all.parquet` before an equal attempt.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vkd.errors import LabelsMismatch, LabelsMissing, StorageError, VkdError
from vkd.rounds import Chunk
from vkd.schema import LABELLED, REJECTED, STATUS, Columns, TensorType
from vkd.store import chunkfile, encodings, files
from vkd.store.chunkfile import ChunkInfo, ChunkRows, LabelSetSpec, Reject

__all__ = ["ChunkRows", "LabelSet", "LabelSetSpec", "Reject", "Summary", "VerifyReport", "verify_files"]

DOCUMENT, ALL = "labelset.json", "all.parquet"
MIN_PROBE_COSINE = 0.999
NUM_READERS = 16  # concurrent footer reads: they wait for storage, not for a core
_CHUNK_NAME = re.compile(r"chunk-(\d{5,})\.a(\d+)\.parquet")
_VIEW_NAME = re.compile(r"view=(\d+)")


@dataclass(frozen=True)
class Summary:
    """Counts over the committed chunks of one view; `rejects` by kind."""

    num_chunks: int
    num_labelled: int
    num_rejected: int
    rejects: Mapping[str, int]


@dataclass(frozen=True)
class VerifyReport:
    """What a check of every planned chunk found; `corrupt` holds one message per unusable file."""

    num_planned: int
    num_labelled: int
    num_rejected: int
    lacking: list[Chunk]
    corrupt: list[str]

    @property
    def ok(self) -> bool:
        return not self.lacking and not self.corrupt and self.num_planned == self.num_labelled + self.num_rejected


class _Source(NamedTuple):
    """Where a chunk lies: its attempt and the file in the shard's folder; stamp is size and time of a compacted file."""

    attempt: int
    name: str
    stamp: chunkfile.Stamp | None = None


class LabelSet:
    """One folder of the store. Holds no state but what labelset.json says, so it may be sent to other processes."""

    def __init__(self, uri: str, document: Mapping[str, Any]) -> None:
        self.uri = uri
        tensors = {name: TensorType(t["dtype"], tuple(t["shape"])) for name, t in document["tensors"].items()}
        self.spec = LabelSetSpec(document["alias"], document["fields"], tensors, document["encodings"])
        self.recorded: Mapping[str, Any] = document["recorded"]
        self.fidelity: Mapping[str, Any] = document["fidelity"]
        self.probe = {name: _array_of(told) for name, told in document["probe"].items()}

    @classmethod
    def create(cls, store: str, spec: LabelSetSpec, probe: Columns, recorded: Mapping[str, Any], fidelity: Mapping[str, Any]) -> LabelSet:
        """The set of a spec, made when absent. Raises LabelsMismatch when the one there has other fields or another probe."""
        uri = files.join(store, spec.name)
        document = _document(uri)
        if document is None:
            told = {name: _told(value) for name, value in probe.items()}
            document = {"alias": spec.alias, "fingerprint": spec.fingerprint, **spec.hashed}
            document |= {"recorded": dict(recorded), "fidelity": dict(fidelity), "probe": told}
            files.put(files.join(uri, DOCUMENT), json.dumps(document, indent=1, default=str).encode())
        _check_fields(uri, document, spec)
        label_set = cls(uri, document)
        label_set.check_probe(probe)
        return label_set

    @classmethod
    def open(cls, store: str, spec: LabelSetSpec) -> LabelSet:
        """The set of a spec. Raises LabelsMissing, which names what differs in the nearest set of the same alias."""
        uri = files.join(store, spec.name)
        document = _document(uri)
        if document is None:
            raise LabelsMissing(f"no labels {spec.name}{_nearest(store, spec)}", where=store, action="vkd label RUN")
        _check_fields(uri, document, spec)
        return cls(uri, document)

    @classmethod
    def at(cls, uri: str) -> LabelSet:
        """The set in a folder, whatever its fields. Raises LabelsMissing when the folder holds none."""
        document = _document(uri.rstrip("/"))
        if document is None:
            raise LabelsMissing("no label set here", where=uri, action="vkd label RUN, or name a folder with labelset.json")
        return cls(uri.rstrip("/"), document)

    def check_probe(self, outputs: Columns) -> None:
        """Compare a teacher's output on the probe with the set's own. Raises LabelsMismatch under a cosine of 0.999."""
        for name in sorted(set(self.probe) | set(outputs)):
            theirs, ours = self.probe.get(name), None if name not in outputs else _flat(outputs[name])
            same_shape = theirs is not None and ours is not None and theirs.shape == ours.shape
            found = encodings.cosine(np.float64(theirs).ravel(), np.float64(ours).ravel()) if same_shape else float("nan")
            if not found >= MIN_PROBE_COSINE:
                raise LabelsMismatch(
                    f"probe of {name!r} differs: cosine {found:.4f}, at least {MIN_PROBE_COSINE} is asked",
                    where=self.uri,
                    action="this machine's teacher computes something else: mend its files or precision, or label into another store",
                )

    def write(self, view: int, chunk: Chunk, rows: ChunkRows, attempt: int = 0, num_rows: int | None = None) -> None:
        """Commit one chunk. `num_rows` is what the plan says: another count means that a block was cut, and is refused."""
        if num_rows is not None and len(rows.example_ids) != num_rows:
            what = f"a block of {len(rows.example_ids)} rows is not the chunk of {num_rows}"
            raise VkdError(what, where=f"{chunk.shard}/{chunk.index}", action="report this: one chunk must stay one block")
        table = chunkfile.to_table(rows, self.spec)
        info = chunkfile.info_of(table, chunk.index, attempt)
        data = chunkfile.to_bytes([(info, table)], one_group_each=False)
        files.put(files.join(self._folder(view, chunk.shard), _chunk_name(chunk.index, attempt)), data)

    def read(
        self, view: int, chunk: Chunk, columns: Sequence[str] | None = None, verify: bool = False, attempt: int | None = None
    ) -> pa.Table:
        """One chunk's highest attempt: id and status with the given labels, or everything; `verify` checks the digest.

        An `attempt` from `committed` saves the listing. Raises LabelsMissing, and StorageError for a corrupt file.
        """
        guess = None if attempt is None else _Source(attempt, _chunk_name(chunk.index, attempt))
        for _ in range(3):  # a compaction may take a file away between listing and reading it
            source = guess or self._sources(view, chunk.shard).get(chunk.index)
            guess = None
            if source is None:
                break
            with suppress(FileNotFoundError):
                return self._read(view, chunk, source, columns, verify)[1]
        what = f"chunk {chunk.index} of shard {chunk.shard}, view {view} is not labelled"
        raise LabelsMissing(what, where=self.uri, action="vkd label RUN")

    def committed(self, view: int) -> dict[Chunk, int]:
        """The highest attempt of every chunk that is there; one listing per shard (and the footer of a compacted one)."""
        shards = files.list_names(files.join(self.uri, f"view={view}"))
        return {Chunk(s, i): source.attempt for s in shards for i, source in sorted(self._sources(view, s).items())}

    def missing(self, view: int, planned: Sequence[Chunk]) -> list[Chunk]:
        """The planned chunks that are not there, in planned order."""
        there = {shard: self._sources(view, shard) for shard in {chunk.shard for chunk in planned}}
        return [chunk for chunk in planned if chunk.index not in there[chunk.shard]]

    def views(self) -> list[int]:
        """Numbers of the views that have a folder."""
        return sorted(int(found[1]) for name in files.list_names(self.uri) if (found := _VIEW_NAME.fullmatch(name)))

    def compact(self, view: int, shard: str, num_chunks: int) -> None:
        """Put the chunks of a complete shard in one file, then drop theirs; may be repeated after a crash or a new attempt.

        The file is made in memory; one process at a time per shard. Raises LabelsMissing when the shard is not complete.
        """
        folder, sources = self._folder(view, shard), self._sources(view, shard)
        lacking = [index for index in range(num_chunks) if index not in sources]
        if lacking:
            what = f"{len(lacking)} of {num_chunks} chunks lack, the first is {lacking[0]}"
            raise LabelsMissing(what, where=folder, action="vkd label RUN, then compact")
        if any(sources[index].name != ALL for index in range(num_chunks)):
            parts = (self._read(view, Chunk(shard, index), sources[index], None, True) for index in range(num_chunks))
            files.put(files.join(folder, ALL), chunkfile.to_bytes(parts, one_group_each=True))
        for name in files.list_names(folder):
            found = _CHUNK_NAME.fullmatch(name)
            if found and int(found[1]) < num_chunks and int(found[2]) <= sources[int(found[1])].attempt:
                files.delete(files.join(folder, name))

    def summary(self, view: int) -> Summary:
        """Counts of one view, from footers only."""
        shards = files.list_names(files.join(self.uri, f"view={view}"))
        with ThreadPoolExecutor(NUM_READERS) as pool:
            infos = [info for found in pool.map(lambda shard: self._infos(view, shard), shards) for info in found]
        rejects = sum((Counter(info.rejects) for info in infos), Counter[str]())
        num_rejected = sum(rejects.values())
        return Summary(len(infos), sum(info.num_rows for info in infos) - num_rejected, num_rejected, dict(sorted(rejects.items())))

    def newest_times(self, count: int = 200) -> list[float]:
        """When the newest chunk files were committed, ascending, in seconds since 1970."""
        folders = [files.join(self.uri, f"view={view}") for view in self.views()]
        shards = [files.join(folder, shard) for folder in folders for shard in files.list_names(folder)]
        return sorted(time for folder in shards for name, _, time in files.list_infos(folder) if _CHUNK_NAME.fullmatch(name))[-count:]

    def _folder(self, view: int, shard: str) -> str:
        return files.join(self.uri, f"view={view}", shard)

    def _sources(self, view: int, shard: str) -> dict[int, _Source]:
        """The winning file of each chunk of a shard."""
        folder = self._folder(view, shard)
        names, sources = files.list_names(folder), dict[int, _Source]()
        if ALL in names:
            stamp = next((size, time) for name, size, time in files.list_infos(folder) if name == ALL)
            infos = chunkfile.infos(files.join(folder, ALL), stamp)
            sources = {info.index: _Source(info.attempt, ALL, stamp) for info in infos}
        for found in filter(None, map(_CHUNK_NAME.fullmatch, names)):
            index, attempt = int(found[1]), int(found[2])
            if index not in sources or attempt > sources[index].attempt:
                sources[index] = _Source(attempt, found[0])
        return sources

    def _read(self, view: int, chunk: Chunk, source: _Source, columns: Sequence[str] | None, verify: bool) -> tuple[ChunkInfo, pa.Table]:
        uri = files.join(self._folder(view, chunk.shard), source.name)
        return chunkfile.read(uri, chunk.index, columns, verify, source.stamp)

    def _infos(self, view: int, shard: str) -> list[ChunkInfo]:
        folder, sources = self._folder(view, shard), self._sources(view, shard)
        found = [
            info
            for name, stamp in {(s.name, s.stamp) for s in sources.values()}
            for info in chunkfile.infos(files.join(folder, name), stamp)
        ]
        return [info for info in found if sources[info.index].attempt == info.attempt]


def verify_files(label_set: LabelSet, view: int, planned: Mapping[Chunk, int]) -> VerifyReport:
    """Read every planned chunk (chunk -> rows) and check digest and row count: planned = labelled + rejected."""
    lacking: list[Chunk] = []
    corrupt: list[str] = []
    statuses: Counter[str] = Counter()
    for chunk, num_rows in planned.items():
        try:
            table = label_set.read(view, chunk, verify=True)
        except LabelsMissing:
            lacking.append(chunk)
        except StorageError as error:
            if error.passing:
                raise
            corrupt.append(str(error))
        else:
            statuses.update(table[STATUS].to_pylist())
            if table.num_rows != num_rows:
                corrupt.append(f"chunk {chunk.index} of shard {chunk.shard} has {table.num_rows} rows, the plan has {num_rows}")
    return VerifyReport(sum(planned.values()), statuses[LABELLED], statuses[REJECTED], lacking, list(dict.fromkeys(corrupt)))


def _chunk_name(index: int, attempt: int) -> str:
    return f"chunk-{index:05d}.a{attempt}.parquet"


def _document(uri: str) -> dict[str, Any] | None:
    """labelset.json of a folder; None when there is none."""
    where = files.join(uri, DOCUMENT)
    try:
        document: dict[str, Any] = json.loads(files.read(where))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"not JSON: {error}", where=where, action="restore this file or delete its folder") from error
    return document


def _check_fields(uri: str, document: Mapping[str, Any], spec: LabelSetSpec) -> None:
    differences = spec.differences(document)
    if differences:
        action = "use another store, or restore its labelset.json"
        raise LabelsMismatch(f"the labels differ in {differences[0]}", where=uri, action=action)


def _nearest(store: str, spec: LabelSetSpec) -> str:
    """What to add to `no labels` when sets of the same alias are there: the nearest one and its first difference."""
    names = [name for name in files.list_names(store) if re.fullmatch(re.escape(spec.alias) + "-[0-9a-f]{12}", name)]
    others = [(name, spec.differences(document)) for name in names if (document := _document(files.join(store, name)))]
    others = sorted((pair for pair in others if pair[1]), key=lambda pair: len(pair[1]))
    return f"; the store has {others[0][0]}, which differs in {others[0][1][0]}" if others else ""


def _flat(value: Any) -> np.ndarray:
    """Float32 values of a probe output; the rows of a ragged one are joined."""
    rows = list(value) if isinstance(value, list) or value.dtype == object else None
    return np.asarray(value if rows is None else np.concatenate(rows), np.float32)


def _told(value: Any) -> dict[str, Any]:
    array = np.ascontiguousarray(_flat(value))
    return {"shape": list(array.shape), "float32_base64": base64.b64encode(array.tobytes()).decode()}


def _array_of(told: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(told["float32_base64"]), np.float32).reshape(told["shape"])
