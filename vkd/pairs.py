"""Mining pairs of videos for similarity distillation: which others each video, then called an anchor, is compared with.

How Kordopatis-Zilos et al. 2022 (DnS) made their pools is not known; this is our way. Its result is a manifest whose rows are anchors.
A video is named `<shard>/<row>`, its row among the shard's examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from vkd import derived, planning, schema
from vkd.clips import SplitPlan, assign_splits
from vkd.copies import FAMILY, HOST, SOURCE
from vkd.errors import ConfigError
from vkd.planning import Plan
from vkd.run import Run
from vkd.steps import Pairs
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.triplets import NEAR, SAME

REGIONS = "regions"
ANCHOR, OTHERS, POOLS, FEATURES, LENGTH = "anchor", "others", "pools", "features", "num_frames"
RANDOM = "random"
ABOUT = SOURCE, FAMILY, HOST
BLOCK_BYTES = 1 << 28  # of cosines at once
SHARD_ROWS = 2048


@dataclass(frozen=True)
class PairsReport:
    """What was mined: `left_out` videos have no features or count for neither split, `candidates` are counted by pool."""

    path: str
    features: str
    videos: int
    left_out: int
    anchors: int
    candidates: dict[str, int]


class Video(NamedTuple):
    """What is known of a video besides its descriptor; source, family and host, what else it shows, are empty where there is none."""

    split: str
    id: str
    name: str
    video_id: str
    source: str
    family: str
    host: str = ""
    num_frames: int = 0


class Candidates(NamedTuple):
    """Positions of an anchor's candidates among the videos of its split, by pool."""

    same: Int[np.ndarray, " s"]
    near: Int[np.ndarray, " k"]
    random: Int[np.ndarray, " r"]


def mine(run: Run, asked: Pairs) -> PairsReport:
    """Write the manifest of pairs of the videos whose features the store holds, view 0 of the run's first teacher.

    Candidates are of the anchor's split: that of the run, or without one the column `split`. Raises ConfigError when the teacher
    emits no regions, LabelsMissing when labels lack, ManifestError when another manifest is in `out`.
    """
    if run.labels.mode == "live":
        raise ConfigError("mode live keeps no labels", where="labels.mode", action="set it to tee, then vkd label RUN")
    plan, label_set = Plan.of(run), _regions(run)
    lacking = label_set.missing(0, plan.chunks)
    planning.refuse_lacking(lacking, plan, label_set.uri, allowed=run.labels.allow_partial)
    columns = set(plan.examples(plan.chunks[0]).column_names)
    split = SplitPlan(by="column") if plan.split.by == "none" and schema.SPLIT in columns else plan.split
    passed_on = [name for name, there in ((schema.SPLIT, split.by != "none"), (SOURCE, SOURCE in columns)) if there]
    if asked.splits:
        planning.require_columns(plan, [schema.SPLIT], "pairs.splits")
    videos, descriptors = read(plan.without(lacking), label_set, split, asked.splits)
    counts: Counter[str] = Counter()
    rows = _rows(videos, descriptors, asked, label_set.spec.name, counts)
    tables = _tables(rows, passed_on)
    first = next(tables, None)
    if first is None:
        action = "label more videos, or ask for more candidates"
        raise ConfigError("no video has another one to be compared with", where="pairs", action=action)
    sources = [label_set.spec.name, f"manifest {plan.manifest_digest}"]
    written = derived.write(asked.out, chain([first], tables), asked.chunk_size, sources)
    left_out = plan.num_examples - len(videos)
    pools = {pool: counts[pool] for pool in (SAME, NEAR, RANDOM)}
    return PairsReport(asked.out, label_set.spec.name, len(videos), left_out, written.num_videos, pools)


def read(plan: Plan, label_set: LabelSet, split: SplitPlan, chosen: Sequence[str] = ()) -> tuple[list[Video], Float[np.ndarray, "n d"]]:
    """The labelled videos, those of a split together and in order of their ids, and their descriptors.

    `chosen`: only those whose column `split` is one of these.
    """
    committed, found = label_set.committed(0), dict[str, tuple[Video, np.ndarray]]()
    for chunk in plan.chunks:
        examples = plan.examples(chunk)
        table = label_set.read(0, chunk, [REGIONS], attempt=committed[chunk]).combine_chunks()
        status, splits = table[schema.STATUS].to_pylist(), assign_splits(examples, split)
        named = examples[schema.SPLIT].to_pylist() if chosen else []
        texts = planning.text_columns(examples, [name for name in ABOUT if name in examples.column_names])
        for row, example in enumerate(examples.select([schema.EXAMPLE_ID, schema.VIDEO_ID]).to_pylist()):
            if status[row] != schema.LABELLED or splits[row] == schema.GAP or (named and named[row] not in chosen):
                continue
            (regions,) = decode(table, REGIONS, np.array([row]))  # one by one: a chunk of long videos is large
            source, family, host = (str(texts[name][row]) if name in texts else "" for name in ABOUT)
            name = f"{chunk.shard}/{chunk.index * plan.chunk_size + row}"
            video = Video(splits[row], example[schema.EXAMPLE_ID], name, example[schema.VIDEO_ID], source, family, host, len(regions))
            if len(regions) and (video.id not in found or name < found[video.id][0].name):  # a video may have two rows
                found[video.id] = video, descriptor(regions)
    order = sorted(found.values(), key=lambda pair: pair[0])
    return [video for video, _ in order], np.stack([x for _, x in order]) if order else np.zeros((0, 1), np.float32)


def descriptor(regions: Float[np.ndarray, "t r d"]) -> Float[np.ndarray, " d"]:
    """One vector of a video: the mean over frames and regions, of length 1 (of length 0 when the mean is)."""
    mean = regions.mean(axis=(0, 1), dtype=np.float64)
    unit: Float[np.ndarray, " d"] = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
    return unit


def candidates(
    videos: Sequence[Video], descriptors: Float[np.ndarray, "n d"], asked: Pairs, block_bytes: int = BLOCK_BYTES
) -> Iterator[Candidates]:
    """For each video of one split, in order of their ids: the other copies of its source, its nearest neighbours, random others.

    Exact, by blocks of cosines. Neighbours are in order of their cosine, equal ones of their ids; random ones depend on the seed, the
    anchor's id and which videos there are. Those of another source whose family or host is the anchor's family or host are in no pool.
    """
    of_source, showing = _members([[video.source] for video in videos]), _members([[video.family, video.host] for video in videos])
    num_rows = max(1, block_bytes // max(descriptors.itemsize * len(videos), 1))
    for start in range(0, len(videos), num_rows):
        for i, cosines in enumerate(descriptors[start : start + num_rows] @ descriptors.T, start):
            own = np.array([i])
            copies = of_source.get(videos[i].source, own)
            for excluded in (own, copies, *(showing.get(shown, own) for shown in (videos[i].family, videos[i].host))):
                cosines[excluded] = -np.inf
            near = _best(cosines, asked.num_neighbours)
            cosines[near] = -np.inf
            left = np.flatnonzero(cosines > -np.inf)
            rng = np.random.default_rng([asked.seed, int(schema.digest(videos[i].id), 16)])
            yield Candidates(copies[copies != i], near, rng.choice(left, min(asked.num_random, len(left)), replace=False))


def _regions(run: Run) -> LabelSet:
    """The label set of the run's first teacher. Raises ConfigError when it emits no regions."""
    alias, teacher = planning.first_teacher(run)
    found = teacher.emits.get(REGIONS)
    if found is None or len(found.shape) != 3 or not found.ragged:
        what = f"it emits no {REGIONS!r} of frames, regions and dimensions, but {', '.join(teacher.emits)}"
        raise ConfigError(what, where=f"recipe.{alias}", action="name a teacher of region features")
    return LabelSet.open(run.store, planning.teacher_spec(run, alias, teacher))


def _rows(
    videos: Sequence[Video], descriptors: Float[np.ndarray, "n d"], asked: Pairs, features: str, counts: Counter[str]
) -> Iterator[dict[str, object]]:
    """The manifest's rows, without those that have no candidate; candidates are counted by pool."""
    splits = [video.split for video in videos]
    for split in sorted(set(splits)):
        start, end = splits.index(split), splits.index(split) + splits.count(split)
        ours = videos[start:end]
        for anchor, found in zip(ours, candidates(ours, descriptors[start:end], asked), strict=True):
            others = " ".join(ours[j].name for pool in found for j in pool.tolist())
            pools = [pool for pool, members in zip((SAME, NEAR, RANDOM), found, strict=True) for _ in members]
            counts.update(pools)
            if pools:
                yield {
                    schema.VIDEO_ID: schema.digest(anchor.video_id, features, others),
                    schema.DURATION_S: None,
                    ANCHOR: anchor.name,
                    OTHERS: others,
                    POOLS: " ".join(pools),
                    FEATURES: features,
                    LENGTH: anchor.num_frames,
                    schema.SPLIT: anchor.split,
                    SOURCE: anchor.source or None,
                }


def _tables(rows: Iterator[dict[str, object]], passed_on: Sequence[str]) -> Iterator[pa.Table]:
    texts = [schema.VIDEO_ID, ANCHOR, OTHERS, POOLS, FEATURES, *passed_on]
    kinds = dict.fromkeys(texts, pa.string()) | {schema.DURATION_S: pa.float64(), LENGTH: pa.int64()}
    while part := list(islice(rows, SHARD_ROWS)):
        yield pa.Table.from_pylist(part, schema=pa.schema(kinds))


def _members(groups: Sequence[Sequence[str]]) -> dict[str, Int[np.ndarray, " m"]]:
    """Ascending positions of each group; what is empty is none."""
    found: dict[str, list[int]] = {}
    for i, of_one in enumerate(groups):
        for group in {*of_one} - {""}:
            found.setdefault(group, []).append(i)
    return {group: np.array(positions) for group, positions in found.items()}


def _best(values: Float[np.ndarray, " n"], count: int) -> Int[np.ndarray, " k"]:
    """Positions of the `count` highest values above -inf, from the highest on; of equal ones the first come first."""
    count = min(count, int((values > -np.inf).sum()))
    if count == 0:
        return np.zeros(0, np.int64)
    least = np.partition(values, len(values) - count)[len(values) - count]
    found = np.flatnonzero(values >= least)
    best: Int[np.ndarray, " k"] = found[np.argsort(-values[found], kind="stable")][:count]
    return best
