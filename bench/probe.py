"""What a student learned from its teacher: a linear probe for actions on Weizmann, the probed people left out of training.

    python bench/probe.py --json                    3 seeds, 3 folds of 3 people; accuracy pooled over the 90 clips
    python bench/probe.py --first-seed 100 --json   the seeds that settings were tuned on (NOTES.md)

Each arm gives features of the 90 clips; of each fold, a linear probe is fitted on six people and tested on the other three.
teacher      frozen EfficientNet-Lite0: its embedding. It has seen ImageNet and nothing of this corpus.
random       the student as initialised: sees nothing.
no_teacher   cross entropy on the class labels of wagon and of the six people; natural has no label and adds no loss.
distilled    what the teacher says of wagon, natural and the six people: no label, and no clip of the three.
transductive (--transductive 1, one training a seed) as distilled, but also the three people's clips, without labels. It has seen
             the test clips: printed for comparison, never part of the gate.
Arms of one seed start from the same backbone and take the same clips in the same order, batches and steps (transductive: more
clips). Losses and learning rates are their own. The gate compares the distilled student with random and no_teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from measure import arguments, corpus, finish

from vkd import models, pipeline, schema
from vkd import run as run_files
from vkd.checkpoint import Position
from vkd.console import Screen
from vkd.feeding import Feeder, open_sets
from vkd.loop import Loop
from vkd.manifest import Manifest
from vkd.metrics.probes import linear_probe
from vkd.planning import Plan
from vkd.run import Run
from vkd.store.labelset import LabelSet
from vkd.students import STUDENTS
from vkd.students.base import FEATURES, Student

JOB = Path(__file__).resolve().parents[1] / "jobs" / "corpus.yaml"
FOLDERS = ("wagon", "weizmann", "natural")
PEOPLE = ("daria", "denis", "eli", "ido", "ira", "lena", "lyova", "moshe", "shahar")
FOLDS = tuple(PEOPLE[i::3] for i in range(3))
EMBEDDING = "teacher.embedding"
NO_TEACHER = ("recipe.weights={kl: 0, cosine: 0, cross_entropy: 1}", "train.learning_rate=0.002")
Features = Mapping[str, tuple[np.ndarray, np.ndarray]]  # person -> features [10, d] and classes [10]


@dataclass
class Corpus:
    """The labelled corpus, and the runs that train on it."""

    distill: Run
    no_teacher: Run
    plan: Plan
    sets: Mapping[str, LabelSet]
    groups: list[list[str]] = field(init=False)  # of each row of each chunk

    def __post_init__(self) -> None:
        self.groups = [self.plan.examples(chunk)[schema.GROUP].to_pylist() for chunk in self.plan.chunks]

    def feeder(self, run: Run, leave_out: Collection[str] = (), only: str | None = None) -> Feeder:
        """Clips of all groups but some, or of one."""
        feeder = Feeder(run, self.plan, self.sets, schema.TRAIN)
        feeder.rows = [[i for i, g in enumerate(groups) if g not in leave_out and only in (None, g)] for groups in self.groups]
        return feeder


def main() -> None:
    options = arguments(__doc__ or "", seeds=3, first_seed=0, epochs=0, transductive=0, out="runs/corpus")
    started_s = time.monotonic()
    runs = [_run(options, overrides) for overrides in ((), NO_TEACHER)]
    counts = label(runs[0])
    plan, sets = open_sets(runs[0], Plan.of(runs[0]))
    accuracies = measure(Corpus(runs[0], runs[1], plan, sets), options)
    show(accuracies)
    settings = {"epochs": runs[0].train.epochs, "batch_size": runs[0].train.batch_size}
    finish({**counts, **settings, **gates(accuracies), "wall_s": time.monotonic() - started_s}, options.json)


def label(run: Run) -> dict[str, Any]:
    """Label every clip of the corpus that the store lacks; what became of each of them."""
    write_sources(Path(run.data.source or ""))
    pipeline.label(run, Screen())
    rejected = Manifest.load(run.data.manifest).rejects()["kind"].to_pylist()
    plan, sets = open_sets(run, Plan.of(run))
    summary = sets["teacher"].summary(0)
    reasons = {kind: rejected.count(kind) for kind in set(rejected)}
    for kind, count in summary.rejects.items():
        reasons[kind] = reasons.get(kind, 0) + count
    return {"planned": plan.num_examples + len(rejected), "labelled": summary.num_labelled, "rejected": reasons}


def write_sources(place: Path) -> None:
    """The clips as rows of uri, label and group; JSON lines, because an empty cell of a CSV is a label named ''."""
    rows = []
    for line in (corpus() / "MANIFEST.tsv").read_text().splitlines()[1:]:
        path, _, name, group, *_ = line.split("\t")
        folder = path.split("/")[0]
        if folder in FOLDERS:
            label_name = None if folder == "natural" else name
            rows.append(
                {
                    "uri": str(corpus() / path),
                    schema.LABEL: label_name,
                    schema.GROUP: group if folder == "weizmann" else Path(path).stem,
                }
            )
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(clips: Corpus, options: argparse.Namespace) -> dict[str, list[float]]:
    """Accuracy of each arm, seed by seed."""
    found: dict[str, list[float]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm, of_folds in _arms(clips, seed, bool(options.transductive)):
            found.setdefault(arm, []).append(accuracy(of_folds))
            print(f"seed {seed}: {arm:12s} {found[arm][-1]:.3f}", flush=True)
    return found


def _arms(clips: Corpus, seed: int, transductive: bool) -> Iterator[tuple[str, Sequence[Features]]]:
    """Features of the 90 clips, one set a fold, of each arm."""
    random = _student(clips.distill, seed)
    yield "teacher", [features(clips, random, EMBEDDING)] * len(FOLDS)
    yield "random", [features(clips, random)] * len(FOLDS)
    for arm, run in (("no_teacher", clips.no_teacher), ("distilled", clips.distill)):
        yield arm, [features(clips, train(clips, run, fold, seed)) for fold in FOLDS]
    if transductive:
        yield "transductive", [features(clips, train(clips, clips.distill, (), seed))] * len(FOLDS)


def train(clips: Corpus, run: Run, leave_out: Collection[str], seed: int) -> Student:
    """The student of a run after training without the clips of some people."""
    run = run.model_copy(update={"train": run.train.model_copy(update={"seed": seed})})
    distiller = run.recipe.distiller({alias: s.spec.tensors for alias, s in clips.sets.items()}, len(clips.plan.classes()))
    distiller.student.load_state_dict(_student(run, seed).state_dict(), strict=False)  # heads differ between arms, backbones must not
    loop = Loop(distiller, run.train, "cpu")
    loop.fit(clips.feeder(run, leave_out), run.checkpoint.every_examples, Position(), lambda report, position: None)
    return cast(Student, distiller.student.eval())


def _student(run: Run, seed: int) -> Student:
    """The untrained student, without heads; leaves the generator as the seed set it for what is built next."""
    torch.manual_seed(seed)
    student: Student = models.build(run.recipe.student, STUDENTS, "student", heads={})
    return student.eval()


@torch.inference_mode()
def features(clips: Corpus, student: Student, column: str = FEATURES) -> Features:
    """The student's features, or a label of the teacher's, of each person's clips."""
    found = {}
    for person in PEOPLE:
        feeder = clips.feeder(clips.distill, only=person)
        batches = [fed.batch for fed in feeder.stream(feeder.one_pass(), batch_size=32, seed=0)]
        parts = [student(batch[schema.FRAMES])[column] if column == FEATURES else batch[column] for batch in batches]
        real = torch.cat([batch["weight"] for batch in batches]).numpy() > 0  # an all-rejected batch is one row of weight 0
        found[person] = torch.cat(parts).numpy()[real], torch.cat([batch[schema.LABEL] for batch in batches]).numpy()[real]
    return found


def accuracy(of_folds: Sequence[Features]) -> float:
    """Of a probe a fold, fitted on the people kept and tested on those left out; pooled over all clips."""
    probes = []
    for fold, of_people in zip(FOLDS, of_folds, strict=True):
        kept = [of_people[person] for person in PEOPLE if person not in fold]
        held = [of_people[person] for person in fold]
        (train_x, train_y), (test_x, test_y) = ([np.concatenate(part) for part in zip(*side, strict=True)] for side in (kept, held))
        probes.append(linear_probe(train_x, train_y, test_x, test_y))
    return sum(probe.accuracy * probe.num_test for probe in probes) / sum(probe.num_test for probe in probes)


def gates(accuracies: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The paired mean gain over each baseline against the larger spread (max - min over seeds) of the two arms."""
    found: dict[str, Any] = {"accuracy": accuracies}
    passed = len(accuracies["distilled"]) > 1  # one seed has no spread
    for baseline in ("random", "no_teacher"):
        arms = accuracies["distilled"], accuracies[baseline]
        gain = statistics.mean(ours - theirs for ours, theirs in zip(*arms, strict=True))
        largest = max(max(values) - min(values) for values in arms)
        found |= {f"gain_over_{baseline}": gain, f"spread_with_{baseline}": largest}
        passed = passed and gain > largest
    return found | {"gates_passed": passed}


def show(accuracies: Mapping[str, Sequence[float]]) -> None:
    """A row an arm: mean, spread and every seed."""
    rows = [(arm, f"{statistics.mean(v):.3f}", f"{max(v) - min(v):.3f}", "  ".join(f"{x:.3f}" for x in v)) for arm, v in accuracies.items()]
    Screen().table("linear probe on Weizmann, people left out", ("arm", "mean", "spread", "per seed"), rows)


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> Run:
    """The shipped run under `--out`, nothing held out: the folds here decide who trains."""
    out = os.path.abspath(options.out)
    places = [f"output={out}", f"data.source={out}/sources.jsonl", f"data.manifest={out}/manifest", f"labels.store={out}/labels"]
    places.append(f"data.allow=[{json.dumps(str(corpus()))}]")  # sources.jsonl lies elsewhere
    epochs = [f"train.epochs={options.epochs}"] if options.epochs else []
    return run_files.load_one(JOB, [*places, "data.split={by: none}", *epochs, *overrides])


if __name__ == "__main__":
    main()
