"""Makes what lacks of the copies that a run asks for, and the table of originals, copies and distractors that its manifest is built from.

OUT/small-<digest>/<source>-<frames>.mp4   the small version of each source
OUT/videos/<name>.mp4                      the copies
OUT/copies-<digest>.parquet                one row a video: uri, the columns of its source, and COLUMNS
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from vkd import schema, sources
from vkd.copies import COPY, DISTRACTOR, FAMILY, HOST, ORIGINAL, SOURCE, SPLITS, Copies, Copy, key, plan, splits
from vkd.errors import ConfigError, ManifestError, VkdError, redact
from vkd.manifest import VIDEO_SUFFIXES, Manifest
from vkd.pools import Progress, map_in
from vkd.store import files
from vkd.video import listing, render
from vkd.video.child import end_with
from vkd.video.listing import Listed
from vkd.video.render import Rendering, Shrinking

if TYPE_CHECKING:
    from vkd.run import Data

TRUTH = ("target_start_s", "target_end_s", "source_start_s", "source_end_s")  # where a partial copy shows its source, and what of it
COLUMNS = pa.schema(
    {
        schema.URI: pa.string(),
        SOURCE: pa.string(),  # the original's uri within its folder
        FAMILY: pa.string(),  # the source, or the folder of a distractor: videos of one look alike
        COPY: pa.string(),  # `original`, `distractor`, or the kind of edit
        schema.SPLIT: pa.string(),
        HOST: pa.string(),  # the source that the rest of a partial copy shows
        **dict.fromkeys(TRUTH, pa.float64()),
    }
)
Job = TypeVar("Job")
Result = TypeVar("Result")


def make(data: Data, how: Copies, progress: Progress | None = None) -> str:
    """Render the copies that lack; the uri of the table. A source that cannot be decoded gets no copies, and is told on stderr.

    Raises ManifestError and ConfigError for a source, a split or an earlier manifest that do not fit.
    """
    table = files.join(how.out, f"copies-{how.digest}.parquet")
    _refuse_another(data.manifest, table)
    rows = _originals(data)
    uris = dict(zip(names(rows, data), rows[schema.URI].to_pylist(), strict=True))
    split_of = _splits(rows, list(uris), how)
    small = _small(uris, data, how)
    planned = plan(how, {source: num_frames for source, (_, num_frames) in small.items()}, split_of)
    videos = files.join(how.out, "videos")
    there, lacking = set(files.list_names(videos)), dict[str, list[tuple[Copy, str]]]()
    targets = {copy: files.join(videos, copy.name(how)) for copy in planned}
    for copy, target in targets.items():
        if target.rsplit("/", 1)[-1] not in there:
            lacking.setdefault(copy.source, []).append((copy, target))
    places = {source: uri for source, (uri, _) in small.items()}
    jobs = [Rendering(tuple(copies), _needed(copies, places), how.fps) for copies in lacking.values()]
    _each(render.render, jobs, progress)
    sink = pa.BufferOutputStream()
    pq.write_table(_table(rows, list(uris), split_of, targets, how), sink)
    files.put(table, sink.getvalue().to_pybytes())
    return table


def _refuse_another(manifest: str, table: str) -> None:
    """Raises ConfigError for a manifest of other videos: rows are never taken out, so a video could be in two splits."""
    if files.exists(files.join(manifest, "manifest.json")) and Manifest.load(manifest).index.sources != [redact(table)]:
        what = "this manifest was built from other videos, or from copies of another split, seed or form"
        raise ConfigError(what, where=f"data.manifest: {manifest}", action="name another data.manifest, or take data.copies back")


def _originals(data: Data) -> pa.Table:
    """The rows of the source, each video once."""
    source = data.source or ""
    rows, _ = sources.list_rows(source, None, VIDEO_SUFFIXES)
    if schema.START_S in rows.column_names:
        raise ManifestError("it lists moments, and copies are of whole videos", where=source, action="leave out start_s and end_s")
    rows = sources.with_labels(sources.prepared(rows, "header"), data.label_from, source)
    uris = rows[schema.URI].to_pylist()
    first = dict(zip(reversed(uris), reversed(range(len(uris))), strict=True))
    return rows.take(pa.array(sorted(first.values()), pa.int64()))


def names(rows: pa.Table, data: Data) -> list[str]:
    """A name for each source that stays when all is moved: its uri within the source's folder, or within one of `data.allow`."""
    source = data.source or ""
    folder = os.path.dirname(source) if source.lower().endswith(sources.TABLE_SUFFIXES) else source
    found = []
    for uri in rows[schema.URI].to_pylist():
        roots = [_rooted(root) for root in (folder, *data.allow)]
        found.append(next((uri.removeprefix(root) for root in roots if uri.startswith(root)), uri))
    if len(set(found)) != len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ManifestError(f"two videos would both be named {twice!r}", where=source, action="put them under one folder of data.allow")
    return found


def _rooted(folder: str) -> str:
    folder = folder.removeprefix("file://")
    return (folder if "://" in folder else os.path.abspath(folder)).rstrip("/") + "/"


def _splits(rows: pa.Table, found: Sequence[str], how: Copies) -> dict[str, str]:
    if how.split is None and schema.SPLIT in rows.column_names:
        return {name: split or schema.TRAIN for name, split in zip(found, rows[schema.SPLIT].to_pylist(), strict=True)}
    return splits(found, how)


def _small(uris: Mapping[str, str], data: Data, how: Copies) -> dict[str, tuple[str, int]]:
    """The small version of each source that can be decoded, and its number of frames; those that lack are made."""
    folder = files.join(how.out, f"small-{schema.digest(how.fps, how.side_px, how.max_length_s, num_chars=8)}")
    there = _listed(folder)
    lacking = {uri: source for source, uri in uris.items() if key(source) not in there}
    found = listing.probe([Listed(uri) for uri in lacking], "header", data.access, os.cpu_count() or 1, None)
    jobs, faults = [], {item.video.uri: item.fault for item in found}
    for item in found:
        if item.info is not None:
            target = files.join(folder, key(lacking[item.video.uri]))
            jobs.append(Shrinking(item.video.uri, item.info, target, how, data.access))
    faults |= {job.uri: fault for job, fault in zip(jobs, _each(render.shrink, jobs), strict=True)}
    for fault in faults.values():
        if fault is not None:
            print(redact(f"copies: left out {fault}"), file=sys.stderr, flush=True)
    there = _listed(folder)
    return {source: there[key(source)] for source in uris if key(source) in there}


def _listed(folder: str) -> dict[str, tuple[str, int]]:
    """Small versions by the key of their source: uri and number of frames."""
    parts = [(name, *name.removesuffix(".mp4").rsplit("-", 1)) for name in files.list_names(folder)]
    return {found: (files.join(folder, name), int(num_frames)) for name, found, num_frames in parts}


def _needed(copies: Sequence[tuple[Copy, str]], places: Mapping[str, str]) -> dict[str, str]:
    return {source: places[source] for copy, _ in copies for source in (copy.source, copy.host) if source is not None}


def _each(function: Callable[[Job], Result], jobs: Sequence[Job], progress: Progress | None = None) -> list[Result]:
    """`function` of each job, in order, in a process for each core."""
    if not jobs:
        return []
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(jobs)), multiprocessing.get_context("spawn"), end_with, (os.getpid(),))
    try:
        return map_in(pool, function, jobs, progress)
    except BrokenProcessPool as error:
        action = "give it more memory, or lower data.copies.max_length_s; then run the same command again"
        raise VkdError("a process that renders copies was killed", where="data.copies", action=action) from error


def _table(rows: pa.Table, found: Sequence[str], split_of: Mapping[str, str], targets: Mapping[Copy, str], how: Copies) -> pa.Table:
    """One row a video; copies have the other columns of their original, distractors none."""
    row_of = {name: row for row, name in enumerate(found)}
    uris = rows[schema.URI].to_pylist()
    made: list[tuple[int | None, dict[str, Any]]] = []
    for name, row in row_of.items():
        made.append((row, {schema.URI: uris[row], SOURCE: name, FAMILY: name, COPY: ORIGINAL, schema.SPLIT: split_of[name]}))
    for copy, target in targets.items():
        own = {schema.URI: target, SOURCE: copy.source, FAMILY: copy.source, COPY: copy.kind, schema.SPLIT: split_of[copy.source]}
        made.append((row_of[copy.source], own | {HOST: copy.host} | _truth(copy, how.fps)))
    for folder in how.distractors:
        family = folder.rstrip("/").rsplit("/", 1)[-1]
        for uri in sources.list_rows(folder, None, VIDEO_SUFFIXES)[0][schema.URI].to_pylist():
            name = f"{family}/{uri.removeprefix(_rooted(folder))}"
            own = {schema.URI: uri, SOURCE: name, FAMILY: family, COPY: DISTRACTOR, schema.SPLIT: SPLITS[2]}
            made.append((None, own))
    ours = pa.Table.from_pylist([own for _, own in made], COLUMNS)
    passed = rows.take(pa.array([row for row, _ in made], pa.int64()))
    kept = {name: passed[name] for name in passed.column_names if name not in COLUMNS.names}
    return pa.table({name: ours[name] for name in COLUMNS.names} | kept)


def _truth(copy: Copy, fps: float) -> dict[str, float]:
    """Seconds of the columns TRUTH; none for a copy of the whole."""
    if copy.pasted is None:
        return {}
    starts = (copy.pasted.first, copy.pasted.source_first)
    return dict(zip(TRUTH, [n / fps for start in starts for n in (start, start + copy.pasted.num_frames)], strict=True))
