"""Takedowns: the labels and frames of one video leave every label set of a store, and it is never labelled there again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vkd import schema
from vkd.clips import ClipPlan, plan_examples
from vkd.copies import COPY, HOST, ORIGINAL, SOURCE
from vkd.errors import ConfigError
from vkd.manifest import Manifest
from vkd.rounds import Chunk
from vkd.run import Run
from vkd.sources import DUPLICATE_OF
from vkd.store import files, forgotten, layout
from vkd.store.housekeeping import label_sets
from vkd.store.labelset import LabelSet
from vkd.store.layout import ALL


@dataclass(frozen=True)
class Takedown:
    """What was done: chunks that held clips of the videos, of them those written anew now; `copies` show the same."""

    videos: list[str]
    sets: int
    chunks: int
    rewritten: int
    copies: list[str]


def videos_of(run: Run, name: str) -> list[str]:
    """The ids of the videos that a video id or uri names. Raises ConfigError when the manifest has none."""
    found = set[str]()
    for shard in _shards(run).values():
        for column in {schema.VIDEO_ID, schema.URI} & set(shard.column_names):
            found.update(shard.filter(pc.equal(shard[column], name))[schema.VIDEO_ID].to_pylist())
    if not found:
        action = "give a video_id or uri of the manifest"
        raise ConfigError(f"no video {name!r} in the manifest", where=run.data.manifest, action=action)
    return sorted(found)


def forget(run: Run, video_ids: Collection[str]) -> Takedown:
    """Take videos out of every label set of the run's store; repeated after a crash, it goes on.

    Chunks that hold their clips are written anew with these rows rejected, then all older files of those chunks are deleted, and
    what interrupted writes left beside them. No other command may work on the store meanwhile.
    """
    for video_id in video_ids:
        forgotten.note(run.labels.store, video_id)
    shards, sets, held, rewritten = _shards(run), label_sets(run.labels.store), 0, 0
    for label_set in sets:
        places = _places(run, label_set, shards, video_ids)
        example_ids = {example_id for _, ids in places.values() for example_id in ids}
        for view, shard, _ in layout.folders_of(label_set.uri):
            indices, changed = _reject(label_set, view, shard, places.get(shard, (None, set()))[0], example_ids)
            held, rewritten = held + len(indices), rewritten + changed
            if indices:
                _purge(label_set, view, shard, indices)
    return Takedown(sorted(video_ids), len(sets), held, rewritten, _copies(shards, video_ids))


Places = Mapping[str, tuple[set[int], set[str]]]  # shard -> chunks that hold clips of the videos, ids of those


def _shards(run: Run) -> dict[str, pa.Table]:
    manifest = Manifest.load(run.data.manifest)
    return {name: manifest.read_shard(name) for name in manifest.shards}


def _places(run: Run, label_set: LabelSet, shards: Mapping[str, pa.Table], video_ids: Collection[str]) -> Places:
    """Where the clips of the videos lie, cut and chunked as the label set was."""
    data: Mapping[str, Any] = label_set.spec.fields.get("data", {})
    clips = ClipPlan.model_validate(data["clips"]) if "clips" in data else run.data.clips
    chunk_size = data.get("chunk_size", Manifest.load(run.data.manifest).chunk_size)
    places = {}
    for name, shard in shards.items():
        examples = plan_examples(shard, clips)
        rows = [row for row, video_id in enumerate(examples[schema.VIDEO_ID].to_pylist()) if video_id in video_ids]
        ids = examples[schema.EXAMPLE_ID].to_pylist()
        places[name] = {row // chunk_size for row in rows}, {ids[row] for row in rows}
    return places


def _reject(label_set: LabelSet, view: int, shard: str, known: set[int] | None, example_ids: set[str]) -> tuple[list[int], int]:
    """Chunks of a shard that hold the examples, and how many were written anew; all are searched when the manifest lacks the shard."""
    sources, held, rewritten = layout.list_shard(layout.folder_of(label_set.uri, view, shard), ask=True).sources, [], 0
    for index in sorted(sources.keys() if known is None else sources.keys() & known):
        chunk = Chunk(shard, index)
        if example_ids.isdisjoint(label_set.read(view, chunk, ())[schema.EXAMPLE_ID].to_pylist()):
            continue
        held.append(index)
        rewritten += label_set.forget(view, chunk, example_ids) != sources[index].attempt
    return held, rewritten


def _purge(label_set: LabelSet, view: int, shard: str, indices: Collection[int]) -> None:
    """Delete all that counts no more of some chunks, and what interrupted writes left."""
    folder = layout.folder_of(label_set.uri, view, shard)
    for index in indices:
        label_set.read(view, Chunk(shard, index), (), verify=True)  # what replaces the deleted must be whole
    listed = layout.list_shard(folder, ask=True)
    if any(listed.sources[info.index].name != ALL for info in listed.compacted if info.index in indices):
        label_set.compact(view, shard, len(listed.compacted))
        listed = layout.list_shard(folder, ask=True)
    for name in listed.superseded:
        if name == ALL or listed.chunks[name][0] in indices:
            files.delete(files.join(folder, name))
    for uri, _ in files.temporaries(folder):
        files.delete(uri)


def _copies(shards: Mapping[str, pa.Table], video_ids: Collection[str]) -> list[str]:
    """Other videos of the manifest with the same content, when it was built with --hash, or rendered from one of these."""
    rows = [row for shard in shards.values() for row in _about(shard)]
    taken = [row for row in rows if row[schema.VIDEO_ID] in video_ids]
    firsts = {row[DUPLICATE_OF] or row[schema.VIDEO_ID] for row in taken}
    shown = {row[SOURCE] for row in taken if row.get(COPY) == ORIGINAL}
    same = {row[schema.VIDEO_ID] for row in rows if (row[DUPLICATE_OF] or row[schema.VIDEO_ID]) in firsts}
    rendered = {row[schema.VIDEO_ID] for row in rows if not shown.isdisjoint({row.get(SOURCE), row.get(HOST)})}
    return sorted((same | rendered) - set(video_ids))


def _about(shard: pa.Table) -> list[dict[str, Any]]:
    wanted = (schema.VIDEO_ID, DUPLICATE_OF, SOURCE, COPY, HOST)
    rows: list[dict[str, Any]] = shard.select([name for name in wanted if name in shard.column_names]).to_pylist()
    return rows
