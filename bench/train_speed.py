"""Training from stored labels against the bare student loop on the same batches already in memory.

    python bench/train_speed.py --json    ratio: examples/s of vkd's loop with kept frames / of the bare loop

Both arms take the same steps in turns. Without kept frames the student waits for decoders that share its
cores; its ratio is printed beside the bound student / (student + decode) in CPU seconds.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import arguments, corpus, finish, spread  # isort: skip  # before torch: it says how OpenMP's threads wait

import torch

from vkd import gather, labelling
from vkd import run as run_files
from vkd.checkpoint import Position
from vkd.feeding import Fed, Feeder, open_sets
from vkd.loop import Loop
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.rounds import rounds_of_epoch
from vkd.run import Run
from vkd.schema import TRAIN

EPOCHS = 5  # of one measurement: filling the read-ahead counts, as it does in a real training


def main() -> None:
    options = arguments(__doc__ or "", repeats=5, clips="wagon", student="small")
    folder = Path(tempfile.mkdtemp(prefix="vkd-bench-"))
    try:
        build(str(corpus() / options.clips), str(folder / "manifest"), BuildOptions(chunk_size=16))
        kept = _run(folder, options.student, keep_frames="jpeg")
        labelling.label(kept, Plan.of(kept).chunks, lambda report: None)
        finish(measure(folder, options.student, options.repeats), options.json)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, size: str, repeats: int) -> dict[str, Any]:
    """Bare loop and stored frames in turns, one pair to warm up; then one epoch that decodes as it goes."""
    run = _run(folder, size, keep_frames="jpeg")
    batches = in_memory(run)
    pairs = [(bare(run, batches * EPOCHS), from_store(run, EPOCHS)) for _ in range(repeats + 1)][1:]
    ratios = [stored.examples_per_s / plain.examples_per_s for plain, stored in pairs]
    once, unkept = bare(run, batches), from_store(_run(folder, size, keep_frames="none"), 1)
    return {
        "bare_examples_per_s": statistics.median(plain.examples_per_s for plain, _ in pairs),
        "stored_examples_per_s": statistics.median(stored.examples_per_s for _, stored in pairs),
        "data_wait": statistics.median(stored.data_wait for _, stored in pairs),
        "cpu_per_example_ratio": statistics.median(stored.cpu_s / plain.cpu_s for plain, stored in pairs),
        "unkept_data_wait": unkept.data_wait,
        "unkept_ratio": unkept.examples_per_s / once.examples_per_s,
        "unkept_bound": once.cpu_s / unkept.cpu_s,
        "ratio_spread": spread(ratios),
        "ratio": statistics.median(ratios),
    }


@dataclass(frozen=True)
class Measured:
    """One arm: its speed, the share of time it waited for data, CPU seconds of this process."""

    examples_per_s: float
    data_wait: float
    cpu_s: float


def _timed(work: Callable[[], float], num_examples: int) -> Measured:
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    wait_s = work()
    elapsed_s = time.monotonic() - started_s
    return Measured(num_examples / elapsed_s, wait_s / elapsed_s, time.process_time() - started_cpu_s)


def loop(run: Run) -> tuple[Loop, Feeder]:
    plan, sets = open_sets(run, Plan.of(run))
    torch.manual_seed(0)
    emits = {alias: label_set.spec.tensors for alias, label_set in sets.items()}
    return Loop(run.recipe.distiller(emits, 0), run.train, "cpu"), Feeder(run, plan, sets, TRAIN)


def in_memory(run: Run) -> list[Fed]:
    """Every batch of an epoch, as the loop would get them."""
    _, feeder = loop(run)
    rounds = rounds_of_epoch(feeder.sizes, 0, run.checkpoint.every_examples, run.train.seed)
    return list(feeder.stream(rounds, run.train.batch_size, run.train.seed))


def from_store(run: Run, epochs: int) -> Measured:
    """vkd's loop over the store."""
    run = run.model_copy(update={"train": run.train.model_copy(update={"epochs": epochs})})
    trained, feeder = loop(run)

    def work() -> float:
        trained.fit(feeder, run.checkpoint.every_examples, Position(), lambda report, position: None)
        return feeder.wait_s

    return _timed(work, epochs * sum(feeder.sizes))


def bare(run: Run, batches: list[Fed]) -> Measured:
    """The same steps by a plain loop over tensors that are there."""
    trained, _ = loop(run)
    distiller, optimizer = trained.distiller.train(), trained.optimizer

    def work() -> float:
        for fed in batches:
            optimizer.zero_grad(set_to_none=True)
            loss, _ = gather.total_loss(distiller(fed.batch))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), run.train.clip_norm)
            optimizer.step()
        return 0.0

    return _timed(work, sum(fed.num_examples for fed in batches))


def _run(folder: Path, size: str, keep_frames: str) -> Run:
    tree = {
        "name": "train-speed",
        "output": str(folder / "out"),
        "data": {"manifest": str(folder / "manifest"), "allow": [str(corpus())], "keep_frames": keep_frames},
        "labels": {"store": str(folder / "labels")},
        "recipe": {"name": "kd", "teacher": "efficientnet_lite", "student": {"name": "shift_cnn", "size": size}},
        "train": {"batch_size": 32},
    }
    return run_files.parse(tree)


if __name__ == "__main__":
    main()
