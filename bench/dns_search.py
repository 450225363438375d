"""Search that compares few videos finely against the same fine comparison of all, on one core; and the parts it is made of.

    python bench/dns_search.py --json                                   10,000 videos of 32 frames, 1,000 of 112, 5 queries
    python bench/dns_search.py --features STORE/regions-0123 --json     distractors from real region features

packed_speedup        frame-to-frame map of 112 frames, 9 regions, 512 bits: float matrix products (the faster of two forms) / packed
pair_speedup          the whole pair, both with the comparator as search uses it; reference_pair_speedup: `FineStudent.exact`
speedup_at_5, _30     all videos finely / that share, from the query's features on; fetching and selecting included. Ceilings 20, 3.33
netvlad_speedup       residuals of 64 clusters: a loop / at once       memory_ratio   peak of our map / of the 5-D form

Distractors are synthetic: runs of frames of several videos put together, of drawn ones without --features. Networks have drawn weights of
the paper's sizes. Cold: files are dropped from the page cache, and the index opened anew, before each search. Which videos are chosen, and
their coarse scores, are compared with those of a loop for each query; fine scores for the first query all, then for one of ten.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measure import arguments, finish, spread  # isort: skip  # before torch: it says how OpenMP's threads wait

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vkd.search import comparison, packed
from vkd.search import query as searching
from vkd.search.index import Features, Index, Video, build
from vkd.search.networks import Codes, Networks
from vkd.similarity_layers import NetVLAD, frame_similarity
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet
from vkd.students.coarse import CoarseStudent
from vkd.students.selector import Selector
from vkd.students.visil import FineStudent

FRAMES, REGIONS, BITS, DIMS, TOLERANCE = 112, 9, 512, 512, 1e-6
NEAR_TIE = 3e-6  # search rounds to six decimals, and then goes by id
SHARES = {"5": 0.05, "30": 0.3, "all": 1.0}


def main() -> None:
    options = arguments(__doc__ or "", videos=10_000, frames=32, long_videos=1000, queries=5, repeats=9, features="", out="runs/dns_search")
    torch.set_num_threads(1)
    sources = stored(options.features) if options.features else drawn(200, 64)
    networks = drawn_networks(sources[0].shape[2], options.features)
    result: dict[str, Any] = {"features": options.features or "drawn", "distractors": "synthetic", "threads": torch.get_num_threads()}
    result |= packed_figures(networks.fine, options.repeats) | netvlad_figures(options.repeats) | memory_figures()
    result |= searched(Corpus(sources, options.videos, options.frames), networks, options.queries, options.out)
    if options.long_videos:
        long = searched(Corpus(sources, options.long_videos, FRAMES), networks, options.queries, options.out)
        result |= {f"long_{name}": value for name, value in long.items()}
    finish(result, options.json)


class Corpus(NamedTuple):
    """Synthetic videos of one length: number i is the same whenever it is asked for."""

    sources: Sequence[np.ndarray]
    num_videos: int
    num_frames: int

    def read(self, name: str) -> np.ndarray:
        rng, parts, have = np.random.default_rng(int(name)), list[np.ndarray](), 0
        while have < self.num_frames:
            source = self.sources[int(rng.integers(len(self.sources)))]
            start = int(rng.integers(len(source)))
            parts.append(source[start : start + int(rng.integers(4, 13))])
            have += len(parts[-1])
        return np.concatenate(parts)[: self.num_frames]

    def videos(self) -> list[Video]:
        return [Video(str(i), f"{i:08}", f"{i}.mp4", float(self.num_frames)) for i in range(self.num_videos)]

    def query(self, number: int) -> np.ndarray:
        """Half of a video of the index, then what is not in it."""
        half = self.num_frames // 2
        return np.concatenate([self.read(str(number * 7))[:half], self.read(str(10**8 + number))[half:]])


def drawn(count: int, num_frames: int) -> list[np.ndarray]:
    """Unit vectors that wander slowly."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(count, num_frames, REGIONS, DIMS, generator=generator) * 0.3
    steps[:, 0] = torch.randn(count, REGIONS, DIMS, generator=generator)
    return list(F.normalize(steps.cumsum(1), dim=3).numpy())


def stored(uri: str) -> list[np.ndarray]:
    """Regions of all labelled videos of a set."""
    label_set = LabelSet.at(uri)
    videos = (video for chunk in label_set.committed(0) for video in decode(label_set.read(0, chunk).combine_chunks(), "regions"))
    found = [np.asarray(regions, np.float32) for regions in videos]
    return [regions for regions in found if len(regions)]


def drawn_networks(num_dims: int, features: str) -> Networks:
    torch.manual_seed(0)
    networks = CoarseStudent(num_dims).eval(), FineStudent("binary", num_dims, BITS).eval(), Selector(num_dims).eval()
    comparator = networks[1].comparator
    for conv in (comparator.conv1, comparator.conv2, comparator.conv3, comparator.fconv):
        torch.nn.init.xavier_uniform_(conv.weight)  # as it starts, videos that have nothing in common would be tied
    netvlad = networks[0].netvlad
    torch.nn.init.xavier_normal_(netvlad.reduce.weight)  # it too starts so that all are alike
    torch.nn.init.zeros_(netvlad.norm.bias)
    return Networks(*networks, Path(features).name or "drawn", {"coarse/drawn": f"seed 0, {num_dims}".encode()})


def timed(*works: Callable[[], Any], repeats: int) -> list[list[float]]:
    """Seconds of each, in turns, after one turn to warm up."""
    found: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, times in zip(works, found, strict=True):
            started_s = time.perf_counter()
            work()
            if turn:
                times.append(time.perf_counter() - started_s)
    return found


def ratios(name: str, slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    values = [a / b for a, b in zip(slow, fast, strict=True)]
    return {name: statistics.median(values), f"{name}_spread": spread(values)}


def one_product(query: Tensor, target: Tensor) -> Tensor:
    """The float map by one matrix product."""
    dots = query.flatten(0, 1) @ target.transpose(0, 1).flatten(0, 1).T
    return dots.view(*query.shape[:2], target.shape[1], -1).amax(2).mean(1)


@torch.inference_mode()
def packed_figures(fine: FineStudent, repeats: int) -> dict[str, Any]:
    floats = [torch.randint(0, 2, (FRAMES, REGIONS, BITS), generator=torch.Generator().manual_seed(i)).float() * 2 - 1 for i in range(2)]
    query, target = (packed.pack(codes) for codes in floats)
    reference = copy.deepcopy(fine).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def float_map(form: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return form(*floats) / BITS

    forms = [one_product, lambda q, t: frame_similarity(q[None], t[None])[0]]
    for form in forms:
        assert torch.allclose(float_map(form), packed.frame_similarity(query, target), atol=TOLERANCE, rtol=0)
    *of_forms, ours = timed(
        *(lambda form=form: float_map(form) for form in forms), lambda: packed.frame_similarity(query, target), repeats=4 * repeats
    )
    best = min(range(len(forms)), key=lambda i: statistics.median(of_forms[i]))
    pairs = timed(
        lambda: fine.compare(float_map(forms[best])[None]),
        lambda: reference.exact(*floats),
        lambda: comparison.scores(fine, query, [target]),
        repeats=2 * repeats,
    )
    assert abs(float(reference.exact(*floats)) - float(comparison.scores(fine, query, [target])[0])) <= TOLERANCE
    found = ratios("packed_speedup", of_forms[best], ours) | {"packed_ms": 1e3 * statistics.median(ours)}
    found |= ratios("pair_speedup", pairs[0], pairs[2]) | ratios("reference_pair_speedup", pairs[1], pairs[2])
    return found | {"pair_ms": 1e3 * statistics.median(pairs[2])}


@torch.inference_mode()
def netvlad_figures(repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    netvlad, x = NetVLAD(DIMS, 64, 1024).eval(), F.normalize(torch.randn(8, FRAMES, DIMS), dim=2)

    def looped() -> Tensor:
        share = netvlad.assign(x).softmax(2)
        return torch.stack([(share[:, :, k, None] * (x - netvlad.centroids[k])).sum(1) for k in range(64)], 1)

    def at_once() -> Tensor:
        share = netvlad.assign(x).softmax(2)
        residuals: Tensor = share.mT @ x - share.sum(1)[:, :, None] * netvlad.centroids
        return residuals

    def projected(residuals: Tensor) -> Tensor:
        vectors: Tensor = netvlad.norm(netvlad.reduce(F.normalize(F.normalize(residuals, dim=2).flatten(1), dim=1)))
        return vectors

    assert torch.allclose(looped(), at_once(), atol=1e-5) and torch.allclose(projected(looped()), netvlad(x), atol=1e-5)
    loop, ours, whole_loop, whole = timed(looped, at_once, lambda: projected(looped()), lambda: netvlad(x), repeats=repeats)
    return ratios("netvlad_speedup", loop, ours) | ratios("netvlad_whole_speedup", whole_loop, whole)


@torch.inference_mode()
def memory_figures() -> dict[str, Any]:
    """Peak resident memory that each way of making the map of two long videos adds."""
    x, y = (F.normalize(torch.randn(1, 448, REGIONS, DIMS), dim=3) for _ in range(2))
    bits = [packed.pack(codes[0].sign()) for codes in (x, y)]

    def five_d() -> Tensor:
        return torch.einsum("biok,bjpk->biopj", x, y).amax(3).mean(2)

    of_5d, of_floats, of_bits = (
        peak_bytes(work) for work in (five_d, lambda: frame_similarity(x, y), lambda: packed.frame_similarity(*bits))
    )
    return {"memory_5d_mb": of_5d / 1e6, "memory_ratio": of_floats / of_5d, "memory_ratio_packed": of_bits / of_5d}


def peak_bytes(work: Callable[[], Any]) -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _of_process("status", "VmRSS")
    work()
    return 1024 * (_of_process("status", "VmHWM") - before)


def _of_process(file: str, key: str) -> int:
    """A number that Linux tells of this process."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/self/{file}").read_text().splitlines())
    return int(told[key].split()[0])


def searched(corpus: Corpus, networks: Networks, num_queries: int, out: str) -> dict[str, Any]:
    """Searches of an index of a corpus; it is kept under OUT, and built when it is not there."""
    folder = Path(os.path.abspath(out)) / f"{networks.features}-{corpus.num_videos}x{corpus.num_frames}"
    started_s = time.monotonic()
    features = Features(networks.features, 1.0, {"name": "regions"}, {})
    index = build(corpus.videos(), corpus.read, networks, features, str(folder))
    found: dict[str, Any] = {"videos": len(index), "frames": corpus.num_frames, "build_s": time.monotonic() - started_s}
    places = sorted((folder / "shards").iterdir())
    found["file_bytes_per_video"] = sum(place.stat().st_size for place in places) / len(index)
    found["fine_bytes"], found["coarse_bytes"] = index.fetch(np.array([0]))[0].nbytes, index.coarse[0].nbytes
    times: dict[str, list[float]] = {f"{cache}_{name}": [] for cache in ("cold", "warm") for name in SHARES}
    read_bytes, differences, begun_s = list[int](), list[float](), time.monotonic()
    for number in range(num_queries):
        regions = corpus.query(number)
        for cache in ("cold", "warm"):
            for name, share in SHARES.items():
                if cache == "cold":
                    del index  # pages that are mapped stay
                    index = reopened(folder, networks, places)
                before = _of_process("io", "read_bytes")
                started_s = time.perf_counter()
                scores = whole(index, regions) if name == "all" else some(index, regions, share)
                times[f"{cache}_{name}"].append(time.perf_counter() - started_s)
                read_bytes += [_of_process("io", "read_bytes") - before] if (cache, name) == ("cold", "all") else []
                if cache == "warm" and name != "all":
                    differences += checked(index, regions, share, scores, every=10 if number else 1)
        print(f"query {number + 1} of {num_queries}: {time.monotonic() - begun_s:.0f} s", file=sys.stderr, flush=True)
    found |= {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for cache, prefix in (("warm", ""), ("cold", "cold_")):
        for name in ("5", "30"):
            found |= ratios(f"{prefix}speedup_at_{name}", times[f"{cache}_all"], times[f"{cache}_{name}"])
    return found | {"cold_read_mb": statistics.median(read_bytes) / 1e6, "max_difference": max(differences)} | parts_ms(index, regions)


def some(index: Index, regions: np.ndarray, share: float) -> searching.Ranking:
    return searching.rank(index, index.networks.index(regions), share)


@torch.inference_mode()
def whole(index: Index, regions: np.ndarray) -> np.ndarray:
    """The fine score of every video, ranked."""
    fine = packed.pack(index.networks.fine.index(torch.from_numpy(regions)[None])[0])
    scores = searching.fine_scores(index, Codes(np.empty(0, np.float32), 0.0, fine), np.arange(len(index)))
    return np.lexsort((index.id_rank, -scores))


@torch.inference_mode()
def checked(index: Index, regions: np.ndarray, share: float, found: Any, every: int) -> Iterator[float]:
    """By how much scores differ from those of a loop over videos. Raises AssertionError when others are chosen, but for near ties.

    Fine scores are those of each `every`-th video that is chosen: a loop over 3,000 takes minutes.
    """
    networks, x = index.networks, torch.from_numpy(regions)[None]
    fine, coarse, number = networks.fine.index(x)[0], networks.coarse.index(x)[0], networks.selector.index(x)
    vectors = torch.from_numpy(index.coarse.copy())
    similarity = [vectors[i] @ coarse for i in range(len(index))]
    own = torch.from_numpy(index.selector)
    need = np.array([float(networks.selector(number, own[i, None], similarity[i][None])) for i in range(len(index))])
    expected = np.lexsort((index.id_rank, -need))[: int(share * len(index))]
    chosen = np.flatnonzero(found.is_fine)
    differing = np.setxor1d(expected, chosen)
    assert len(chosen) == len(expected) and (np.abs(need[differing] - need[expected[-1]]) < NEAR_TIE).all(), "other videos are chosen"
    yield from (abs(float(similarity[i]) - float(found.scores[i])) for i in np.flatnonzero(~found.is_fine).tolist())
    chosen = chosen[::every]
    for i, codes in zip(chosen.tolist(), index.fetch(chosen), strict=True):
        yield abs(float(networks.fine.exact(fine, packed.unpack(codes))) / 2 + 0.5 - float(found.scores[i]))


def parts_ms(index: Index, regions: np.ndarray) -> dict[str, float]:
    """What a search at 5 % consists of, warm."""
    codes = index.networks.index(regions)

    def select() -> np.ndarray:
        return searching.best_first(searching.need(index, codes), index.id_rank)[: int(0.05 * len(index))]

    chosen = select()
    works: dict[str, Callable[[], Any]] = {
        "query": lambda: index.networks.index(regions),
        "coarse": lambda: index.coarse @ codes.coarse,
        "select": select,
        "fetch": lambda: [index.fetch(chosen[index.shard_of[chosen] == shard]) for shard in range(len(index.shards))],
        "fine": lambda: searching.fine_scores(index, codes, chosen),
    }
    times = timed(*works.values(), repeats=3)
    return {f"part_{name}_ms": 1e3 * statistics.median(values) for name, values in zip(works, times, strict=True)}


def reopened(folder: Path, networks: Networks, places: Sequence[Path]) -> Index:
    gc.collect()
    index = Index.open(str(folder), networks)
    for place in places:
        with open(place, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return index


if __name__ == "__main__":
    main()
