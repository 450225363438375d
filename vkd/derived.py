"""Manifests whose rows are no videos of a source, but were made from what is stored, such as pairs of videos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from vkd.errors import ManifestError
from vkd.manifest import Index, Manifest, Shard, rows_digest, write_rows
from vkd.store import files


def write(out: str, tables: Iterable[pa.Table], chunk_size: int, sources: Sequence[str]) -> Manifest:
    """A manifest of these tables, each a shard; they have `video_id` and `duration_s`. `sources`: what they were made from.

    The same call again changes nothing. Raises ManifestError when another manifest is there: what labels were made of never changes.
    """
    there = Manifest.load(out).index if files.exists(files.join(out, "manifest.json")) else None
    index = Index(chunk_size=chunk_size, probe="none", hash=False, sources=[*sources])
    if there is not None and (there.chunk_size, there.sources) != (index.chunk_size, index.sources):
        raise _other(out)
    for number, table in enumerate(tables):
        shard = Shard(name=rows_digest(table) if there else write_rows(out, "shards", table), rows=table.num_rows)
        if there is not None and there.shards[number : number + 1] != [shard]:
            raise _other(out)
        index.shards.append(shard)
        index.columns = table.column_names
    if there is None:
        files.put(files.join(out, "manifest.json"), index.model_dump_json(indent=1).encode())
    elif there != index:
        raise _other(out)
    return Manifest(out, index)


def _other(out: str) -> ManifestError:
    what = "a manifest of other rows is here; it and what was made from it must not mix with these"
    return ManifestError(what, where=out, action="name another OUT, or delete this folder if nothing uses it")
