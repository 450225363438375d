"""`vkd label` against the best loop written by hand: the same decoder and teacher in a pool of processes, without Ray or commits.

    python bench/label_speed.py --json            ratio: clips/s of vkd / clips/s by hand, both in the steady state
    python bench/label_speed.py --memory 1 --json rss_ratio_10x: peak memory with ten times the clips / with one

Both arms run in turns on the same clips. The steady state is the span between the first and the last tenth of the clips, so
that neither start-up nor draining counts; start-up, the engine's own CPU seconds and the teacher's busy share stand beside it.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import Watch, arguments, corpus, finish, spread

from vkd import labelling
from vkd import run as run_files
from vkd.clips import Clip, View
from vkd.label_report import LabelReport
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.run import Run

_LOADED: list[Any] = []  # the teacher of one process of the pool
Commits = list[tuple[float, int]]  # (seconds since the start, clips done)


def main() -> None:
    options = arguments(__doc__ or "", repeats=3, memory=0, clips="wagon")
    folder = Path(tempfile.mkdtemp(prefix="vkd-bench-"))
    try:
        build(str(corpus() / options.clips), str(folder / "manifest"), BuildOptions(chunk_size=16))
        finish(memory(folder) if options.memory else speed(folder, options.repeats), options.json)
    finally:
        shutil.rmtree(folder)


def speed(folder: Path, repeats: int) -> dict[str, Any]:
    """Both arms in turns; the ratio of each pair."""
    ratios, results = [], []
    for repeat in range(repeats):
        by_hand, results_of_vkd = hand_written(folder), labelled(folder, f"speed{repeat}", num_views=1)
        ratios.append(results_of_vkd["clips_per_s"] / by_hand["clips_per_s"])
        results.append({"hand": by_hand, "vkd": results_of_vkd})
        print(f"repeat {repeat}: by hand {by_hand['clips_per_s']:.2f} clips/s, vkd {results_of_vkd['clips_per_s']:.2f}", flush=True)
    figures = {name: statistics.median(r["vkd"][name] for r in results) for name in results[0]["vkd"]}
    return {
        **{f"vkd_{name}": value for name, value in figures.items()},
        "hand_clips_per_s": statistics.median(r["hand"]["clips_per_s"] for r in results),
        "ratio_spread": spread(ratios),
        "ratio": statistics.median(ratios),
    }


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory of one view and of ten: as many clips, ten times over."""
    peaks = {views: labelled(folder, f"memory{views}", num_views=views) for views in (1, 10)}
    return (
        {f"peak_bytes_{views}x": int(found["peak_bytes"]) for views, found in peaks.items()}
        | {f"object_store_bytes_{views}x": int(found["object_store_bytes"]) for views, found in peaks.items()}
        | {"rss_ratio_10x": peaks[10]["peak_bytes"] / peaks[1]["peak_bytes"]}
    )


def labelled(folder: Path, name: str, num_views: int) -> dict[str, float]:
    """One `vkd label` into an empty store, its Ray session included."""
    run = _run(folder, name, num_views)
    chunks, commits = Plan.of(run).chunks, Commits()
    started_s = time.monotonic()

    def committed(report: LabelReport) -> None:
        commits.append((time.monotonic() - started_s, report.done))

    with Watch() as watch:
        report = labelling.label(run, chunks, committed)
    clips_per_s, steady_s, steady_clips = _steady(commits)
    useful_s = report.decode_s + report.teach_s.total()
    return {
        "clips_per_s": clips_per_s,
        "startup_s": commits[0][0],
        "engine_overhead": (watch.spent_cpu_s - useful_s) / useful_s,
        "engine_cpu_s": watch.spent_cpu_s - useful_s,
        "useful_cpu_s": useful_s,
        "teacher_share_of_cores": report.teach_s.total() / report.done * steady_clips / (steady_s * multiprocessing.cpu_count()),
        "peak_bytes": float(watch.peak_bytes),
        "object_store_bytes": float(watch.peak_shared_bytes),
    }


def hand_written(folder: Path) -> dict[str, float]:
    """A process a core; each decodes a clip, lets the teacher label it, and takes the next."""
    plan = Plan.of(_run(folder, "hand", 1))
    uris = [uri for chunk in plan.chunks for uri in plan.examples(chunk)["uri"].to_pylist()]
    ends_s = [end_s for chunk in plan.chunks for end_s in plan.examples(chunk)["end_s"].to_pylist()]
    commits = Commits()
    with multiprocessing.get_context("spawn").Pool(initializer=_load_teacher) as pool:
        pool.map(_label_one, list(zip(uris, ends_s, strict=True))[:8], chunksize=1)  # loaded and warm
        started_s = time.monotonic()
        for done, _ in enumerate(pool.imap_unordered(_label_one, zip(uris, ends_s, strict=True)), start=1):
            commits.append((time.monotonic() - started_s, done))
    return {"clips_per_s": _steady(commits)[0]}


def _load_teacher() -> None:
    import torch

    from vkd.teachers.efficientnet_lite import EfficientNetLiteTeacher

    torch.set_num_threads(1)
    teacher = EfficientNetLiteTeacher()
    teacher.load("cpu")
    _LOADED.append(teacher)


def _label_one(task: tuple[str, float]) -> int:
    from vkd.video.decode import decode_clip

    uri, end_s = task
    (teacher,) = _LOADED
    frames = decode_clip(Clip(uri, 0.0, end_s, View(), uri), [teacher.sampling])[0]
    return len(teacher({"frames": frames[None]})["logits"])


def _steady(commits: Sequence[tuple[float, int]]) -> tuple[float, float, int]:
    """(clips/s, seconds, clips) between the first and the last tenth."""
    total = commits[-1][1]
    inside = [(at_s, done) for at_s, done in commits if 0.1 * total <= done <= 0.9 * total]
    (first_s, first), (last_s, last) = inside[0], inside[-1]
    return (last - first) / (last_s - first_s), last_s - first_s, last - first


def _run(folder: Path, name: str, num_views: int) -> Run:
    tree = {
        "name": name,
        "output": str(folder / name),
        "data": {"manifest": str(folder / "manifest"), "allow": [str(corpus())], "views": {"count": num_views}},
        "labels": {"store": str(folder / name / "labels")},
        "recipe": {"name": "kd", "teacher": "efficientnet_lite", "student": "shift_cnn"},
    }
    return run_files.parse(tree)


if __name__ == "__main__":
    main()
