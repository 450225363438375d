"""What the students of jobs/dns.yaml find of the held-out copies, beside baselines on the same features.

    vkd run jobs/dns.yaml; python bench/dns.py --json

The students are trained again for each seed; features, pairs and the first teacher stay. Queries are the originals of the test split,
each looked for among the test videos: the copies of all test sources and the distractors. What shows a query as the host of another
copy is neither right nor wrong, and is left out. Intervals are of a bootstrap over sources, of which there are few.

`gates_passed`: over seeds and sources coarse >= cosine of mean features; both fine students >= region Chamfer without a network;
fine > coarse; and the selector's order >= random order in the area under mAP against budget.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from measure import arguments, corpus, finish

from vkd import checkpoint, schema
from vkd.losses.similarity import to_unit
from vkd.metrics.retrieval import average_precision, selection_orders
from vkd.pairs import descriptor
from vkd.planning import Plan
from vkd.region_store import RegionStore
from vkd.regions import tiled
from vkd.run import load_one
from vkd.search import comparison, packed, segments, videos
from vkd.search.index import Index
from vkd.search.query import search
from vkd.similarity_layers import chamfer, frame_similarity
from vkd.students.base import SimilarityStudent
from vkd.students.selector import Selector
from vkd.students.visil import FineStudent
from vkd.video.access import Access

RUNS = Path("runs/dns")
TRAINED = ("fine1", "fine2", "binary", "coarse", "selector")
BUDGETS = [step / 20 for step in range(21)]
SHOWN_BUDGETS = (0.05, 0.1, 0.3)  # of the whole curve, whose ends are coarse and binary
RESAMPLES = 2000
RECORDINGS = {"mismatch1": "butterfly", "recording1": "cloudy-sky", "recording3": "butterfly", "recording4": "wind-turbine"}
Matrix = Float[np.ndarray, "q d"]


@dataclass(frozen=True)
class Corpus:
    """Test videos: rows of the manifest, their features, and for each query which videos are right, and which count at all."""

    rows: Sequence[Mapping[str, Any]]
    regions: Sequence[np.ndarray]
    queries: Sequence[int]

    def right(self, query: int) -> np.ndarray:
        source = self.rows[query]["source"]
        return np.array([row["source"] == source for row in self.rows])

    def counts(self, query: int) -> np.ndarray:
        source = self.rows[query]["source"]
        return np.array([i != query and row["host"] != source for i, row in enumerate(self.rows)])


def main() -> None:
    options = arguments(__doc__ or "", seeds=3)
    torch.set_num_threads(1)
    found = test_videos()
    fixed = {"mean features": mean_scores(found), "chamfer": chamfer_scores(found)}
    per_seed = []
    for seed in range(options.seeds):
        folder = trained(seed)
        per_seed.append(measure(found, fixed, folder, seed))
        print(f"seed {seed}: " + "  ".join(f"{name} {values.mean():.4f}" for name, values in per_seed[-1].items()), flush=True)
    result = summary(per_seed) | {"num_queries": len(found.queries), "num_videos": len(found.rows)}
    finish(result | segment_iou(found) | recordings(), options.json)


def trained(seed: int) -> Path:
    """The folder of the students of a seed; those of seed 0 are the job's own. Does what lacks."""
    folder = RUNS if seed == 0 else RUNS / f"seed{seed}"
    jobs = RUNS / "jobs" / str(seed)
    jobs.mkdir(parents=True, exist_ok=True)
    names = "|".join(TRAINED)
    for path in Path("jobs").glob("dns*.yaml"):
        (jobs / path.name).write_text(re.sub(rf"runs/dns/({names})\b", rf"{folder}/\1", path.read_text()))
    workflow = yaml.safe_load((jobs / "dns.yaml").read_text())
    students = [step for step in workflow["runs"] if step["run"] in ("dns_student.yaml", "dns_selector.yaml")]
    for step in students:
        step["set"] = [*step.get("set", []), f"train.seed={seed}"] if seed else step.get("set", [])
    (jobs / "students.yaml").write_text(yaml.safe_dump({"runs": students}))
    done = subprocess.run([sys.executable, "-m", "vkd", "run", str(jobs / "students.yaml")], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nthe students of seed {seed} were not trained: vkd run jobs/dns.yaml first")
    return folder


def test_videos() -> Corpus:
    run = load_one("jobs/dns_features.yaml")
    listed, label_set, _ = videos.of_run(run)
    store, plan = RegionStore(label_set.uri), Plan.of(run)
    about = {row[schema.VIDEO_ID]: row for chunk in plan.chunks for row in plan.examples(chunk).to_pylist()}
    kept = [video for video in listed if about[video.video_id][schema.SPLIT] == "test"]
    rows = [about[video.video_id] for video in kept]
    regions = [tiled(torch.from_numpy(store.read(video.name))).numpy() for video in kept]
    return Corpus(rows, regions, [i for i, row in enumerate(rows) if row["copy"] == "original"])


def mean_scores(found: Corpus) -> Matrix:
    vectors = np.stack([descriptor(x) for x in found.regions])
    scores: Matrix = vectors[found.queries] @ vectors.T
    return scores


@torch.inference_mode()
def chamfer_scores(found: Corpus) -> Matrix:
    """Region Chamfer, then Chamfer over time, without a network."""
    all_regions = [torch.from_numpy(x)[None] for x in found.regions]
    return np.array([[float(chamfer(frame_similarity(all_regions[i], x))[0]) for x in all_regions] for i in found.queries])


@torch.inference_mode()
def measure(found: Corpus, fixed: Mapping[str, Matrix], folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Average precision of each query by each way to score, and areas under the curves of the orders, [q]."""
    coarse, fine, binary = (load(folder / name, SimilarityStudent) for name in ("coarse", "fine2", "binary"))
    selector = load(folder / "selector", Selector)
    tensors = [torch.from_numpy(x)[None] for x in found.regions]
    vectors = torch.cat([coarse.index(x) for x in tensors])
    of_coarse = (vectors[found.queries] @ vectors.T).numpy()
    told = torch.cat([selector.index(x) for x in tensors])
    scores = {**fixed, "coarse": of_coarse, "fine attention": fine_scores(found, fine), "fine binary": fine_scores(found, binary)}
    needs = [selector(told[i].expand(len(told)), told, torch.from_numpy(row)) for i, row in zip(found.queries, of_coarse, strict=True)]
    result = {name: precisions(found, values) for name, values in scores.items()}
    orders = selection_orders(of_coarse, scores["fine binary"], torch.stack(needs).numpy(), seed)
    for name, priority in orders.items():
        curve = [precisions(found, mixed(found, of_coarse, scores["fine binary"], priority, budget)) for budget in BUDGETS]
        result[f"area {name}"] = np.mean(curve, axis=0)
        result |= {f"{name} at {share:.0%}": curve[BUDGETS.index(share)] for share in SHOWN_BUDGETS}
    return result


def load(folder: Path, kind: type) -> Any:
    network = checkpoint.load_similarity(str(folder / "student"))
    assert isinstance(network, kind)
    return network


def codes_of(student: FineStudent, regions: np.ndarray) -> np.ndarray:
    coded = student.index(torch.from_numpy(regions)[None])[0]
    return packed.pack(coded) if student.num_bits > 1 else coded.numpy()


@torch.inference_mode()
def fine_scores(found: Corpus, student: FineStudent) -> Matrix:
    codes = [codes_of(student, x) for x in found.regions]
    return np.stack([comparison.scores(student, codes[i], codes) for i in found.queries])


def mixed(found: Corpus, coarse: Matrix, fine: Matrix, priority: Matrix, budget: float) -> Matrix:
    """Coarse scores, and fine ones in place of those that come first, of the videos that count."""
    values = coarse.copy()
    for row, query in enumerate(found.queries):
        there = np.flatnonzero(found.counts(query))
        chosen = there[np.argsort(-priority[row, there], kind="stable")][: int(budget * len(there))]
        values[row, chosen] = to_unit(fine[row, chosen])
    return values


def precisions(found: Corpus, scores: Matrix) -> np.ndarray:
    values = []
    for row, query in enumerate(found.queries):
        there = found.counts(query)
        hits = found.right(query)[there][np.argsort(-scores[row, there], kind="stable")]
        values.append(average_precision(hits, int(hits.sum())))
    return np.array(values)


def summary(per_seed: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Means over seeds and sources with intervals, the differences of the gates, and whether they are passed."""
    means = {name: np.mean([found[name] for found in per_seed], axis=0) for name in per_seed[0]}
    result: dict[str, Any] = {name: interval(values) for name, values in means.items()}
    gates = {
        "coarse - mean features": means["coarse"] - means["mean features"],
        "fine attention - chamfer": means["fine attention"] - means["chamfer"],
        "fine binary - chamfer": means["fine binary"] - means["chamfer"],
        "fine attention - coarse": means["fine attention"] - means["coarse"],
        "fine binary - coarse": means["fine binary"] - means["coarse"],
        "selector - random order": means["area selector"] - means["area random"],
    }
    result |= {name: interval(values) for name, values in gates.items()}
    result["binary - attention (not gated)"] = interval(means["fine binary"] - means["fine attention"])
    result["selector - coarse order (not gated)"] = interval(means["area selector"] - means["area coarse"])
    result["per_seed"] = [{name: round(float(values.mean()), 4) for name, values in found.items()} for found in per_seed]
    strict = [name for name in gates if name.endswith(("- coarse", "order"))]
    result["gates_passed"] = all(values.mean() > 0 if name in strict else values.mean() >= 0 for name, values in gates.items())
    return result


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean over sources, with the 95 % interval of a bootstrap over them."""
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


@torch.inference_mode()
def segment_iou(found: Corpus) -> dict[str, Any]:
    """Overlap in time of the segment that is found in each partial copy of a query with the one that was pasted, by the binary student."""
    index, fine = Index.open(str((RUNS / "index").absolute())), load(RUNS / "binary", SimilarityStudent)
    values = []
    for query in found.queries:
        source, code = found.rows[query]["source"], codes_of(fine, found.regions[query])
        for row, regions in zip(found.rows, found.regions, strict=True):
            if row["source"] == source and row["copy"] == "partial":
                similarity = comparison.frames(fine, code, codes_of(fine, regions)).numpy()
                block, fps = segments.best_block(similarity, index.thresholds.cell), index.features.fps
                span = (0.0, 0.0) if block is None else (block.target_start / fps, block.target_end / fps)
                values.append(overlap(span, (row["target_start_s"], row["target_end_s"])))
    return {
        "segment_iou_mean": float(np.mean(values)),
        "segment_iou_over_half": float(np.mean(np.array(values) > 0.5)),
        "num_partial": len(values),
    }


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    both = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return both / max(a[1] - a[0] + b[1] - b[0] - both, 1e-9)


def recordings() -> dict[str, Any]:
    """Ranks of the originals of four phone recordings of a screen, and of the first copy of each: an anecdote, no measurement."""
    index, ranks, of_copies = Index.open(str((RUNS / "index").absolute())), {}, {}
    for name, original in RECORDINGS.items():
        regions = videos.query_of(str(corpus() / "neardup" / "query" / f"{name}.mp4"), index.features, Access()).regions
        hits = search(index, regions, 0.3, top=len(index))
        ranks[name] = 1 + min(i for i, hit in enumerate(hits) if hit.uri.endswith(f"neardup/db/{original}.mp4"))
        of_copies[name] = 1 + min(i for i, hit in enumerate(hits) if f"/{original.replace('-', '_')}-" in hit.uri)
    return {"recordings_rank": ranks, "recordings_rank_of_copies": of_copies, "recordings_first": sum(rank == 1 for rank in ranks.values())}


if __name__ == "__main__":
    main()
