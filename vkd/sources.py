"""The rows of a source: a folder, bucket prefix, list file or table, with their uris, labels and columns that pass through."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from vkd import schema
from vkd.errors import ManifestError
from vkd.store import files
from vkd.video import listing
from vkd.video.listing import Info, ProbeLevel
from vkd.video.sources import resolve_uri

TABLE_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
URI_COLUMNS = ("uri", "path", "url", "video")
DUPLICATE_OF = "duplicate_of"  # video_id of the first video with the same content; null for the first
MEASURED = {  # columns that probing fills, and from what of VideoInfo
    schema.DURATION_S: ("duration_s", pa.float64()),
    schema.FPS: ("fps", pa.float64()),
    schema.WIDTH_PX: ("width_px", pa.int32()),
    schema.HEIGHT_PX: ("height_px", pa.int32()),
    schema.CODEC: ("codec", pa.string()),
}
LISTED = (schema.VIDEO_ID, schema.SIZE_BYTES, schema.ETAG, DUPLICATE_OF)  # columns that listing fills
EMPTY_IS_NULL = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])  # an empty cell is no label named ''


def list_rows(source: str, uri_column: str | None, extensions: Sequence[str]) -> tuple[pa.Table, dict[str, Info]]:
    """Rows of a source sorted by uri (column `uri` first, others pass through), and what the listing told of each uri."""
    source = resolve_uri(source) if source.startswith("file://") else source
    with listing.reaching(source):
        if source.lower().endswith(TABLE_SUFFIXES):
            table, infos = _read_table(source, uri_column), {}
        else:
            infos = listing.find(source, extensions)
            table = pa.table({schema.URI: pa.array(list(infos), pa.string())})
    if table.num_rows == 0:
        raise ManifestError(
            "no video found", where=source, action=f"name a folder that holds {' '.join(extensions)} files, or a list of uris"
        )
    uris = table[schema.URI].to_pylist()
    return table.take(sorted(range(len(uris)), key=uris.__getitem__)), infos


def _read_table(source: str, uri_column: str | None) -> pa.Table:
    """A list file or table with its uri column named `uri`, absolute, and first."""
    table = _parse(files.read(resolve_uri(source)), PurePosixPath(source).suffix.lower())
    column = uri_column or next((name for name in URI_COLUMNS if name in table.column_names), None)
    if column is None or column not in table.column_names:
        raise ManifestError(
            f"no uri column {column or ' or '.join(URI_COLUMNS)!r}; it has {', '.join(table.column_names)}",
            where=source,
            action="vkd manifest SOURCE OUT --uri-column NAME",
        )
    base = files.join(os.path.dirname(source if "://" in source else os.path.abspath(source)), "")
    uris = []
    for row, uri in enumerate(table[column].to_pylist()):
        if not isinstance(uri, str) or not uri.strip():
            raise ManifestError(f"row {row} has no uri in column {column!r}", where=source, action="mend or remove the row")
        uris.append(_absolute(uri.strip(), base))
    extras = [name for name in table.column_names if name not in (column, schema.URI)]
    return pa.table({schema.URI: pa.array(uris, pa.string())} | {name: _no_nulls_type(table[name]) for name in extras})


def _parse(data: bytes, suffix: str) -> pa.Table:
    if suffix == ".parquet":
        return pq.read_table(pa.BufferReader(data))
    if suffix in (".csv", ".tsv"):
        options = pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
        # one block: types are inferred from the first block only
        return pyarrow.csv.read_csv(io.BytesIO(data), pyarrow.csv.ReadOptions(block_size=len(data) + 1), options, EMPTY_IS_NULL)
    text = data.decode("utf-8-sig")
    if suffix == ".txt":
        lines = (line.strip() for line in text.splitlines())
        return pa.table({schema.URI: pa.array([line for line in lines if line and not line.startswith("#")], pa.string())})
    rows = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected a list of objects, one a video")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _no_nulls_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without any value as text, so that later rows can bring one."""
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column


def _absolute(uri: str, base: str) -> str:
    if "://" in uri:
        return resolve_uri(uri) if uri.startswith("file://") else uri
    path = uri if os.path.isabs(uri) else base + uri
    return path if "://" in path else os.path.normpath(path)


def prepared(rows: pa.Table, level: ProbeLevel) -> pa.Table:
    """Rows whose own columns do not clash with ours: ids become `source_...`; given measures count only without probing."""
    columns: dict[str, Any] = {}
    for name in rows.column_names:
        if name in MEASURED and level == "none":
            try:
                columns[name] = rows[name].cast(MEASURED[name][1])
            except pa.ArrowException as error:
                raise ManifestError(f"the column {name!r} holds no numbers: {error}", action="mend it, or use --probe header") from error
        elif name not in MEASURED:
            columns[f"source_{name}" if name in LISTED else name] = rows[name]
    return pa.table(columns)


def with_labels(rows: pa.Table, label_from: str | None, source: str) -> pa.Table:
    """Rows with a column `label`: the parent folder's name, another column, or group 1 of a pattern (null where it does not match)."""
    if label_from is None:
        return rows
    kind, _, argument = label_from.partition(":")
    paths = [PurePosixPath(uri) for uri in rows[schema.URI].to_pylist()]
    if kind == "column":
        if argument not in rows.column_names:
            what = f"label_from: no column {argument!r}; it has {', '.join(rows.column_names)}"
            raise ManifestError(what, where=source, action="name one of these")
        labels = rows[argument]
    elif kind == "folder":
        labels = pa.array([path.parent.name for path in paths], pa.string())
    else:
        matches = [re.search(argument, path.name) for path in paths]
        labels = pa.array([match and match.group(1) for match in matches], pa.string())
        if labels.null_count == len(labels):
            raise ManifestError(f"label_from: {argument!r} matches no name, e.g. {paths[0].name}", where=source, action="mend it")
    return pa.table({name: rows[name] for name in rows.column_names} | {schema.LABEL: labels})


def extras(rows: pa.Table) -> list[str]:
    """The columns that pass through from the source."""
    return [name for name in rows.column_names if name not in (schema.URI, *MEASURED, *LISTED)]


def like_earlier(rows: pa.Table, earlier: pa.Schema, out: str) -> pa.Table:
    """Rows whose passing columns have the types and order of a manifest's earlier ones; ManifestError when they cannot."""
    if set(extras(rows)) != set(earlier.names):
        what = f"the source has the columns {extras(rows)}, the manifest's earlier rows {earlier.names}"
        raise ManifestError(what, where=out, action="give the source the same columns, or name another OUT")
    try:
        cast = rows.select(earlier.names).cast(earlier)
    except pa.ArrowException as error:
        what = f"the source's columns do not have the types of the manifest's earlier rows: {error}"
        raise ManifestError(what, where=out, action="mend the source, or name another OUT") from error
    ours = [name for name in rows.column_names if name not in earlier.names]
    return pa.table({name: rows[name] for name in ours} | {name: cast[name] for name in earlier.names})
