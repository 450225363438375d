"""Manifests: immutable shards that list videos, named by the digest of their rows. `build` makes and grows them.

OUT/manifest.json              the settings, and the shards in order
OUT/shards/<digest>.parquet    one row a video, or a video and its caption, moment, ...
OUT/rejects/<digest>.parquet   videos that cannot be used, and why
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vkd import schema, sources
from vkd.errors import ConfigError, ManifestError, redact
from vkd.pools import Progress
from vkd.sources import DUPLICATE_OF, MEASURED
from vkd.store import files
from vkd.video import listing
from vkd.video.access import Access
from vkd.video.listing import Listed, Probed, ProbeLevel

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".m2ts", ".3gp", ".ogv")
REJECTS = pa.schema(
    {schema.VIDEO_ID: pa.string(), schema.URI: pa.string(), "kind": pa.string(), "message": pa.string(), "permanent": pa.bool_()}
)


class BuildOptions(BaseModel):
    """How a source is read. `label_from` is `folder`, `column:NAME`, or `regex:PATTERN` (group 1, searched in the file name).

    Local files are read only in a source folder (beside it, when it is a list) and in the folders of `allow`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    probe: ProbeLevel = "header"
    uri_column: str | None = None
    label_from: str | None = None
    hash: bool = False
    chunk_size: int = Field(default=64, ge=1)
    shard_rows: int = Field(default=8192, ge=1)
    threads: int = Field(default=16, ge=1)
    extensions: tuple[str, ...] = VIDEO_SUFFIXES
    allow: tuple[str, ...] = ()

    @field_validator("label_from")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        kind, _, argument = (value or "folder").partition(":")
        try:
            groups = re.compile(argument).groups if kind == "regex" else 1
        except re.error as error:
            raise ConfigError(f"label_from: {argument!r} is no regular expression: {error}", action="mend the pattern") from error
        if (kind, bool(argument)) not in {("folder", False), ("column", True), ("regex", True)} or groups < 1:
            raise ConfigError(f"label_from {value!r} is not understood", action="use folder, column:NAME or regex:PATTERN with a group")
        return value


class Shard(BaseModel):
    name: str = Field(pattern=r"^[0-9a-f]{16}$")
    rows: int = Field(ge=0)


class Index(BaseModel):
    """What manifest.json holds."""

    format_version: Literal[1] = 1
    chunk_size: int = Field(ge=1)
    probe: ProbeLevel
    hash: bool
    sources: list[str] = []
    columns: list[str] = []
    shards: list[Shard] = []
    rejects: list[str] = []


@dataclass(frozen=True)
class Report:
    """What a manifest holds after a build: rows, of them new ones and duplicates, and rejects by kind."""

    videos: int
    new: int
    duplicates: int
    rejected: dict[str, int]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.rejected.items()))
        rejected = f"{sum(self.rejected.values())} rejected" + (f" ({kinds})" if kinds else "")
        return f"{self.videos} videos, {self.new} new, {self.duplicates} duplicates, {rejected}"


@dataclass(frozen=True)
class Manifest:
    """A manifest on storage, as it was when loaded."""

    path: str
    index: Index

    @classmethod
    def load(cls, path: str) -> Manifest:
        """Raises ManifestError when there is none, or when it cannot be understood."""
        try:
            return cls(path, Index.model_validate_json(files.read(files.join(path, "manifest.json"))))
        except FileNotFoundError as error:
            raise ManifestError("no manifest here", where=path, action=f"vkd manifest SOURCE {path}") from error
        except ValidationError as error:
            what = f"manifest.json is damaged or of another version: {error.errors()[0]['msg']}"
            raise ManifestError(what, where=path, action=f"move it away, then vkd manifest SOURCE {path}") from error

    @property
    def chunk_size(self) -> int:
        return self.index.chunk_size

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(shard.name for shard in self.index.shards)

    @property
    def num_videos(self) -> int:
        """Rows of all shards: a video with two captions counts twice."""
        return sum(shard.rows for shard in self.index.shards)

    @property
    def digest(self) -> str:
        return schema.digest(*self.shards)

    def read_shard(self, name: str) -> pa.Table:
        """The rows of one shard; ManifestError when they are not those that the name was made from."""
        return _read(self.path, "shards", name)

    def rejects(self) -> pa.Table:
        """uri, kind, message and permanent of each video that cannot be used."""
        return pa.concat_tables([REJECTS.empty_table(), *(_read(self.path, "rejects", name) for name in self.index.rejects)])

    def check(self, columns: Sequence[str]) -> None:
        """Raises ManifestError for the first column that is not there."""
        for name in columns:
            if name not in self.index.columns:
                has = ", ".join(self.index.columns) or "no videos"
                action = "build it into another OUT from a table that has this column, or with --label-from"
                raise ManifestError(f"the manifest lacks the column {name!r}; it has {has}", where=self.path, action=action)


def build(source: str, out: str, options: BuildOptions, progress: Progress | None = None) -> Report:
    """List a source, probe what the manifest does not know yet, and append it as new shards.

    Rows are committed shard by shard, so an interrupted build goes on where it stopped and ends with the same shards.
    Raises ManifestError for a source or settings that do not fit, StorageError when storage fails; no video stops it.
    """
    growth, access = _Growth(source, out, options), Access.to(source, options.allow)
    rows, infos = sources.list_rows(source, options.uri_column, options.extensions)
    rows = sources.with_labels(sources.prepared(rows, options.probe), options.label_from, source)
    uris = list(dict.fromkeys(rows[schema.URI].to_pylist()))
    videos = {video.uri: video for video in listing.describe(uris, infos, access, options, progress)}
    rows = growth.unknown(rows, videos)
    total = len(set(rows[schema.URI].to_pylist()))
    probed: dict[str, Probed] = {}
    for start in range(0, rows.num_rows, options.shard_rows):
        batch = rows.slice(start, options.shard_rows)
        todo = [videos[uri] for uri in dict.fromkeys(batch[schema.URI].to_pylist()) if uri not in probed]
        fresh = listing.probe(todo, options.probe, access, options.threads, listing.shifted(progress, len(probed), total))
        probed |= {item.video.uri: item for item in fresh}
        growth.commit(batch, fresh, probed)
    return growth.report()


class _Growth:
    """A manifest being built: what it holds already, and how shards are added."""

    def __init__(self, source: str, out: str, options: BuildOptions) -> None:
        self.source, self.out, self.index = redact(source), out, _opened(out, options)
        manifest = Manifest(out, self.index)
        rejects = manifest.rejects()
        self.rejected = Counter(rejects["kind"].to_pylist())
        self.known = set(rejects[schema.VIDEO_ID].to_pylist())  # ids of rejected videos and keys of rows
        self.first: dict[tuple[int, str], str] = {}  # content -> the video_id that had it first
        self.row_schema: pa.Schema | None = None
        self.num_new = self.num_duplicates = 0
        for name in manifest.shards:
            self._remember(manifest.read_shard(name))

    def unknown(self, rows: pa.Table, videos: Mapping[str, Listed]) -> pa.Table:
        """The rows that are in neither shards nor rejects, each once, with the column types of the earlier ones."""
        if self.row_schema is not None:
            rows = sources.like_earlier(rows, self.row_schema, self.out)
        video_ids = [videos[uri].video_id for uri in rows[schema.URI].to_pylist()]
        keys = dict(zip(reversed(_row_keys(video_ids, rows)), reversed(range(rows.num_rows)), strict=True))
        fresh = (row for key, row in keys.items() if key not in self.known and video_ids[row] not in self.known)
        return rows.take(pa.array(sorted(fresh), pa.int64()))

    def commit(self, batch: pa.Table, fresh: Sequence[Probed], probed: Mapping[str, Probed]) -> None:
        """Write one batch: its rejects (those of `fresh`), its shard, and last the manifest that names them."""
        faults = [(item.video, item.fault) for item in fresh if item.fault is not None]
        uris = batch[schema.URI].to_pylist()
        kept = [row for row, uri in enumerate(uris) if probed[uri].fault is None]
        if faults:
            values = [[v.video_id, redact(v.uri), fault.kind, fault.what, fault.permanent] for v, fault in faults]
            rejects = pa.table(list(zip(*values, strict=True)), schema=REJECTS)
            self.index.rejects.append(write_rows(self.out, "rejects", rejects))
            self.rejected.update(rejects["kind"].to_pylist())
        if kept:
            shard = self._shard(batch.take(pa.array(kept, pa.int64())), [probed[uris[row]] for row in kept])
            self.index.shards.append(Shard(name=write_rows(self.out, "shards", shard), rows=shard.num_rows))
            self.index.columns = shard.column_names
            self.num_new += shard.num_rows
        if self.source not in self.index.sources:
            self.index.sources.append(self.source)
        files.put(files.join(self.out, "manifest.json"), self.index.model_dump_json(indent=1).encode())

    def report(self) -> Report:
        return Report(Manifest(self.out, self.index).num_videos, self.num_new, self.num_duplicates, dict(self.rejected))

    def _shard(self, rows: pa.Table, items: Sequence[Probed]) -> pa.Table:
        videos = [item.video for item in items]
        columns: dict[str, Any] = {
            schema.VIDEO_ID: pa.array([video.video_id for video in videos], pa.string()),
            schema.URI: rows[schema.URI],
        }
        for name, (attribute, kind) in MEASURED.items():
            given = name in rows.column_names
            columns[name] = rows[name] if given else pa.array([getattr(item.info, attribute, None) for item in items], kind)
        columns[schema.SIZE_BYTES] = pa.array([video.size_bytes for video in videos], pa.int64())
        columns[schema.ETAG] = pa.array([video.etag for video in videos], pa.string())
        columns[DUPLICATE_OF] = pa.array([self._original(video) for video in videos], pa.string())
        shard = pa.table(columns | {name: rows[name] for name in sources.extras(rows)})
        self.num_duplicates += shard.num_rows - shard[DUPLICATE_OF].null_count
        return shard

    def _original(self, video: Listed) -> str | None:
        if video.content is None:
            return None
        first = self.first.setdefault(video.content, video.video_id)
        return None if first == video.video_id else first

    def _remember(self, shard: pa.Table) -> None:
        video_ids = shard[schema.VIDEO_ID].to_pylist()
        self.known.update(_row_keys(video_ids, shard))
        for video_id, size_bytes, etag in zip(video_ids, shard[schema.SIZE_BYTES].to_pylist(), shard[schema.ETAG].to_pylist(), strict=True):
            content = Listed("", size_bytes, etag).content
            if content is not None:
                self.first.setdefault(content, video_id)
        self.num_duplicates += shard.num_rows - shard[DUPLICATE_OF].null_count
        self.row_schema = self.row_schema or pa.schema([shard.schema.field(name) for name in sources.extras(shard)])


def _opened(out: str, options: BuildOptions) -> Index:
    """The index of the manifest at OUT, or a new one."""
    if not files.exists(files.join(out, "manifest.json")):
        return Index(chunk_size=options.chunk_size, probe=options.probe, hash=options.hash)
    index = Manifest.load(out).index
    for name in ("chunk_size", "probe", "hash"):
        was, asked = getattr(index, name), getattr(options, name)
        if was != asked:
            raise ManifestError(f"this manifest was made with {name} {was}, not {asked}", where=out, action="keep it, or name another OUT")
    return index


def _row_keys(video_ids: Sequence[str], rows: pa.Table) -> list[str]:
    """What makes a row that row: its video and all that the source says of it."""
    extras = rows.select(sorted(sources.extras(rows))).to_pylist() if sources.extras(rows) else [{}] * rows.num_rows
    return [schema.digest(video_id, _json(row)) for video_id, row in zip(video_ids, extras, strict=True)]


def _json(row: Mapping[str, object]) -> str:
    return json.dumps(row, default=str)


def rows_digest(table: pa.Table) -> str:
    """Of the values, not of the file: Parquet bytes differ between versions of its writer."""
    return schema.digest(*(_json(row) for row in table.to_pylist()))


def write_rows(out: str, folder: str, table: pa.Table) -> str:
    """Put a table in a folder of the manifest; its name."""
    name, sink = rows_digest(table), pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    files.put(files.join(out, folder, f"{name}.parquet"), sink.getvalue().to_pybytes())
    return name


def _read(out: str, folder: str, name: str) -> pa.Table:
    where, action = files.join(out, folder, f"{name}.parquet"), "restore the file, or build the manifest again into another OUT"
    try:
        table = pq.read_table(pa.BufferReader(files.read(where)))
    except FileNotFoundError as error:
        raise ManifestError("the file is gone", where=where, action=action) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ManifestError(f"the file is damaged: {error}", where=where, action=action) from error
    if rows_digest(table) != name:
        raise ManifestError("the rows are not those that its name was made from", where=where, action=action)
    return table
