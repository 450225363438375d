"""Teachers that label while a student trains, against what the cores allow.

    python bench/streaming.py --json

`live_ratio`: examples/s of one live epoch / cores over the sum of the stages' CPU seconds an example. Each stage (decoding, teacher,
student) is measured alone, in this process, before the arms. Speed counts from the first committed chunk to the last round. What the
stages spend an example while they run side by side is printed with each arm: more than alone is what sharing the cores costs.
`sleeping_ratio`: the same with teachers that sleep, against the slowest stage, which they are.
`tee_ratio`: wall time of tee over 3 epochs / (one live epoch + 2 epochs of stored labels), each with its start and its end.
`second_student_ratio`: a second student from a store / the bare student loop on batches in memory; it asks no teacher. The frames are
kept as they are; `second_student_jpeg_ratio` is that of JPEG frames, which it decodes anew every epoch on the cores that it trains on.
With a student that sleeps after each round, the object store's peak and what was spilled are printed.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measure import Watch, arguments, corpus, finish, spread  # isort: skip  # before torch: it says how OpenMP's threads wait

import numpy as np
import ray
import torch
from ray._private import internal_api
from train_speed import bare, in_memory

from vkd import cluster, labelling, planning, stages, training, worklist
from vkd import run as run_files
from vkd.beside import TELL_S
from vkd.label_report import LabelReport
from vkd.loop import RoundReport
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.run import Run
from vkd.stages import ITEM, STATS
from vkd.store.labelset import LabelSet
from vkd.teaching import Teach

CHUNKS_ALONE = 4
CHUNKS_OF_SECOND = 24
CHUNK_SIZE = 16
SLEEPERS, SLEEP_S = 2, 6.0  # a chunk
SLOW_S = 3.0  # after each round
SECOND_EPOCHS = 8


def main() -> None:
    options = arguments(__doc__ or "", repeats=2, clips="")
    folder = Path(tempfile.mkdtemp(prefix="vkd-bench-"))
    try:
        build(str(corpus() / options.clips), str(folder / "manifest"), BuildOptions(chunk_size=CHUNK_SIZE))
        finish(measure(folder, options.repeats), options.json)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """All arms in one Ray session."""
    alone = stages_alone(folder)
    cores = multiprocessing.cpu_count()
    bound = cores / sum(alone.values())
    found: dict[str, Any] = {f"{name}_cpu_s_an_example": value for name, value in alone.items()} | {"bound_examples_per_s": bound}
    lives, tees, profiles = [], [], list[dict[str, float]]()
    first = _run(folder, "alone", "stored")
    with cluster.session(first.compute):
        for repeat in range(repeats):
            live, tee = trained(_run(folder, f"live{repeat}", "live")), trained(_run(folder, f"tee{repeat}", "tee", epochs=3))
            stored = trained(_run(folder, f"tee{repeat}", "stored", "after", epochs=2))
            lives.append(live["examples_per_s"] / bound)
            profiles.append(live_profile(live, alone))
            tees.append(tee["wall_s"] / (live["wall_s"] + stored["wall_s"]))
            print(f"repeat {repeat}: live {live}, tee {tee}, stored {stored}", flush=True)
        found |= slow_student(folder) | sleeping(folder)
        raw = _run(folder, "raw", "stored", "second", 1, "data.keep_frames=raw", "labels.allow_partial=true")
        labelling.label(raw, Plan.of(raw).chunks[:CHUNKS_OF_SECOND], lambda report: None)
    second, jpeg = second_student(raw), second_student(_run(folder, "tee0", "stored", "second"))
    return (
        found
        | {"live_profile": {name: round(statistics.median(each[name] for each in profiles), 3) for name in profiles[0]}}
        | {"live_spread": spread(lives), "tee_spread": spread(tees), "second_student_spread": spread(second)}
        | {"second_student_jpeg_spread": spread(jpeg), "second_student_jpeg_ratio": statistics.median(jpeg)}
        | {"tee_ratio": statistics.median(tees), "second_student_ratio": statistics.median(second), "live_ratio": statistics.median(lives)}
    )


def stages_alone(folder: Path) -> dict[str, float]:
    """CPU seconds that each stage takes for an example, the functions that workers call being called here, one after the other.

    Every chunk is decoded, since some videos cost ten times as much as others; of the teacher and the student a few tell enough.
    """
    run = _run(folder, "alone", "stored")
    plan, teachers = Plan.of(run), planning.build_teachers(run.recipe.teachers)
    specs = planning.label_specs(run, teachers)
    step = max(1, len(plan.chunks) // (CHUNKS_ALONE + 1))  # between chunks that are taught
    items = worklist.missing_items(run.store, [0], specs, plan.chunks)
    job = labelling._job(run, plan, specs, teachers, items)
    LabelSet.create(run.store, specs["frames"], {}, stages.recorded(), {})
    threads = torch.get_num_threads()
    teach = Teach(job, "teacher", 1, last=True)
    decode_s, told = 0.0, list[dict[str, Any]]()
    for number in range(len(items)):
        decoded = stages.decode(job, {ITEM: np.array([number])})
        decode_s += json.loads(decoded[STATS][0])["decode_s"]
        if number % step == 0 and len(told) <= CHUNKS_ALONE:
            told.append(json.loads(Teach.__call__(teach, decoded)[STATS][0]))
    torch.set_num_threads(threads)
    taught = told[1:]  # the first warms up
    small = run.model_copy(update={"labels": run.labels.model_copy(update={"allow_partial": True})})
    batches = in_memory(small)
    student = bare(small, batches * 3)
    return {
        "decode": decode_s / plan.num_examples,
        "teacher": sum(each["teach_s"]["teacher"] for each in taught) / sum(each["labelled"] for each in taught),
        "student": student.cpu_s / (3 * sum(fed.num_examples for fed in batches)),
    }


def trained(run: Run, after_round: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Wall time of a whole training, and its examples/s from the first label (or round) to the last round."""
    first_s, told = list[float](), list[tuple[float, RoundReport]]()
    started_s, watch = time.monotonic(), Watch(period_s=2.0, memory=False)
    cpu_s = [watch.cpu_s] * 2  # at the first label, or at the start, and at the last round

    def on_round(report: RoundReport) -> None:
        told.append((time.monotonic(), report))
        cpu_s[1] = watch.cpu_s
        after_round()

    def on_labels(report: LabelReport) -> None:
        if not first_s and report.done:
            first_s.append(time.monotonic() - TELL_S)  # the driver looks once in this time
            cpu_s[0] = watch.cpu_s

    with watch:
        report = training.train(run, on_round, on_labels)
    since_s = first_s[0] if first_s else started_s
    stages = report.efficiency.stages if report.efficiency is not None else {}
    spent = {f"{name}_cpu_s_an_example": stage.cpu_s / report.num_examples for name, stage in stages.items()}
    window_s = (told[-1][0] - since_s) * multiprocessing.cpu_count()  # of all cores
    of_stages, of_all = sum(stage.cpu_s for stage in stages.values()) / window_s, (cpu_s[1] - cpu_s[0]) / window_s
    return spent | {
        "wall_s": time.monotonic() - started_s,
        "examples_per_s": report.num_examples / (told[-1][0] - since_s),
        "start_s": since_s - started_s,
        "cores_in_stages": of_stages,
        "cores_in_the_rest": of_all - of_stages,
        "cores_idle": 1 - of_all,
    }


def live_profile(live: Mapping[str, float], alone: Mapping[str, float]) -> dict[str, float]:
    """Where the cores are while labels are made and learned, and how much more each stage spends an example than alone.

    `live_ratio` is about `cores_in_stages` over `stages_against_alone`: what is not there was spent elsewhere, or by stages that
    share caches and memory with each other.
    """
    beside = {name: live[f"{name}_cpu_s_an_example"] for name in alone}
    more = {f"{name}_against_alone": beside[name] / alone[name] for name in alone}
    shares = {name: live[name] for name in ("cores_in_stages", "cores_in_the_rest", "cores_idle")}
    return shares | more | {"stages_against_alone": sum(beside.values()) / sum(alone.values())}


def sleeping(folder: Path) -> dict[str, Any]:
    """Live with teachers that sleep."""
    teacher = f"recipe.teacher={{name: 'sleeping_teacher:SleepingTeacher', s_per_call: {SLEEP_S}}}"
    run = _run(folder, "sleeping", "live", "out", 1, teacher, "recipe.weights={kl: 0, cosine: 1}", f"compute.teacher.actors={SLEEPERS}")
    bound = SLEEPERS * CHUNK_SIZE / SLEEP_S
    speed = trained(run)["examples_per_s"]
    return {"sleeping_bound_examples_per_s": bound, "sleeping_examples_per_s": speed, "sleeping_ratio": speed / bound}


def slow_student(folder: Path) -> dict[str, Any]:
    """What the object store holds at most when labelling is faster than training."""
    run, ended, used = _run(folder, "slow", "tee"), threading.Event(), [0]

    def look() -> None:
        while not ended.wait(0.5):
            used.append(store_stats().object_store_bytes_used)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        trained(run, lambda: time.sleep(SLOW_S))
    finally:
        ended.set()
        looker.join()
    stats = store_stats()
    return {
        "slow_student_object_store_peak_bytes": max(used),
        "slow_student_share_of_object_store": max(used) / stats.object_store_bytes_avail,
        "spilled_bytes": stats.spilled_bytes_total,
    }


def store_stats() -> Any:
    """Of the object stores of all nodes."""
    context = ray.get_runtime_context()
    return internal_api.get_memory_info_reply(internal_api.get_state_from_address(context.gcs_address)).store_stats


def second_student(run: Run) -> list[float]:
    """Examples/s of a training from the store against the bare loop, in turns; it saves after each epoch."""
    run = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"every_examples": 4096})})
    batches, ratios = in_memory(run), []
    for repeat in range(4):
        plain = bare(run, batches * SECOND_EPOCHS).examples_per_s
        longer = run.train.model_copy(update={"epochs": SECOND_EPOCHS})
        report = training.train(run.model_copy(update={"output": f"{run.output}{repeat}", "train": longer}), lambda report: None)
        assert report.labels is None and report.efficiency is not None
        ratios.append(report.efficiency.num_examples / report.efficiency.elapsed_s / plain)
    return ratios[1:]  # the first pair warms up


def _run(folder: Path, name: str, mode: str, output: str = "out", epochs: int = 1, *overrides: str) -> Run:
    tree = {
        "name": name,
        "output": str(folder / name / output),
        "data": {"manifest": str(folder / "manifest"), "allow": [str(corpus())], "keep_frames": "jpeg"},
        "labels": {"mode": mode, "store": str(folder / name / "labels")},
        "recipe": {"name": "kd", "teacher": "efficientnet_lite", "student": {"name": "shift_cnn", "size": "small"}},
        "train": {"epochs": epochs, "batch_size": 16},
        "checkpoint": {"every_examples": 48},
    }
    return run_files.parse(tree, overrides)


if __name__ == "__main__":
    main()
