"""An index: what is stored of each video, so that a query is compared coarsely with all and finely with some.

OUT/index.json                      what it was made of and how; its shards in order
OUT/{coarse,fine,selector,teacher}/ the networks, and the files that the teacher names, so that the folder can be moved
OUT/shards/<digest>.parquet         a row a video: id, uri, seconds, coarse vector (float32 bytes), selector's number, frames
OUT/shards/<digest>.fine.parquet    the same rows' fine codes, one a row group, uncompressed: any one can be read alone

Fine codes lie apart because a footer holds every column of every row group.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped

from vkd import schema
from vkd.errors import ConfigError, LabelsMismatch, StorageError
from vkd.search import calibration
from vkd.search.calibration import Thresholds
from vkd.search.networks import Codes, Networks
from vkd.store import files

INDEX, SHARDS = "index.json", "shards"
FORMAT_VERSION = 2
SHARD_VIDEOS, SHARD_FRAMES = 256, 1 << 15  # at most: fine codes of a shard lie in memory when it is written
MAX_OPEN_SHARDS = 256  # whose footers are kept; each takes a file descriptor, of which a process often has 1024
COARSE, SELECTOR, NUM_FRAMES, FINE = "coarse", "selector", "num_frames", "fine"
KEYS = ("format_version", "features", "networks", "encoding", "num_regions", "thresholds", "shards")


class Video(NamedTuple):
    """A video to index; `name` is what reads its regions, `shown` names what it is known to show: its source, a host.

    `akin` names what it may look like beside that: videos that have one in common are no example of different ones. `num_frames` is
    how many frames are read at most, as far as is known.
    """

    name: str
    video_id: str
    uri: str
    duration_s: float | None = None
    shown: Sequence[str] = ()
    akin: Sequence[str] = ()
    num_frames: int = 0


@dataclass(frozen=True)
class Features:
    """The label set that regions come from, its frames per second, and the teacher (as a run file names it) that gives a query's.

    `identity` is what that teacher said of itself then; `files` are those of its options that name files. The index has copies of these.
    """

    name: str
    fps: float
    teacher: Mapping[str, Any]
    identity: Mapping[str, Any]
    files: list[str] = field(default_factory=list)

    def kept(self) -> Features:
        """As index.json says it: files are named from the index's folder on."""
        names = {option: f"teacher/{option}{PurePath(self.teacher[option]).suffix}" for option in self.files}
        return replace(self, teacher={**self.teacher, **names})

    def kept_in(self, uri: str) -> Features:
        """The same of an index in this folder, so that its files can be read."""
        return replace(self, teacher={**self.teacher, **{option: files.join(uri, self.teacher[option]) for option in self.files}})


Read = Callable[[str], Float[np.ndarray, "t r d"]]
Part = tuple[str, Sequence[Video]]  # a shard's name and videos
MapParts = Callable[[Callable[[Part], None], Sequence[Part]], Iterable[None]]


class Index:
    """An index that is open: coarse vectors, numbers and ids of all videos in memory, fine codes read when asked for.

    `told` is what its index.json says; fewer shards there are an index of fewer videos.
    """

    def __init__(self, uri: str, told: Mapping[str, Any], networks: Networks) -> None:
        self.uri, self.told, self.networks = uri, told, networks
        self.features, self.thresholds = Features(**told["features"]).kept_in(uri), Thresholds(**told["thresholds"])
        self.shards = [str(name) for name in told["shards"]]
        tables = [_read(_shard(uri, name)) for name in self.shards]
        counts = [table.num_rows for table in tables]
        self.coarse: Float[np.ndarray, "n o"] = np.concatenate([_vectors(table) for table in tables])
        self.videos = pa.concat_tables([table.drop_columns([COARSE]) for table in tables])
        self.shard_of = np.repeat(np.arange(len(counts)), counts)
        self.row_in_shard = np.concatenate([np.arange(count) for count in counts])
        self.selector: Float[np.ndarray, " n"] = self.videos[SELECTOR].to_numpy().copy()
        self.num_frames: Int[np.ndarray, " n"] = self.videos[NUM_FRAMES].to_numpy()
        self.id_rank = np.argsort(np.argsort(np.array(self.videos[schema.VIDEO_ID].to_pylist(), np.str_)))  # ties are broken by id
        self._parquet = functools.lru_cache(MAX_OPEN_SHARDS)(self._opened)

    @classmethod
    def open(cls, uri: str, networks: Networks | None = None, match_from: float | None = None) -> Index:
        """The index in a folder, with the networks that lie in it. Raises ConfigError when there is none, StorageError when damaged."""
        return cls(uri, told_of(uri, match_from), networks or Networks.beside(uri))

    def __len__(self) -> int:
        return int(self.videos.num_rows)

    @property
    def cut_short(self) -> int:
        """Videos that go on for a second or more after the last frame that was indexed of them."""
        lengths_s = self.videos[schema.DURATION_S].fill_null(0.0).to_numpy()
        return int((lengths_s >= self.num_frames / self.features.fps + 1.0).sum())

    def fetch(self, videos: Int[np.ndarray, " k"]) -> list[Shaped[np.ndarray, "_ r w"]]:
        """Fine codes of these videos, in this order; each shard that has some is asked once."""
        found: list[np.ndarray | None] = [None] * len(videos)
        shards = self.shard_of[videos]
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            rows = self.row_in_shard[videos[places]]
            wanted, position = np.unique(rows, return_inverse=True)
            with _whole(_shard(self.uri, self.shards[shard], FINE)):
                column = self._parquet(shard).read_row_groups(wanted.tolist(), columns=[FINE], use_threads=False)[FINE]
                for place, row in zip(places.tolist(), position.tolist(), strict=True):
                    found[place] = self._codes(column[row].as_buffer(), int(videos[place]))
        return [codes for codes in found if codes is not None]

    def _codes(self, data: pa.Buffer, video: int) -> Shaped[np.ndarray, "t r w"]:
        dtype = np.uint8 if self.told["encoding"] == "bits" else np.float16
        return np.frombuffer(data, dtype).reshape(self.num_frames[video], self.told["num_regions"], -1)

    def _opened(self, shard: int) -> pq.ParquetFile:
        uri = _shard(self.uri, self.shards[shard], FINE)
        if "://" not in uri:
            return pq.ParquetFile(uri, memory_map=True, pre_buffer=False, page_checksum_verification=True)  # a quarter of the time
        fs, path = files.arrow_filesystem(uri)
        return pq.ParquetFile(path, filesystem=fs, pre_buffer=True, page_checksum_verification=True)


def told_of(uri: str, match_from: float | None = None) -> dict[str, Any]:
    """What an index is made of; `match_from` is another score of a match than its own.

    Raises ConfigError when there is none, or one of another format.
    """
    told = _told(uri)
    if told is None:
        raise ConfigError("no index here", where=uri, action=f"vkd index RUN {uri}")
    if match_from is not None:
        told["thresholds"]["match"] = match_from
    return told


def build(videos: Sequence[Video], read: Read, networks: Networks, features: Features, out: str, map_parts: MapParts = map) -> Index:
    """Index videos, or open the index of just these; one of fewer or other videos is made anew, but for shards that stay as they are.

    `map_parts` makes the shards that lack, in any order. Raises LabelsMismatch for networks trained on other features, and ConfigError
    for an index made by other networks, or a video without frames.
    """
    if not videos:
        raise ConfigError("no videos to index", where=out, action="vkd label RUN, then the same command again")
    kept = features.kept()
    _refuse(out, networks, kept)
    about = [features.name, *networks.digests.items()]
    parts = {schema.digest(FORMAT_VERSION, *about, *part): part for part in _parts(videos)}
    names = list(parts)
    lacking = [(name, part) for name, part in parts.items() if not files.exists(_shard(out, name))]
    list(map_parts(functools.partial(_make_shard, out, read, networks), lacking))
    old = _told(out)
    if old is not None and old["shards"] == names:
        _delete_all_but(names, out)
        return Index.open(out, networks)
    for name, data in networks.files.items():
        files.put(files.join(out, name), data)
    for option in features.files:
        files.put(files.join(out, kept.teacher[option]), files.read(features.teacher[option]))
    told: dict[str, Any] = {"format_version": FORMAT_VERSION, "features": vars(kept), "networks": networks.digests}
    told |= {"encoding": networks.encoding, "num_regions": read(videos[0].name).shape[1], "num_videos": len(videos), "shards": names}
    index = Index(out, told | {"thresholds": vars(Thresholds())}, networks)
    apart, alike = calibration.random_pairs([video.akin for video in videos]), calibration.known_pairs([video.shown for video in videos])
    told["thresholds"] = vars(calibration.of_pairs(networks.fine, apart, alike, index.fetch, len(videos)))
    files.put(files.join(out, INDEX), json.dumps(told, indent=1).encode())  # last: what it names is there
    _delete_all_but(names, out)
    return Index(out, told, networks)


def _delete_all_but(names: Sequence[str], out: str) -> None:
    """Shards of other videos: earlier ones, of which some may have been taken down since, and those of interrupted builds."""
    kept = set(names)
    for name in files.list_names(files.join(out, SHARDS)):
        if name.split(".")[0] not in kept:
            files.delete(files.join(out, SHARDS, name))


def _refuse(out: str, networks: Networks, features: Features) -> None:
    if networks.features != features.name:
        what = f"the networks were trained on {networks.features}, the videos' features are {features.name}"
        raise LabelsMismatch(what, where=out, action="name networks trained on these features")
    old = _told(out)
    if old is None:
        return
    for key, was, now in (("features", old["features"], vars(features)), ("networks", old["networks"], networks.digests)):
        differing = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
        if differing:
            raise ConfigError(f"the index there has other {key}: {differing[0]}", where=out, action="name another OUT, or delete this one")


def _parts(videos: Sequence[Video]) -> Iterator[Sequence[Video]]:
    """The videos of each shard: those of full ones stay what they are when more videos follow."""
    start, frames = 0, 0
    for end, video in enumerate(videos):
        frames += video.num_frames
        if end - start == SHARD_VIDEOS or (frames > SHARD_FRAMES and end > start):
            yield videos[start:end]
            start, frames = end, video.num_frames
    yield videos[start:]


def _make_shard(out: str, read: Read, networks: Networks, part: Part) -> None:
    """Raises ConfigError for a video that has features of no frame."""
    name, videos = part
    codes = []
    for video in videos:
        regions = read(video.name)
        if not len(regions):
            raise ConfigError("it has features of no frame", where=video.uri, action=f"vkd labels forget RUN {video.video_id}, then again")
        codes.append(networks.index(regions))
    _write_shard(out, name, videos, codes)


def _write_shard(out: str, name: str, videos: Sequence[Video], codes: Sequence[Codes]) -> None:
    """Its fine codes first: the other file says that both are there."""
    fine = pa.table({FINE: pa.array([code.fine.tobytes() for code in codes], pa.large_binary())})
    coarse = [code.coarse.astype(np.float32).tobytes() for code in codes]
    table = {name: pa.array([getattr(video, name) for video in videos], pa.string()) for name in (schema.VIDEO_ID, schema.URI)}
    table |= {
        schema.DURATION_S: pa.array([video.duration_s for video in videos], pa.float64()),
        COARSE: pa.array(coarse, pa.binary(len(coarse[0]))),
        SELECTOR: pa.array([code.selector for code in codes], pa.float32()),
        NUM_FRAMES: pa.array([len(code.fine) for code in codes], pa.int64()),
    }
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    for place, rows, group in ((_shard(out, name, FINE), fine, 1), (_shard(out, name), pa.table(table), len(videos))):
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, row_group_size=group, **plain)
        files.put(place, sink.getvalue().to_pybytes())


def _vectors(table: pa.Table) -> Float[np.ndarray, "n o"]:
    """The coarse vectors of a shard."""
    column = table[COARSE].combine_chunks()
    rows = np.frombuffer(column.buffers()[1], np.float32).reshape(-1, column.type.byte_width // np.float32().itemsize)
    return rows[column.offset : column.offset + len(column)]


def _shard(out: str, name: str, kind: str = "") -> str:
    return files.join(out, SHARDS, f"{name}.{kind}.parquet" if kind else f"{name}.parquet")


def _read(uri: str) -> pa.Table:
    with _whole(uri):
        return pq.read_table(pa.BufferReader(files.read(uri)), page_checksum_verification=True)


def _told(uri: str) -> dict[str, Any] | None:
    """What index.json says; None when there is none."""
    where = files.join(uri, INDEX)
    try:
        told = files.read_json(where, KEYS)
    except FileNotFoundError:
        return None
    if told["format_version"] != FORMAT_VERSION:
        what = f"an index of format {told['format_version']}, this vkd reads {FORMAT_VERSION}"
        raise ConfigError(what, where=where, action="vkd index RUN into another folder")
    return told


@contextmanager
def _whole(uri: str) -> Iterator[None]:
    """Turn what reading a damaged or lost file raises into a StorageError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        first_line, _, _ = str(error).partition("\n")
        action = "search again, in case the index was being made anew; if it stays so, delete the index, then vkd index RUN"
        raise StorageError(f"gone or damaged: {first_line}", where=uri, action=action) from error
