"""Looking after a store: is every file whole, what lies there, what may go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vkd.errors import ConfigError, LabelsMissing, StorageError
from vkd.rounds import Chunk
from vkd.schema import LABELLED, REJECTED, STATUS
from vkd.store import document, files, layout
from vkd.store.labelset import LabelSet


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


@dataclass(frozen=True)
class Kept:
    """One label set of a store; `newest_s` is when its newest file was committed, in seconds since 1970."""

    name: str
    what: str
    views: int
    chunks: int
    num_bytes: int
    newest_s: float | None


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


def drop_superseded(label_set: LabelSet) -> int:
    """Delete the files of a set of which nothing counts any more; how many. They stay while what replaced them is damaged."""
    dropped = 0
    for view, shard, folder in layout.folders_of(label_set.uri):
        listed = layout.list_shard(folder)
        for name in listed.superseded:
            behind = [listed.chunks[name][0]] if name in listed.chunks else [info.index for info in listed.compacted]
            if all(_whole(label_set, view, Chunk(shard, index)) for index in behind):
                files.delete(files.join(folder, name))
                dropped += 1
    return dropped


def _whole(label_set: LabelSet, view: int, chunk: Chunk) -> bool:
    try:
        label_set.read(view, chunk, (), verify=True)
    except StorageError:
        return False
    return True


def label_sets(store: str) -> list[LabelSet]:
    """Every label set of a store. Raises ConfigError when it holds none."""
    found = [files.join(store, name) for name in files.list_names(store)]
    sets = [LabelSet.at(uri) for uri in found if files.exists(files.join(uri, layout.DOCUMENT))]
    if not sets:
        raise ConfigError("no label sets here", where=store, action="vkd label RUN makes them, or name another store")
    return sets


def inventory(store: str) -> list[Kept]:
    """What a store holds, from listings and the footers of compacted shards."""
    return [_kept(label_set) for label_set in label_sets(store)]


def _kept(label_set: LabelSet) -> Kept:
    chunks, infos = 0, list[tuple[str, int, float]]()
    for _, _, folder in layout.folders_of(label_set.uri):
        infos += files.list_infos(folder)
        chunks += len(layout.list_shard(folder).sources)
    newest_s = max((time_s for _, _, time_s in infos), default=None)
    name = label_set.uri.rsplit("/", 1)[-1]
    return Kept(name, document.described(label_set.spec), len(label_set.views()), chunks, sum(size for _, size, _ in infos), newest_s)


def find(store: str, name: str) -> LabelSet:
    """A label set of a store by its name. Raises ConfigError when it has none of that name."""
    sets = {label_set.uri.rsplit("/", 1)[-1]: label_set for label_set in label_sets(store)}
    if name not in sets:
        raise ConfigError(f"{name!r} is no label set", where=store, action=f"name one of {', '.join(sets)}")
    return sets[name]


def drop(label_set_uri: str, view: int, chunk: Chunk) -> None:
    """Delete the first attempt of a chunk: what training has read of a scratch set."""
    files.delete(files.join(layout.folder_of(label_set_uri, view, chunk.shard), layout.chunk_name(chunk.index, 0)))


def drop_others(label_set: LabelSet, wanted: Collection[tuple[int, Chunk]]) -> None:
    """Delete all chunks of a scratch set but the wanted ones, by view."""
    for view in label_set.views():
        for chunk in label_set.committed(view):
            if (view, chunk) not in wanted:
                drop(label_set.uri, view, chunk)


def remove(label_set: LabelSet) -> None:
    """Delete a label set; labelset.json goes last, so that who is interrupted can remove the rest."""
    for view in label_set.views():
        files.delete(files.join(label_set.uri, f"view={view}"))
    files.delete(label_set.uri)
