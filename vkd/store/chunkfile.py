"""What a label set holds, and the Parquet bytes of its chunks: one chunk a file, or a whole shard with one row group a chunk.

The footer's `vkd.chunks` tells of each chunk its attempt, counts and content digest, so that counting reads footers only.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from vkd import schema
from vkd.errors import ConfigError, StorageError, TeacherError
from vkd.schema import TensorType
from vkd.store import encodings, faults, files
from vkd.store.digest import content_digest
from vkd.store.faults import UNREACHABLE

CHUNKS = b"vkd.chunks"
FORMAT_VERSION = 2
TAIL_BYTES = 1 << 16
ROWS_PER_GROUP = 8  # of chunk files with variable-length tensors
Stamp = tuple[int, float]  # size in bytes and modification time of a compacted shard
_TEXTS = (schema.STATUS, schema.REJECT_STAGE, schema.REJECT_KIND, schema.REJECT_MESSAGE, schema.REJECT_DECODER)


@dataclass(frozen=True)
class LabelSetSpec:
    """What labels are: everything here but the alias is hashed. Encodings left out take their default.

    Raises ConfigError when an encoding is unknown or cannot hold its tensor.
    """

    alias: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, TensorType]
    encodings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.encodings) - set(self.tensors))
        if unknown:
            raise ConfigError(f"encoding of the unknown label {unknown[0]!r}", where=self.alias, action=f"it has {', '.join(self.tensors)}")
        chosen = {name: self.encodings.get(name, encodings.default_encoding(tensor)) for name, tensor in self.tensors.items()}
        for name, tensor in self.tensors.items():
            encodings.check(name, tensor, chosen[name])
        object.__setattr__(self, "encodings", chosen)

    @property
    def hashed(self) -> dict[str, Any]:
        """What the fingerprint covers, as plain JSON."""
        tensors = {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in self.tensors.items()}
        parts = {"fields": self.fields, "tensors": tensors, "encodings": self.encodings, "format_version": FORMAT_VERSION}
        plain: dict[str, Any] = json.loads(json.dumps(parts, sort_keys=True, default=dict))
        return plain

    def differences(self, theirs: Mapping[str, Any]) -> list[str]:
        """`data.views.seed: 0 there, 1 here` of each value that differs from those of another `hashed`."""
        rest = ("tensors", "encodings", "format_version")
        here, there = (
            dict(_leaves(hashed["fields"], "")) | dict(_leaves({part: hashed[part] for part in rest}, ""))
            for hashed in (self.hashed, theirs)
        )
        paths = [path for path in {**here, **there} if here.get(path, "absent") != there.get(path, "absent")]
        return [f"{path}: {there.get(path, 'absent')} there, {here.get(path, 'absent')} here" for path in paths]

    @property
    def fingerprint(self) -> str:
        return schema.digest(json.dumps(self.hashed, sort_keys=True, separators=(",", ":")), num_chars=12)

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.alias}-{self.fingerprint}"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path, value
    for key, inner in items:
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


@dataclass(frozen=True)
class Reject:
    """Why one example has no labels: where it failed, the short reason that is counted, whether to try again is in vain, by whom."""

    stage: str
    kind: str
    message: str
    permanent: bool
    attempts: int = 1
    decoder: str = ""


@dataclass(frozen=True)
class ChunkRows:
    """All rows of one chunk in manifest order. Labels have every row; those of rejected rows are ignored (None when ragged)."""

    example_ids: Sequence[str]
    rejects: Mapping[int, Reject]
    labels: Mapping[str, encodings.Values]

    def only(self, rows: Collection[int]) -> ChunkRows:
        """The same with all but some rows rejected, so that their labels are not looked at."""
        others = {row: Reject("", "", "", False) for row in range(len(self.example_ids)) if row not in rows}
        return replace(self, rejects=dict(self.rejects) | others)


@dataclass(frozen=True)
class ChunkInfo:
    """What a footer tells of one chunk; `rejects` counts by kind."""

    index: int
    attempt: int
    num_rows: int
    rejects: Mapping[str, int]
    digest: str

    @property
    def num_rejected(self) -> int:
        return sum(self.rejects.values())

    @property
    def num_labelled(self) -> int:
        return self.num_rows - self.num_rejected


def to_table(rows: ChunkRows, spec: LabelSetSpec) -> pa.Table:
    """Ids, statuses, rejects and encoded labels. Raises TeacherError when labels and tensor types disagree."""
    num_rows = len(rows.example_ids)
    valid = np.array([i not in rows.rejects for i in range(num_rows)], bool)
    if not set(rows.rejects) <= set(range(num_rows)):
        raise TeacherError(f"rejects name rows outside 0..{num_rows - 1}", action="give rejects by row of the chunk")
    if set(rows.labels) != set(spec.tensors) and valid.any():
        raise TeacherError(f"labels are {sorted(rows.labels)}, declared are {sorted(spec.tensors)}", action="mend the teacher's emits")
    rejects = [rows.rejects.get(i) for i in range(num_rows)]

    def told(attribute: str, kind: pa.DataType) -> pa.Array:
        return pa.array([None if reject is None else getattr(reject, attribute) for reject in rejects], kind)

    statuses = [schema.LABELLED if ok else schema.REJECTED for ok in valid]
    table = {
        schema.EXAMPLE_ID: pa.array(list(rows.example_ids), pa.string()),
        schema.STATUS: pa.array(statuses, pa.string()),
        schema.REJECT_STAGE: told("stage", pa.string()),
        schema.REJECT_KIND: told("kind", pa.string()),
        schema.REJECT_MESSAGE: told("message", pa.string()),
        schema.REJECT_PERMANENT: told("permanent", pa.bool_()),
        schema.ATTEMPTS: told("attempts", pa.int32()),
        schema.REJECT_DECODER: told("decoder", pa.string()),
    }
    fields = [pa.field(name, array.type) for name, array in table.items()]
    arrays = list(table.values())
    for name, tensor in spec.tensors.items():
        values = rows.labels.get(name, [None] * num_rows)
        columns = encodings.encode(name, values, valid, tensor, spec.encodings[name])
        fields += [column for column, _ in columns]
        arrays += [array for _, array in columns]
    return pa.table(arrays, schema=pa.schema(fields))


def replaced(stored: pa.Table, fresh: pa.Table, rows: Collection[int]) -> pa.Table:
    """The stored table with some rows of another one in their places; no value is decoded."""
    if stored.column_names != fresh.column_names or stored.schema.types != fresh.schema.types:
        raise StorageError("the stored columns are not those of the label set", action="vkd verify RUN finds the damaged file")
    same = pa.Table.from_arrays(stored.columns, schema=fresh.schema)  # less what Parquet adds to the metadata of fields
    order = [stored.num_rows + row if row in rows else row for row in range(stored.num_rows)]
    return pa.concat_tables([same, fresh]).take(pa.array(order, pa.int64())).combine_chunks()


def info_of(table: pa.Table, index: int, attempt: int) -> ChunkInfo:
    """The facts of a chunk's table."""
    kinds = Counter(table[schema.REJECT_KIND].drop_null().to_pylist())
    return ChunkInfo(index, attempt, table.num_rows, dict(sorted(kinds.items())), content_digest(table))


def to_bytes(parts: Iterable[tuple[ChunkInfo, pa.Table]], *, one_group_each: bool) -> bytes:
    """A Parquet file of one or more chunks of equal schema, in the given order."""
    infos, sink, writer = [], pa.BufferOutputStream(), None
    for info, table in parts:
        writer = writer or _writer(sink, table.schema)
        small = not one_group_each and any(pa.types.is_large_binary(column.type) for column in table.schema)
        writer.write_table(table, ROWS_PER_GROUP if small else max(table.num_rows, 1))
        infos.append(asdict(info))
    if writer is None:
        raise ValueError("no chunks")
    writer.add_key_value_metadata({CHUNKS: json.dumps(infos).encode()})
    writer.close()
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _writer(sink: pa.NativeFile, table_schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(sink, table_schema, compression="zstd", use_dictionary=list(_TEXTS), write_statistics=False)


def read(uri: str, index: int, columns: Sequence[str] | None, verify: bool, stamp: Stamp | None = None) -> tuple[ChunkInfo, pa.Table]:
    """One chunk: from its own file by one whole read, or, given a `stamp`, from a compacted shard by its row group.

    Raises FileNotFoundError, and StorageError when the file is corrupt.
    """
    if stamp is None:
        return _parse(files.read(uri), index, columns, verify, uri)
    footer = _footer(uri, stamp)

    def once() -> tuple[ChunkInfo, pa.Table]:
        with _readable(uri), _opened(uri) as handle:
            return _read(handle, index, columns, verify, footer)

    return files.patiently(once, uri)


def parse(data: bytes, index: int, where: str) -> pa.Table:
    """All of one chunk, from the bytes of its file. Raises StorageError, with `where`, when they are corrupt."""
    return _parse(data, index, None, False, where)[1]


def _parse(data: bytes, index: int, columns: Sequence[str] | None, verify: bool, where: str) -> tuple[ChunkInfo, pa.Table]:
    with _readable(where):
        return _read(io.BytesIO(data), index, columns, verify)


def _read(handle: Any, index: int, columns: Sequence[str] | None, verify: bool, footer: Any = None) -> tuple[ChunkInfo, pa.Table]:
    file = pq.ParquetFile(handle, metadata=footer, pre_buffer=True)
    infos = _infos(file.metadata)
    place = next(i for i, info in enumerate(infos) if info.index == index)
    names = _with_companions(file.schema_arrow.names, columns)
    groups = list(range(file.num_row_groups)) if footer is None else [place]
    table = file.read_row_groups(groups, None if verify else names, use_threads=False).replace_schema_metadata(None)
    if infos[place].num_rows != table.num_rows or (verify and content_digest(table) != infos[place].digest):
        raise ValueError("its content does not match its digest")
    return infos[place], table.select(names)


def _with_companions(names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    wanted = names if columns is None else (schema.EXAMPLE_ID, schema.STATUS, *columns)
    return [name for name in names if any(name == want or name.startswith(f"{want}.") for want in wanted)]


def infos(uri: str, stamp: Stamp | None = None) -> list[ChunkInfo]:
    """The facts of every chunk in a file, from its footer only; given a `stamp`, the footer is kept while that stays."""
    footer = _read_footer(uri) if stamp is None else _footer(uri, stamp)
    with _readable(uri):
        return _infos(footer)


def _opened(uri: str) -> AbstractContextManager[Any]:
    fs, path = files.filesystem(uri)
    return fs.open(path, "rb", cache_type="none")  # type: ignore[no-any-return]  # read-ahead would fetch the next chunks too


@lru_cache(maxsize=64)
def _footer(uri: str, stamp: Stamp) -> pq.FileMetaData:
    return _read_footer(uri)


def _read_footer(uri: str) -> pq.FileMetaData:
    with _readable(uri):
        tail = files.read(uri, start=-TAIL_BYTES)
        num_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if num_bytes > len(tail) and tail.endswith(b"PAR1"):
            tail = files.read(uri, start=-num_bytes)
        return pq.read_metadata(pa.BufferReader(tail))


def _infos(footer: pq.FileMetaData) -> list[ChunkInfo]:
    return _infos_adapter().validate_json(footer.metadata[CHUNKS])  # a ValidationError is a ValueError


@lru_cache(maxsize=1)
def _infos_adapter() -> TypeAdapter[list[ChunkInfo]]:
    """Made once: that takes longer than reading a chunk does."""
    return TypeAdapter(list[ChunkInfo])


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    """Turn what reading a file raises into a StorageError; a plain OSError without a number is Arrow's word for the content."""
    try:
        yield
    except (*UNREACHABLE, pa.ArrowException, ValueError, KeyError, TypeError, StopIteration) as error:
        if isinstance(error, UNREACHABLE) and not (type(error) is OSError and error.errno is None):
            if faults.is_missing(error):
                raise FileNotFoundError(uri) from error
            raise faults.told(uri, error) from error
        action = "delete it (vkd verify lists all such files), then run the same command again"
        raise StorageError(f"corrupt label file: {type(error).__name__}: {error}", where=uri, action=action) from error
