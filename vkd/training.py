"""Training: in the driver, or in a Ray Train worker group. Every start is an attempt; the newest finished round decides the state."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
import yaml
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.tensorboard import SummaryWriter

from vkd import checkpoint, cluster, gather, teacher_use
from vkd import run as run_files
from vkd.checkpoint import Position
from vkd.errors import ConfigError
from vkd.feeding import Feeder, open_sets
from vkd.loop import Loop, RoundReport, as_metrics
from vkd.planning import Plan
from vkd.run import Run
from vkd.schema import TRAIN
from vkd.stages import device
from vkd.store import files
from vkd.store.labelset import LabelSet
from vkd.teacher_use import TeacherUse

OnRound = Callable[[RoundReport], None]
MAX_FAILURES = 3
DECIDES = ("data", "labels", "recipe", "train", "checkpoint")  # sections that decide the weights; compute does not
DECIDES_NOT = {  # less these
    "data": {"allow", "max_reject_fraction", "max_inline_bytes", "max_requests_per_s"},
    "train": {"check_every_steps"},
}


@dataclass(frozen=True)
class TrainReport:
    """What training did: `resumed_from` is a step, 0 for a fresh start; `skipped` when it was finished before."""

    student: str
    skipped: bool
    resumed_from: int
    num_steps: int
    num_examples: int


def student_folder(run: Run) -> str:
    """Where the run exports its student."""
    return files.join(run.output, "student")


def train(run: Run, on_round: OnRound) -> TrainReport:
    """Train the run's student and export it; goes on from the newest checkpoint, does nothing when it is finished."""
    claim_output(run)
    folder = student_folder(run)
    if files.exists(files.join(folder, checkpoint.CONFIG)):
        done = json.loads(files.read(files.join(folder, checkpoint.CONFIG)))["trained"]
        return TrainReport(folder, True, done["step"], done["step"], done["num_examples"])
    found = checkpoint.newest(run.output)
    resumed_from = int(found.rsplit("-", 1)[-1]) if found else 0
    attempt = checkpoint.new_attempt(run.output)
    if run.compute.student.workers == 0:
        train_rank(run, attempt, on_round)
    else:
        open_sets(run, Plan.of(run))  # what lacks is said here, not by a worker
        with cluster.session(run.compute), cluster.worker_errors():
            _fit_group(run, attempt)
    done = json.loads(files.read(files.join(folder, checkpoint.CONFIG)))["trained"]
    return TrainReport(folder, False, resumed_from, done["step"], done["num_examples"])


def train_rank(run: Run, attempt: str, on_round: OnRound) -> None:
    """One rank's training, from the newest checkpoint to the export."""
    rank, world_size = gather.world()
    plan, sets, loop = _loop(run)
    feeder = Feeder(run, plan, sets, TRAIN, rank, world_size)
    if not sum(feeder.sizes):
        raise ConfigError("no example is left to train on", where="data.split", action="hold out less, or add videos")
    if rank == 0 and plan.share < 1:
        print(
            f"training on {plan.share:.0%} of the planned clips: the others lack labels (labels.allow_partial)", file=sys.stderr, flush=True
        )
    found = checkpoint.newest(run.output)
    position = checkpoint.restore(found, loop.distiller, loop.optimizer) if found else Position()
    use = _watched(run, loop, position)
    board = SummaryWriter(files.join(run.output, "tensorboard"), purge_step=position.step) if rank == 0 else None

    def after_round(report: RoundReport, reached: Position) -> None:
        if board is not None:
            checkpoint.save(attempt, reached, loop.distiller, loop.optimizer)
            checkpoint.prune(run.output, run.checkpoint.keep)
            for name, value in (as_metrics(report) | use.metrics()).items():
                board.add_scalar(name, value, reached.step)
            use.save(run.output)
        on_round(report)

    position = loop.fit(feeder, run.checkpoint.every_examples, position, after_round)
    if board is not None:
        board.close()
        _export(run, loop, sets, position, student_folder(run))


def export_newest(run: Run, folder: str) -> int:
    """Export the student of the newest checkpoint, finished or not; the steps that it was trained."""
    found = checkpoint.newest(run.output)
    if found is None:
        raise ConfigError("no checkpoint yet", where=run.output, action="vkd distill RUN first")
    _, sets, loop = _loop(run)
    position = checkpoint.restore(found, loop.distiller, loop.optimizer)
    _export(run, loop, sets, position, folder)
    return position.step


def _loop(run: Run) -> tuple[Plan, dict[str, LabelSet], Loop]:
    """The run's plan, label sets and untrained loop, the same on every rank."""
    plan, sets = open_sets(run, Plan.of(run))
    emits = {alias: label_set.spec.tensors for alias, label_set in sets.items()}
    torch.manual_seed(run.train.seed)
    return plan, sets, Loop(run.recipe.distiller(emits, len(plan.classes())), run.train, device())


def _watched(run: Run, loop: Loop, position: Position) -> TeacherUse:
    """Watches whether the loop's student uses its teacher; after a resume it knows what was found before."""
    use = TeacherUse(loop, run.recipe.needs)
    if position.step and (found := teacher_use.load(run.output)):
        use.recall(found)
    loop.watch = use
    return use


def _export(run: Run, loop: Loop, sets: Mapping[str, LabelSet], position: Position, folder: str) -> None:
    trained = {"step": position.step, "num_examples": position.num_examples}
    extra = {"trained": trained, "label_sets": [label_set.spec.name for label_set in sets.values()]}
    checkpoint.export(loop.distiller.student, run.recipe.student, folder, extra)


def claim_output(run: Run) -> None:
    """Save the resolved run with its results. Raises ConfigError, naming the key, when the output holds a run that differs."""
    place, resolved = files.join(run.output, "run.yaml"), run_files.dump(run)
    if files.exists(place):
        before, now = yaml.safe_load(files.read(place)), yaml.safe_load(resolved)
        for section in DECIDES:
            there, here = (_less(tree.get(section), DECIDES_NOT.get(section, set())) for tree in (before, now))
            if difference := _difference(there, here, section):
                raise ConfigError(
                    f"holds a run with another {difference}", where=run.output, action="name another output, or delete this one"
                )
    files.put(place, resolved.encode())


def _less(section: Any, keys: Set[str]) -> Any:
    return {k: v for k, v in section.items() if k not in keys} if isinstance(section, Mapping) else section


def _difference(before: Any, now: Any, path: str) -> str | None:
    """The first key that differs, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = (_difference(before.get(key), now.get(key), f"{path}.{key}") for key in sorted({*before, *now}))
        return next(filter(None, found), None)
    return None if before == now else f"{path}: {before!r} there, {now!r} here"


def _fit_group(run: Run, attempt: str) -> None:
    asked = run.compute.student
    have = ray.cluster_resources()
    for kind, each in (("CPU", asked.cpus), ("GPU", asked.gpus)):
        if asked.workers * each > have.get(kind, 0) + 1e-6:
            what = f"{asked.workers} workers need {asked.workers * each:g} {kind}s, the cluster has {have.get(kind, 0):g}"
            raise ConfigError(what, where="compute.student", action=f"lower compute.student.workers or compute.student.{kind.lower()}s")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # a report waits for the next check: 2 s by default
    each_worker = {"CPU": asked.cpus} | ({"GPU": asked.gpus} if asked.gpus else {})
    scaling = ScalingConfig(num_workers=asked.workers, use_gpu=asked.gpus > 0, resources_per_worker=each_worker)
    retries = FailureConfig(max_failures=MAX_FAILURES)
    ray_run = RunConfig(
        name=os.path.basename(attempt),
        storage_path=files.join(run.output, "ray_train"),
        failure_config=retries,
        logging_config=LoggingConfig("CRITICAL"),  # what goes wrong is raised
    )
    config = {"run": run.model_dump(mode="json"), "attempt": attempt}
    TorchTrainer(_train_worker, train_loop_config=config, scaling_config=scaling, run_config=ray_run).fit()


def _train_worker(config: dict[str, Any]) -> None:
    """What each worker of the group does."""
    run = run_files.parse(config["run"])
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every report, and every printed line again
    torch.set_num_threads(max(1, int(run.compute.student.cpus)))
    rank, _ = gather.world()

    def on_round(report: RoundReport) -> None:
        if rank == 0:
            sys.stderr.write(round_line(report) + "\n")  # stdout is for results
            sys.stderr.flush()
        ray.train.report(as_metrics(report))

    train_rank(run, config["attempt"], on_round)


def round_line(report: RoundReport) -> str:
    """A round in one line."""
    losses = "  ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
    lost = f"  unreadable {report.unreadable}" if report.unreadable else ""
    return (
        f"epoch {report.epoch + 1}  step {report.step}/{report.num_steps}  {losses}  "
        f"{report.examples_per_s:.1f} examples/s  data-wait {report.wait_fraction:.1%}{lost}"
    )
