"""`vkd distill` with labels made live while its processes are killed: no example may be trained twice or left out.

    python bench/chaos_train.py --kills 20 --workers 1 --json

Killed by SIGKILL in a seeded order on a real Ray cluster: a train worker, a teacher actor, the driver. Each kill comes only after
at least one new round was saved since the last one. When the driver has ended, the same command is started again.

`miscounted` is how many of the planned examples the final weights saw another number of times than there are epochs: the distiller
counts in a buffer that lies in the checkpoints, so what a lost attempt trained does not count. Then the same run is trained in this
process without kills, from stored labels: with one worker the final weights and the last round's losses must be equal to the
bit. With several, sums run in another order than in one process, so the same command is run again without kills, on as many workers:
`losses_equal_calm` compares with that run, and `distance` is how far the losses are from it, as a share of the range of three seeds,
one of which is this run's own; within the range means at most 1.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from measure import arguments, corpus  # isort: skip  # before torch: it says how OpenMP's threads wait

import torch
from chaos_driver import Driver, under_fire
from raylets import NUM_CPUS, Cluster, kill
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vkd import checkpoint, labelling, training
from vkd import run as run_files
from vkd.loop import RoundReport
from vkd.manifest import BuildOptions, build
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import TRAIN

import psutil  # isort: skip

KINDS = ("train worker", "teacher actor", "driver")
EPOCHS = 5
SEEDS = (0, 1, 2)
SILENCE_S = 300.0  # without a new round: something hangs
MAX_DELAY_S = 3.0  # between a new round and the kill


class Trial:
    """Kills one process after another."""

    def __init__(self, cluster: Cluster, driver: Driver, output: Path, seed: int) -> None:
        self.cluster, self.driver, self.output = cluster, driver, output
        self.random, self.kills, self.finished = random.Random(seed), Counter[str](), False

    def run(self, num_kills: int) -> None:
        kinds = [KINDS[i % len(KINDS)] for i in range(num_kills)]
        self.random.shuffle(kinds)
        step = -1
        for number, kind in enumerate(kinds, start=1):
            if not self._wait_for_more_than(step):
                return
            step = self._step()
            time.sleep(self.random.uniform(0.0, MAX_DELAY_S))
            while not (targets := self._targets(kind)):
                if self.driver.keep_going():
                    self.finished = True
                    return
                time.sleep(0.05)
            print(f"{number:3d} of {num_kills}: {kind}, step {step}", flush=True)
            kill([self.random.choice(targets)])
            self.kills[kind] += 1

    def finish(self) -> None:
        """Let it train what is left."""
        while not self.finished and self._wait_for_more_than(self._step()):
            pass

    def _wait_for_more_than(self, step: int) -> bool:
        """Wait for a new checkpoint; False when the command has ended with success."""
        since_s = time.monotonic()
        while self._step() <= step:
            if self.driver.keep_going():
                self.finished = True
                return False
            if time.monotonic() - since_s > SILENCE_S:
                raise RuntimeError(f"no new round for {SILENCE_S:.0f} s; the driver said {self.driver.last_words()}")
            time.sleep(0.05)
        return True

    def _step(self) -> int:
        """Of the newest checkpoint."""
        return max((int(done.parent.name.removeprefix("step-")) for done in self.output.glob("attempts/*/step-*/DONE")), default=-1)

    def _targets(self, kind: str) -> list[psutil.Process]:
        if kind == "driver":
            return [psutil.Process(self.driver.process.pid)] if self.driver.process is not None else []
        if kind == "teacher actor":
            return self.cluster.teacher_actors()
        return self.cluster.train_workers()


def main() -> None:
    options = arguments("vkd distill under fire", kills=20, workers=1, seed=0, clips="wagon", keep=0)
    under_fire(chaos, options)


def chaos(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train under fire, then compare with training in peace."""
    build(str(corpus() / options.clips), str(folder / "manifest"), BuildOptions(chunk_size=8))
    tree = tree_of(folder, options.workers)
    tree["recipe"]["num_examples"] = Plan.of(run_files.parse(_copy(tree))).num_examples
    run = run_files.parse(_copy(tree))
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    cluster, started_s = Cluster(folder), time.monotonic()
    driver = Driver(cluster, ["distill", str(folder / "run.yaml"), "--json"], folder / "driver.log")
    trial = Trial(cluster, driver, Path(run.output), options.seed)
    try:
        cluster.start()
        trial.run(options.kills)
        trial.finish()
        fire_s = time.monotonic() - started_s
        calm = in_peace(run, folder, cluster) if options.workers > 1 else {}
    finally:
        cluster.kill_all()
    return {
        "kills": trial.kills.total(),
        **{f"kills, {kind}": trial.kills[kind] for kind in KINDS},
        "wall_s": fire_s,
        "driver_starts": driver.starts,
        "driver_ends": dict(driver.ends),
        "tracebacks": driver.tracebacks,
        "rounds": len(_last_losses(run, all_steps=True)),
        "miscounted": miscounted(run),
        **compared(run, folder, calm),
    }


def in_peace(run: Run, folder: Path, cluster: Cluster) -> dict[str, float]:
    """The last losses of the same command without kills, on the same cluster."""
    words = ["distill", str(folder / "run.yaml"), f"output={folder}/calm", f"labels.store={folder}/calm/labels", "--json"]
    driver = Driver(cluster, words, folder / "calm.log")
    while not driver.keep_going():
        if driver.starts > 1:
            raise RuntimeError(f"it ended in peace; it said {driver.last_words()}")
        time.sleep(0.5)
    found: dict[str, float] = _last_losses(run_files.parse(run.model_dump(mode="json"), [f"output={folder}/calm"]))
    return found


def miscounted(run: Run) -> int:
    """Examples that the final weights saw more or less than once an epoch."""
    newest = checkpoint.newest(run.output)
    assert newest is not None
    seen, plan = load_file(f"{newest}/{checkpoint.WEIGHTS}")["seen"], Plan.of(run)
    planned = torch.zeros_like(seen)
    for position, rows in enumerate(plan.rows(TRAIN)):
        planned[torch.tensor(rows, dtype=torch.int64) + position * plan.chunk_size] = run.train.epochs
    return int((seen != planned).sum())


def compared(run: Run, folder: Path, calm: dict[str, float]) -> dict[str, Any]:
    """The final losses and weights against those of runs without kills: `calm`, and from stored labels, in this process."""
    torch.set_num_threads(1)
    losses = {seed: _trained_in_peace(run, folder, seed) for seed in SEEDS}
    final = _last_losses(run)
    ours, theirs = (load_file(f"{place}/student/{checkpoint.WEIGHTS}") for place in (run.output, folder / "peace0"))
    low, high = ({name: pick(each[name] for each in losses.values()) for name in final} for pick in (min, max))
    distance = max(abs(final[name] - (calm or losses[0])[name]) / (high[name] - low[name]) for name in final)
    return {
        "final_losses": final,
        **({"calm": calm, "losses_equal_calm": final == calm} if calm else {}),
        **{f"in peace, seed {seed}": found for seed, found in losses.items()},
        "losses_within_seeds": distance <= 1,
        "distance": distance,
        "losses_equal": final == losses[0],
        "weights_bit_equal": all(torch.equal(ours[name], theirs[name]) for name in theirs),
    }


def _trained_in_peace(run: Run, folder: Path, seed: int) -> dict[str, float]:
    changes = ["labels.mode=stored", f"output={folder}/peace{seed}", f"train.seed={seed}", "compute.student.workers=0"]
    changes.append(f"compute.teacher.actors={NUM_CPUS}")  # of one thread each, as under fire: labels differ in the last bit by threads
    peace, told = run_files.parse(run.model_dump(mode="json"), changes), list[RoundReport]()
    labelling.label(peace, Plan.of(peace).chunks, lambda report: None)
    training.train(peace, told.append)
    return _rounded(told[-1].losses)


def _last_losses(run: Run, all_steps: bool = False) -> Any:
    """Of the last round; or the steps of all rounds that count."""
    board = EventAccumulator(f"{run.output}/tensorboard").Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith("loss/")]
    if all_steps:
        return {event.step for event in board.Scalars(tags[0])}
    return _rounded({tag.removeprefix("loss/"): board.Scalars(tag)[-1].value for tag in tags})


def _rounded(losses: dict[str, float]) -> dict[str, float]:
    """As TensorBoard keeps them, in float32."""
    return {name: torch.tensor(value, dtype=torch.float32).item() for name, value in sorted(losses.items())}


def tree_of(folder: Path, workers: int) -> dict[str, Any]:
    """Small clips, two frames for the teacher, all cores shared by decoding, teacher and students."""
    return {
        "name": "chaos",
        "output": str(folder / "out"),
        "data": {"manifest": str(folder / "manifest"), "allow": [str(corpus())]},
        "labels": {"mode": "live", "store": str(folder / "labels")},
        "recipe": {
            "name": "chaos_recipe:CountedKD",
            "num_examples": 1,  # known once the manifest is there
            "teacher": {"name": "efficientnet_lite", "num_frames": 2},
            "student": {"name": "shift_cnn", "num_frames": 2, "size_px": 32},
        },
        "train": {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 0.002},
        "checkpoint": {"every_examples": 24},
        "compute": {
            "decode": {"workers": 1},
            "teacher": {"actors": 1},
            "student": {"workers": workers, "cpus": 0.4 * NUM_CPUS / workers},
        },
    }


def _copy(tree: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(tree))
    return copy


if __name__ == "__main__":
    main()
