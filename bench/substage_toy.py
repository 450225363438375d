"""Staged distillation against plain distillation on moving shapes: 12 classes, labels 40 % wrong and 20 % missing.

    python bench/substage_toy.py --json                      3 seeds, 1,000 train / 200 validation / 400 test clips, 30 epochs an arm
    python bench/substage_toy.py --first-seed 100 --json     the seeds that settings were tuned on
    python bench/substage_toy.py --full 1 --json             and ours with each ingredient removed, and with features as losses

A class is one of 3 shapes that moves in one of 4 directions: neither the shape nor one frame tells it. The teachers learn from clean
labels of other clips, `strong` to the end and `weak` until it answers 70 to 80 % of validation.
no_teacher  cross entropy on the labels                    kd          and the teacher: each seed's best rho on validation
kd_refined  kd whose labels are refined                    kd_argmax   kd whose labels are what the teacher answers first
ours        the recipe `substage`                          weak_ours   with the weak teacher, and labels in the loss
The three arms that the gate does not ask for are trained at the first seed; --full: at every seed.
All arms of a seed share clips, wrong labels, the student's first weights, batches and their order, and the number of steps.
The gate: ours > kd in every seed, by at least a point in the mean; and with the weak teacher the refined labels are right more
often than both the given labels and the teacher's first answers, by at least three points.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measure import arguments, finish  # isort: skip  # before torch: it says how OpenMP's threads wait

import av
import numpy as np
import torch
import torch.nn.functional as F
from substage_arms import Silent, off, plain, response
from torch import Tensor

from vkd import checkpoint, cluster, models, pipeline, schema, training
from vkd import run as run_files
from vkd.compute import Compute
from vkd.console import Screen
from vkd.feeding import Feeder, open_sets
from vkd.manifest import BuildOptions, build
from vkd.models import ModelSpec
from vkd.phased import table_of
from vkd.planning import Plan
from vkd.recipes.base import Batch
from vkd.run import Run
from vkd.schema import GAP, TRAIN, VAL
from vkd.students import STUDENTS
from vkd.students.base import Student

SHAPES, DIRECTIONS = ("cross", "ring", "square"), ((1, 0), (-1, 0), (0, 1), (0, -1))
NUM_CLASSES = len(SHAPES) * len(DIRECTIONS)
NUM_FRAMES, SIZE_PX = 8, 32
SPLITS = {TRAIN: 1000, VAL: 200, GAP: 400}  # the gap is used by neither side: it is the test
WRONG, MISSING = 0.4, 0.2
TEACHER_CLIPS, TEACHER_EPOCHS, WEAK = 3000, 8, (0.70, 0.80)
CASCADE = {"warmup": 2, "per_stage": 4, "joint": 12, "lower_lr": 1.0}
ALL = "all"  # the folder of what is of all seeds
EPOCHS, BATCH_SIZE, RATE, CHUNK_SIZE = 30, 50, 0.014, 200  # small chunks make refining labels slow: files are opened and written
OFF = off(EPOCHS)
RHOS = (0.5, 0.9, 1.0)
OURS: dict[str, Any] = {
    "cascade": CASCADE,
    "resp": {"rho": [1.0, 1.0], "tau": [4, 4]},
    "fd": {"teaches": False},  # it weighs the substages; as losses, features and relations pull a student of 4 channels away
    "rel": {"sp": 0, "corr": 0, "pair": 0},
    "refine": {"trust": 0.25},
}
WEAK_OURS: dict[str, Any] = OURS | {"resp": {"rho": [0.9, 0.5], "tau": [8, 4]}}  # a teacher that is wrong as often as the labels
REMOVED: dict[str, dict[str, Any]] = {  # each ingredient of ours taken away
    "substages": {"combos": {"prefix": False, "pair": False, "fused": False}},
    "cascade": {"cascade": CASCADE | {"per_stage": 0, "joint": EPOCHS - 2}},
    "refinement": {"refine": {"form": "none"}},
    "harmony": {"harmonise": {"form": "uniform"}},
    "features": {"fd": {"moments": 0, "mmd": 0, "temporal": 0}},
}
ADDED: dict[str, dict[str, Any]] = {  # features and relations as losses too
    "features": {"fd": {"moments": 0.02, "mmd": 0.01, "temporal": 0.01}},
    "relations": {"rel": {"sp": 0.02, "corr": 0.02, "pair": 0.002}},
}
NETWORK = {"size_px": SIZE_PX, "stem_px": 3, "stem_stride": [2, 2]}
STUDENT = {"name": "tiny_r3d", "widths": [4, 8, 16, 32]} | NETWORK
TEACHER = ModelSpec(name="tiny_r3d", options={"widths": [16, 32, 64, 128]} | NETWORK)


def main() -> None:
    options = arguments(__doc__ or "", seeds=3, first_seed=0, full=0, jobs=2)
    with tempfile.TemporaryDirectory(prefix="vkd-toy-") as folder:
        finish(measure(Path(folder), options), options.json)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every arm of every seed, and the gate."""
    seeds, full = range(options.first_seed, options.first_seed + options.seeds), bool(options.full)
    found: dict[str, Any] = {"teacher_accuracy": teachers(folder, options.first_seed)}
    for seed in seeds:
        write_clips(folder, seed)
    with cluster.session(Compute()):
        for teacher in ("strong", "weak"):
            pipeline.label(_run(folder / ALL, teacher, "labels", {}), Silent())
    told: dict[str, dict[int, dict[str, float]]] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        ours = [("strong", "ours", OURS), ("weak", "weak_ours", WEAK_OURS)]  # first: they take longest
        kds = [("strong", f"kd_{rho}", plain(EPOCHS, rho)) for rho in RHOS]
        work = [(seed, *arm) for arms in (ours, kds) for seed in seeds for arm in arms]
        work += [(seed, *arm) for seed in (seeds if full else seeds[:1]) for arm in further(full)]
        for (seed, _, arm, _), result in zip(work, pool.map(train, [(folder, *each) for each in work]), strict=True):
            told.setdefault(arm, {})[seed] = result
    best = {seed: max(RHOS, key=lambda rho: told[f"kd_{rho}"][seed]["validation"]) for seed in seeds}
    told["kd"] = {seed: told[f"kd_{rho}"][seed] for seed, rho in best.items()}
    return found | {"kd_rho": best} | summary(told, seeds)


def further(full: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """(teacher, name, what the recipe says) of the arms that the gate does not ask for."""
    found = [("strong", "no_teacher", plain(EPOCHS, 0.0)), ("strong", "kd_refined", OFF | response(0.5) | {"refine": OURS["refine"]})]
    found += [("strong", "kd_argmax", OFF | response(0.5) | {"refine": {"form": "argmax"}})]
    changes = [("without", REMOVED), ("with", ADDED)] if full else []
    return found + [("strong", f"{kind}_{name}", OURS | change) for kind, of in changes for name, change in of.items()]


def summary(told: Mapping[str, Mapping[int, Mapping[str, float]]], seeds: Sequence[int]) -> dict[str, Any]:
    """Test accuracy of each arm, seed by seed; the labels of the weak teacher's run; the gate."""
    test = {arm: [of_seed[seed]["test"] for seed in seeds if seed in of_seed] for arm, of_seed in told.items()}
    rows = [(arm, f"{statistics.mean(v):.3f}", "  ".join(f"{x:.3f}" for x in v)) for arm, v in test.items()]
    Screen().table("accuracy on 400 test clips", ("arm", "mean", "per seed"), rows)
    gains = [ours - kd for ours, kd in zip(test["ours"], test["kd"], strict=True)]
    labels = {name: [told["weak_ours"][seed][name] for seed in seeds] for name in ("given", "taught", "refined")}
    lifts = [refined - max(given, taught) for given, taught, refined in zip(*labels.values(), strict=True)]
    passed = min(gains) > 0 and statistics.mean(gains) >= 0.01 and min(lifts) >= 0.03
    seconds = {arm: statistics.mean(result["seconds"] for result in of_seed.values()) for arm, of_seed in told.items()}
    return {
        "test_accuracy": test,
        "labels_right_with_the_weak_teacher": labels,
        "gain_over_kd": gains,
        "label_lift": lifts,
        "seconds": seconds,
        "gates_passed": passed,
    }


def train(work: tuple[Path, int, str, str, dict[str, Any]]) -> dict[str, float]:
    """One arm of one seed: validation and test accuracy, and how many labels are right before and after."""
    torch.set_num_threads(1)
    started_s = time.monotonic()
    folder, seed, teacher, arm, recipe = work
    run = _run(folder / f"seed{seed}", teacher, arm, recipe, seed)
    pipeline.distill(run, Silent())
    seconds = time.monotonic() - started_s
    plan, sets = open_sets(run, Plan.of(run))
    student = checkpoint.load_student(training.student_folder(run))
    found = {"seconds": seconds}
    for name, split in (("validation", VAL), ("test", GAP)):
        answers, truths = answers_of(run, plan, sets, split, lambda batch: student(batch[schema.FRAMES])["logits"])
        found[name] = float((answers == truths).mean())
    taught, truths = answers_of(run, plan, sets, TRAIN, lambda batch: batch["teacher.logits"])
    table = table_of(run, plan, sets["teacher"])
    assert table is not None
    last = table.prepare(run.train.epochs)
    found |= {
        "given": table.accuracy(0) or 0.0,
        "taught": float((taught == truths).mean()),
        "refined": table.accuracy(last) or 0.0,
    }
    print(f"seed {seed}: {arm:12s} " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
    return found


@torch.inference_mode()
def answers_of(
    run: Run, plan: Plan, sets: Mapping[str, Any], split: str, answer: Callable[[Batch], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that are answered of the clips of a split, and the true ones."""
    feeder = Feeder(run, plan, sets, split)
    truths = [name for chunk in plan.chunks for name in plan.examples(chunk)["truth"].to_pylist()]
    batches = [fed.batch for fed in feeder.stream(feeder.one_pass(), 100, seed=0)]
    numbers = torch.cat([batch[schema.EXAMPLE] for batch in batches]).tolist()
    answers = torch.cat([answer(batch).argmax(1) for batch in batches]).numpy()
    return answers, np.array([feeder.classes.index(truths[number]) for number in numbers])


def teachers(folder: Path, seed: int) -> dict[str, float]:
    """Train on clean labels of other clips, export it when it is `weak` and when it is done; accuracy on further clips."""
    frames, classes = render(np.random.default_rng([seed, 1]), TEACHER_CLIPS)
    others, truths = (torch.from_numpy(x) for x in render(np.random.default_rng([seed, 2]), 600))
    torch.manual_seed(seed)
    network: Student = models.build(TEACHER, STUDENTS, "student", heads={"logits": NUM_CLASSES})
    total, rng = TEACHER_EPOCHS * TEACHER_CLIPS // 50, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.004, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, total_steps=total)
    accuracy: dict[str, float] = {}
    for step in range(total):
        rows = rng.integers(0, TEACHER_CLIPS, 50)
        loss = F.cross_entropy(network.train()(torch.from_numpy(frames[rows]))["logits"], torch.from_numpy(classes[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        last = step == total - 1
        if last or ("weak" not in accuracy and step % 10 == 9):
            some = 600 if last else 200  # asking all of them takes longer than ten steps
            right = accuracy_on(network, others[:some], truths[:some])
            if not last and WEAK[0] <= right <= WEAK[1]:
                right = accuracy_on(network, others, truths)
            if last or WEAK[0] <= right <= WEAK[1]:
                name = "strong" if last else "weak"
                accuracy[name] = right
                checkpoint.export(network, TEACHER, str(folder / name), {"trained": {"step": step + 1}})
                print(f"teacher {name}: {right:.3f} after {step + 1} steps", flush=True)
    return accuracy


@torch.inference_mode()
def accuracy_on(network: Student, clips: torch.Tensor, truths: torch.Tensor) -> float:
    return float((network.eval()(clips)["logits"].argmax(1) == truths).float().mean())


def write_clips(work: Path, seed: int) -> None:
    """The clips of one seed as videos, and their list: uri, label as it is given, truth, split; a manifest of them, and one of all seeds.

    Shards of the same clips are the same in both, so what is labelled by the second is labelled in the first.
    """
    folder = work / f"seed{seed}"
    folder.mkdir(parents=True)
    rng, lines, first = np.random.default_rng([seed, 0]), list[str](), 0
    for split, count in SPLITS.items():
        frames, classes = render(rng, count)
        for clip, number in zip(frames, classes.tolist(), strict=True):
            path = folder / f"{first:05d}.mkv"
            write_video(path, clip)
            coin, other = rng.random(), (number + rng.integers(1, NUM_CLASSES)) % NUM_CLASSES
            given = None if coin < MISSING else class_name(int(other)) if coin < MISSING + WRONG else class_name(number)
            lines.append(json.dumps({"uri": str(path), "label": given, "truth": class_name(number), "split": split}) + "\n")
            first += 1
    (folder / "clips.jsonl").write_text("".join(lines))
    for of in (folder, work / ALL):
        build(str(folder / "clips.jsonl"), str(of / "manifest"), BuildOptions(chunk_size=CHUNK_SIZE))


def class_name(number: int) -> str:
    return f"{SHAPES[number // len(DIRECTIONS)]}-{number % len(DIRECTIONS)}"


def render(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 clips [n, 8, 32, 32, 3] of grey shapes that move around a torus, over noise; classes [n]."""
    classes = rng.integers(0, NUM_CLASSES, count)
    grid = np.arange(SIZE_PX)
    clips = np.zeros((count, NUM_FRAMES, SIZE_PX, SIZE_PX), np.float32)
    for clip, number in zip(clips, classes.tolist(), strict=True):
        shape, (dx, dy) = SHAPES[number // len(DIRECTIONS)], DIRECTIONS[number % len(DIRECTIONS)]
        (x, y), speed, half, light = rng.uniform(0, SIZE_PX, 2), rng.uniform(1.1, 3), rng.uniform(4.7, 7.7), rng.uniform(45, 105)
        for frame in clip:
            across, down = (np.minimum((grid - c) % SIZE_PX, (c - grid) % SIZE_PX) for c in (x, y))
            frame += light * mask(shape, down[:, None], across[None], half)
            x, y = x + speed * dx, y + speed * dy
        clip += rng.normal(rng.uniform(60, 120), 24, clip.shape)
    return np.repeat(clips.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1), classes


def mask(shape: str, down: np.ndarray, across: np.ndarray, half: float) -> np.ndarray:
    """Where a shape is, from distances to its middle."""
    if shape == "square":
        return (down < half * 0.8) & (across < half * 0.8)
    if shape == "cross":
        return ((down < half / 3) & (across < half)) | ((across < half / 3) & (down < half))
    distance: np.ndarray = np.hypot(down, across)
    return np.asarray((distance < half) & (distance > half * 0.55))


def write_video(path: Path, clip: np.ndarray) -> None:
    """Lossless: what is decoded is what was rendered."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = SIZE_PX, SIZE_PX, "gray"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[..., 0]), format="gray")))
        container.mux(stream.encode(None))


def _run(clips: Path, teacher: str, arm: str, recipe: Mapping[str, Any], seed: int = 0) -> Run:
    """The run of one arm on the clips of a seed, or of all; labels and frames are in a store of all."""
    folder = clips.parent
    tree = {
        "name": "toy",
        "output": str(clips / f"{teacher}-{arm}"),
        "compute": {"decode": {"backend": "pyav"}},
        "data": {"manifest": str(clips / "manifest"), "allow": ["/"], "split": {"by": "column"}, "keep_frames": "raw"},
        "labels": {"mode": "stored", "store": str(folder / "labels"), "encodings": {"logits": "fp32"}},
        "recipe": {"name": "substage", "student": STUDENT, "teacher": {"name": "student", "path": str(folder / teacher), "substages": True}}
        | {"cascade": CASCADE}
        | dict(recipe),
        "train": {"batch_size": BATCH_SIZE, "learning_rate": RATE, "warmup_fraction": 0.1, "seed": seed, "check_every_steps": 0},
        "checkpoint": {"every_examples": 10**6, "keep": 1},
    }
    return run_files.parse(tree)


if __name__ == "__main__":
    main()
