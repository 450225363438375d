"""How labelling scales: many nodes and teachers on this machine, and manifests of up to a million examples.

    python bench/scale.py --json

Nodes are real raylets on this machine; teachers sleep for 2 s a chunk instead of computing, so that one machine can hold many.
`utilisation` is their sleep over their time from the moment the last actor began its first chunk until the last chunk began;
before it lies the ramp, which is printed apart; in its last `tail_s` some teacher had no chunk left. Teachers only sleep, but the rest is
real and shares this machine's cores: `cores_busy` is how many of them worked in that time, `cpu_s_a_chunk` what a chunk cost whom, and
`cores_allow` the utilisation at which the cores are full. Planning, listing and finding what lacks are measured on synthetic manifests,
each size in a process of its own: seconds and peak memory an example.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measure import Sampler, arguments, corpus, finish
from ray.cluster_utils import Cluster

from vkd import labelling, manifest, planning, schema, worklist
from vkd import run as run_files
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.run import Run
from vkd.store import files, layout
from vkd.store.labelset import LabelSet

import psutil  # isort: skip  # ray brings it along

SIZES = (10_000, 100_000, 1_000_000)
GRID = ((1, 1), (2, 8), (4, 16), (8, 32))  # nodes, teachers
SLEEP_S, CHUNKS_EACH = 2.0, 12
CPUS_OF_NODE, TEACHER_CPUS = 4, 0.1
PROCESSES = ("gcs_server", "raylet/raylet", "vkd.video.child", "dashboard/agent.py", "runtime_env", "log_monitor.py", "monitor.py")
LABELLED = 0.9  # of the chunks of a synthetic manifest


def main() -> None:
    options = arguments(__doc__ or "", size=0, folder="", clips="weizmann", most=32)
    if options.size:
        print(json.dumps(planned(Path(options.folder), options.size)))
        return
    folder = Path(tempfile.mkdtemp(prefix="vkd-bench-"))
    try:
        found = {f"{size} examples": alone(folder / str(size), size) for size in SIZES}
        times = [found[f"{size} examples"]["s_per_1000_examples"] for size in SIZES]
        grid = {f"{n} nodes, {t} teachers": scaled(folder / f"grid{t}", n, t, options.clips) for n, t in GRID if t <= options.most}
        lowest = min(each["utilisation"] for each in grid.values())
        finish(found | grid | {"planning_time_ratio_an_example": times[-1] / times[0], "utilisation": lowest}, options.json)
    finally:
        shutil.rmtree(folder)


def scaled(folder: Path, num_nodes: int, num_teachers: int, clips: str) -> dict[str, Any]:
    """Label with so many nodes and teachers."""
    notes = folder / "notes"
    notes.mkdir(parents=True)
    build(str(corpus() / clips), str(folder / "manifest"), BuildOptions(chunk_size=1))
    run, started_s = _run(folder, num_teachers, str(corpus())), time.time()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    spent = Spending()
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=CPUS_OF_NODE)
        run = run_files.parse(run.model_dump(mode="json"), [f"compute.address={cluster.address}"])
        ready_s = time.time()
        with spent:
            labelling.label(run, Plan.of(run).chunks[: num_teachers * CHUNKS_EACH], lambda report: None)
    finally:
        cluster.shutdown()
    found = {"cluster_start_s": ready_s - started_s} | utilisation(notes, num_teachers, ready_s, spent)
    print(f"{num_nodes} nodes, {num_teachers} teachers: {found}", flush=True)
    return found


def utilisation(notes: Path, num_teachers: int, ready_s: float, spent: Spending) -> dict[str, Any]:
    """The share of their time that teachers slept between the first call of the last actor and the beginning of the last call."""
    calls = {file.name: np.loadtxt(file, ndmin=2) for file in notes.iterdir()}
    assert len(calls) == num_teachers, f"{len(calls)} of {num_teachers} teachers worked"
    from_s = max(each[:, 0].min() for each in calls.values())
    to_s = max(each[:, 0].max() for each in calls.values())
    inside = sum(np.clip(np.minimum(each[:, 1], to_s) - np.maximum(each[:, 0], from_s), 0, None).sum() for each in calls.values())
    first_s = min(each[:, 0].min() for each in calls.values())
    begun = sum(int((each[:, 0] <= to_s).sum() - (each[:, 0] <= from_s).sum()) for each in calls.values())
    cpu_s = spent.between(from_s, to_s)
    found = {
        "first_chunk_after_s": first_s - ready_s,
        "ramp_s": from_s - first_s,
        "steady_s": to_s - from_s,
        "utilisation": inside / (num_teachers * (to_s - from_s)),
        "tail_s": to_s - min(each[:, 0].max() for each in calls.values()),
        "cores_busy": sum(cpu_s.values()) / (to_s - from_s),
        "cores_allow": multiprocessing.cpu_count() / (sum(cpu_s.values()) / begun * num_teachers / SLEEP_S),
    }
    each_s = {name: round(value / begun, 4) for name, value in sorted(cpu_s.items(), key=lambda item: -item[1]) if value / begun > 1e-4}
    return {name: float(value) for name, value in found.items()} | {"cpu_s_a_chunk": each_s}


class Spending(Sampler):
    """CPU seconds of every process of this machine, over time, by what it is."""

    def __init__(self) -> None:
        super().__init__(period_s=1.0)
        self._cpu_s, self._totals = dict[tuple[int, float], float](), dict[str, float]()
        self._samples = list[tuple[float, dict[str, float]]]()

    def between(self, from_s: float, to_s: float) -> dict[str, float]:
        times_s = [time_s for time_s, _ in self._samples]
        found = {}
        for name in {name for _, totals in self._samples for name in totals}:
            values = [totals.get(name, 0.0) for _, totals in self._samples]
            found[name] = float(np.interp(to_s, times_s, values) - np.interp(from_s, times_s, values))
        return found

    def sample(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                key, times, name = (process.pid, process.create_time()), process.cpu_times(), kind_of(process)
                before_s, self._cpu_s[key] = self._cpu_s.get(key, 0.0), times.user + times.system
                self._totals[name] = self._totals.get(name, 0.0) + self._cpu_s[key] - before_s  # Ray renames its workers
        self._samples.append((time.time(), dict(self._totals)))


def kind_of(process: psutil.Process) -> str:
    """What a process of Ray's or ours is for."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return words[0].split("(")[-1].rstrip(")") or words[0]
    line = " ".join(words)
    return next((name for name in PROCESSES if name in line), "this driver" if process.pid == os.getpid() else "other")


def alone(folder: Path, size: int) -> dict[str, float]:
    """The figures of one size, from a process of its own."""
    words = [sys.executable, __file__, "--size", str(size), "--folder", str(folder)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    print(size, found, flush=True)
    return found


def planned(folder: Path, size: int) -> dict[str, float]:
    """Plan a synthetic manifest and find what its store lacks."""
    make_manifest(folder / "manifest", size)
    run = _run(folder, 1, "/nowhere")
    plan = Plan.of(run)
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    lacking = make_store(run, plan, {alias: spec.name for alias, spec in specs.items()})
    planning._shard_examples.cache_clear()
    before_bytes, started_s = _peak_bytes(), time.monotonic()
    plan = Plan.of(run)
    planned_s = time.monotonic() - started_s
    items = worklist.missing_items(run.store, [0], specs, plan.chunks)
    listed_s = time.monotonic() - started_s - planned_s
    ordered = worklist.training_items(run, plan, specs)
    ordered_s = time.monotonic() - started_s - planned_s - listed_s
    assert len(items) == len(ordered) == lacking, (len(items), len(ordered), lacking)
    return {
        "plan_s": planned_s,
        "list_s": listed_s,
        "training_order_s": ordered_s,
        "s_per_1000_examples": (planned_s + listed_s + ordered_s) / size * 1000,
        "peak_bytes_an_example": (_peak_bytes() - before_bytes) / size,
    }


def make_manifest(folder: Path, size: int) -> None:
    """Shards as a build writes them, of videos that are nowhere."""
    index = manifest.Index(chunk_size=64, probe="none", hash=False, sources=["/nowhere"])
    rows_of_shard = BuildOptions().shard_rows
    for start in range(0, size, rows_of_shard):
        numbers = range(start, min(size, start + rows_of_shard))
        table = pa.table(
            {
                schema.VIDEO_ID: [schema.digest(str(n)) for n in numbers],
                schema.URI: [f"/nowhere/{n:09d}.mp4" for n in numbers],
                schema.DURATION_S: pa.array([10.0] * len(numbers)),
            }
        )
        index.columns = table.column_names
        index.shards.append(manifest.Shard(name=manifest.write_rows(str(folder), "shards", table), rows=table.num_rows))
    files.put(f"{folder}/manifest.json", index.model_dump_json().encode())


def make_store(run: Run, plan: Plan, names: dict[str, str]) -> int:
    """Files of most chunks, by name only: nothing that is measured opens them. How many chunks lack."""
    there = plan.chunks[: int(LABELLED * len(plan.chunks))]
    teachers = planning.build_teachers(run.recipe.teachers)
    for alias, spec in planning.label_specs(run, teachers).items():
        uri = f"{run.store}/{names[alias]}"
        LabelSet.create(run.store, spec, {}, {}, {})
        for chunk in there:
            folder = Path(layout.folder_of(uri, 0, chunk.shard))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / layout.chunk_name(chunk.index, 0)).touch()
    return len(plan.chunks) - len(there)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(folder: Path, num_teachers: int, source: str) -> Run:
    notes, seconds = str(folder / "notes"), SLEEP_S
    tree = {
        "name": "scale",
        "output": str(folder / "out"),
        "data": {"manifest": str(folder / "manifest"), "allow": [source]},
        "labels": {"store": str(folder / "labels")},
        "recipe": {
            "name": "kd",
            "teacher": {"name": "sleeping_teacher:SleepingTeacher", "s_per_call": seconds, "notes": notes},
            "student": {"name": "shift_cnn", "num_frames": 2, "size_px": 32},
            "weights": {"kl": 0.0},
        },
        "compute": {
            "profile": "laptop",
            "decode": {"workers": 2, "cpus": 0.5},
            "teacher": {"actors": num_teachers, "cpus": TEACHER_CPUS},
        },
    }
    if source != "/nowhere":
        tree["data"] |= {"clips": {"plan": "windows", "length_s": 0.5, "stride_s": 0.02}}  # type: ignore[operator]
    return run_files.parse(tree)


if __name__ == "__main__":
    main()
