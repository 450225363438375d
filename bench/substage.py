"""Staged distillation on real clips: Weizmann's 10 actions, the people tested never seen, labels 40 % wrong and 20 % missing.

    python bench/substage.py --json                    3 seeds, 3 folds of 3 people; predictions pooled over the 90 clips
    python bench/substage.py --fractions 1 --json      and, at the first seed, with all, half and a fifth of the clips labelled

The teacher is a probe on frozen EfficientNet-Lite0, fitted on the same weak labels; it answers each person it learns from without having
seen that person. The network's features are stored once, and each setting's probe is fitted on them; students train by
jobs/substage_student.yaml.
ours          the recipe `substage`, 23 epochs             kd           the teacher's answer and the labels, in the same steps
no_teacher    the labels alone                             ours_clean   ours with a teacher fitted on clean labels: an upper bound
Arms of a seed and fold share clips, weak labels, the student's first weights, batches and their order. However few labels are left, each
class keeps those of two people, which a probe that leaves each person out needs: of 60 clips 20 to 26 for a fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from measure import arguments, corpus, finish  # isort: skip  # before torch: it says how OpenMP's threads wait

import numpy as np
import torch
from substage_arms import Silent, plain

from vkd import checkpoint, pipeline, planning, probing, schema, training
from vkd import run as run_files
from vkd.console import Screen
from vkd.feeding import Feeder, open_sets
from vkd.metrics.calibration import expected_calibration_error
from vkd.phased import table_of
from vkd.planning import Plan
from vkd.recipes.substage.distiller import SubstageDistiller
from vkd.run import Run
from vkd.schema import GAP, TRAIN, Columns
from vkd.store.encodings import decode
from vkd.store.labelset import ChunkRows, LabelSet

JOBS = Path(__file__).resolve().parents[1] / "jobs"
PEOPLE = ("daria", "denis", "eli", "ido", "ira", "lena", "lyova", "moshe", "shahar")
FOLDS = tuple(PEOPLE[i::3] for i in range(3))
WRONG, MISSING, MIN_PEOPLE = 0.4, 0.2, 2  # of a class, whose labels must name it: a cross-fitted probe needs two
FEWER = (0.0, 0.5, 0.8)  # further shares of clips without a label
EPOCHS, RHO = 23, 0.9
RESAMPLES = 10_000


class Setting(NamedTuple):
    """One fold of one seed: the share of its clips that has no label, and whether the teacher sees clean labels."""

    seed: int
    fold: int
    missing: float = MISSING
    clean: bool = False

    @property
    def name(self) -> str:
        return f"seed{self.seed}-fold{self.fold}-missing{self.missing:g}" + ("-clean" if self.clean else "")


def main() -> None:
    options = arguments(__doc__ or "", seeds=3, first_seed=0, fractions=0, jobs=2, out="runs/substage")
    started_s, out = time.monotonic(), Path(os.path.abspath(options.out))
    write_sources(out / "sources.jsonl", Setting(options.first_seed, 0))  # what `vkd run jobs/substage.yaml` starts from
    work = planned(options)
    features = features_of(out)
    for setting in dict.fromkeys(setting for setting, _ in work):
        label(out, setting, features)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        told = list(pool.map(train, [(out, setting, arm) for setting, arm in work]))
    found: dict[tuple[str, float], list[Answers]] = {}
    for (setting, arm), answers in zip(work, told, strict=True):
        found.setdefault((arm, setting.missing), []).append(answers)
    finish(summary(found) | {"wall_s": time.monotonic() - started_s}, options.json)


def planned(options: argparse.Namespace) -> list[tuple[Setting, str]]:
    """Every training: its setting and arm."""
    seeds, folds = range(options.first_seed, options.first_seed + options.seeds), range(len(FOLDS))
    work = [(Setting(seed, fold), arm) for seed in seeds for fold in folds for arm in ("ours", "kd", "no_teacher")]
    work += [(Setting(seeds[0], fold, clean=True), "ours_clean") for fold in folds]
    if options.fractions:
        work += [(Setting(seeds[0], fold, share), arm) for share in FEWER for fold in folds for arm in ("ours", "kd", "no_teacher")]
    return work


def recipe_of(arm: str) -> Mapping[str, Any]:
    """What an arm changes in the shipped recipe."""
    changes = {"kd": plain(EPOCHS, RHO), "no_teacher": plain(EPOCHS, 0.0)}
    return changes.get(arm, {})


def features_of(out: Path) -> dict[tuple[str, int], Columns]:
    """(example, view) -> what the frozen network says of it, and its frames: labelled once, since no setting changes them."""
    write_sources(out / "all" / "sources.jsonl", None)
    teacher = {"name": "efficientnet_lite", "variant": 0, "substages": True}
    run = _run(out, "all", "substage_probe.yaml", "labels", f"recipe.teacher={json.dumps(teacher)}", "data.split={by: none}")
    pipeline.label(run, Screen())
    plan, sets = open_sets(run, Plan.of(run))
    found: dict[tuple[str, int], Columns] = {}
    for view in range(run.data.views.count):
        for chunk in plan.chunks:
            tables = [(sets[alias].read(view, chunk), sets[alias].spec.tensors) for alias in sets]
            columns = {name: np.asarray(decode(table, name)) for table, tensors in tables for name in tensors}
            for row, example in enumerate(plan.examples(chunk)[schema.EXAMPLE_ID].to_pylist()):
                found[example, view] = {name: values[row] for name, values in columns.items()}
    return found


def label(out: Path, setting: Setting, features: Mapping[tuple[str, int], Columns]) -> None:
    """The probe of a setting, and the label sets that both steps of jobs/substage.yaml make of these features."""
    folder = out / setting.name
    write_sources(folder / "sources.jsonl", setting)
    run = _run(out, setting.name, "substage_student.yaml")
    pipeline.build_manifest(run, Silent())
    plan = Plan.of(run)
    rows = [row for chunk in plan.chunks for row in plan.examples(chunk).to_pylist() if row["split"] == TRAIN]
    rows = [row for row in rows if row["truth" if setting.clean else "label"] is not None]
    numbers = [plan.classes().index(row["truth" if setting.clean else "label"]) for row in rows]
    views = range(run.data.views.count)
    embedding = np.stack([features[row[schema.EXAMPLE_ID], view]["embedding"] for view in views for row in rows])
    groups = np.array([row[schema.GROUP] for row in rows] * len(views))
    probe = probing.cross_fit(probing.Rows(embedding, np.array(numbers * len(views)), groups, len(rows)), plan.classes(), schema.GROUP)
    (folder / "probe.safetensors").write_bytes(probe.to_bytes())
    specs = planning.label_specs(run, planning.build_teachers(run.recipe.teachers))
    for spec in specs.values():
        label_set = LabelSet.create(run.store, spec, {}, {}, {})
        for view in views:
            for chunk in label_set.missing(view, plan.chunks):
                examples = plan.examples(chunk).to_pylist()
                mine = [features[example[schema.EXAMPLE_ID], view] for example in examples]
                columns = {name: np.stack([each[name] for each in mine]) for name in {*spec.tensors, "embedding"} - {"logits"}}
                columns["logits"] = probe.logits(columns["embedding"], probe.entries([example[schema.GROUP] for example in examples]))
                columns = {name: columns[name] for name in spec.tensors}
                label_set.write(view, chunk, ChunkRows([example[schema.EXAMPLE_ID] for example in examples], {}, columns))


def write_sources(place: Path, setting: Setting | None) -> None:
    """The clips as rows of uri, weak label, group, truth and split; people of the fold train nothing. Without a setting, the uris."""
    rows = [line.split("\t") for line in (corpus() / "MANIFEST.tsv").read_text().splitlines()[1:] if line.startswith("weizmann/")]
    table: Sequence[Mapping[str, Any]] = [{"uri": str(corpus() / path)} for path, *_ in rows]
    if setting is not None:
        table = settled(rows, setting)
    place.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in table)
    if not place.exists() or place.read_text() != text:
        place.write_text(text)


def settled(rows: Sequence[Sequence[str]], setting: Setting) -> Sequence[Mapping[str, Any]]:
    """The rows of a setting: drawn again until, of the usual share, labels of every class are heard from enough people."""
    rng, classes = np.random.default_rng([setting.seed, setting.fold]), sorted({row[2] for row in rows})
    while True:
        draws, table = zip(*(weak(rng, row, classes, setting.fold) for row in rows), strict=True)
        needed = [last_heard(draws, table, name) for name in classes]
        if all(len(mine) == MIN_PEOPLE and min(draws[i] for i in mine) >= MISSING for mine in needed):
            kept = {i for i, draw in enumerate(draws) if draw >= setting.missing}.union(*needed)
            return [row if i in kept else row | {"label": None} for i, row in enumerate(table)]


def weak(rng: np.random.Generator, row: Sequence[str], classes: Sequence[str], fold: int) -> tuple[float, dict[str, Any]]:
    """One clip with its label, which goes missing at shares above the number beside it: fewer labels are some of those of more."""
    (path, _, name, person, *_), (missing, wrong) = row, rng.random(2)
    other = classes[(classes.index(name) + int(rng.integers(1, len(classes)))) % len(classes)]
    split = GAP if person in FOLDS[fold] else TRAIN
    given = other if wrong < WRONG else name
    return missing, {"uri": str(corpus() / path), "label": given, schema.GROUP: person, "truth": name, "split": split}


def last_heard(draws: Sequence[float], table: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Of the rows to train on that are labelled with a class, the last to go missing: one each of as many people as it needs."""
    found: dict[str, int] = {}
    for i in sorted(range(len(table)), key=lambda i: -draws[i]):
        if table[i]["label"] == name and table[i]["split"] == TRAIN:
            found.setdefault(table[i][schema.GROUP], i)
    return list(found.values())[:MIN_PEOPLE]


class Answers(NamedTuple):
    """What one student answers of the people it never saw, and what became of the labels it learned from."""

    people: list[str]
    truths: np.ndarray  # [n]
    logits: dict[int, np.ndarray]  # exit -> [n, c]
    given: np.ndarray  # [m] class that a train label named, -1 for none
    refined: np.ndarray  # [m]
    train_truths: np.ndarray  # [m]


def train(work: tuple[Path, Setting, str]) -> Answers:
    """One arm of one setting, trained and asked."""
    torch.set_num_threads(1)
    out, setting, arm = work
    run = _run(out, setting.name, "substage_student.yaml", arm, f"train.seed={setting.seed}")
    pipeline.distill(run, Silent())
    plan, sets = open_sets(run, Plan.of(run))
    loop = training.new_loop(run, plan, {alias: label_set.spec for alias, label_set in sets.items()})
    loop.restore(checkpoint.newest(run.output) or "")
    assert isinstance(loop.distiller, SubstageDistiller)
    loop.distiller.eval()
    rows = [row for chunk in plan.chunks for row in plan.examples(chunk).to_pylist()]
    classes, feeder = plan.classes(), Feeder(run, plan, sets, GAP)
    parts, numbers = list[dict[int, torch.Tensor]](), list[int]()
    with torch.inference_mode():
        for fed in feeder.stream(feeder.one_pass(), 32, seed=0):
            parts.append(loop.distiller.exit_logits(fed.batch))
            numbers += fed.batch[schema.EXAMPLE].tolist()
    held = [rows[number] for number in numbers]
    logits = {k: torch.cat([part[k] for part in parts]).numpy() for k in parts[0]}
    table = table_of(run, plan, sets["teacher"])
    assert table is not None
    version = table.at(table.prepare(run.train.epochs))
    refined = np.concatenate([np.asarray(decode(version.read(0, chunk), "q")) for chunk in plan.chunks]).argmax(axis=1)
    mine = np.array([row["split"] == TRAIN for row in rows])
    given = np.concatenate([planning.label_numbers(plan.examples(chunk), classes) for chunk in plan.chunks])
    truths = np.array([classes.index(row["truth"]) for row in rows])
    right = np.array([classes.index(row["truth"]) for row in held])
    print(f"{setting.name} {arm:12s} {(logits[max(logits)].argmax(1) == right).mean():.3f}", flush=True)
    return Answers([row[schema.GROUP] for row in held], right, logits, given[mine], refined[mine], truths[mine])


def summary(found: Mapping[tuple[str, float], Sequence[Answers]]) -> dict[str, Any]:
    """Accuracies with their intervals, the paired test, exits, calibration, and what became of the labels."""
    result: dict[str, Any] = {"num_people": len(PEOPLE)}
    by_person = {key: of_people(answers) for key, answers in found.items()}
    rows = []
    for (arm, missing), answers in found.items():
        per_person = np.array(list(by_person[arm, missing].values()))
        low, high = interval(per_person)
        n = sum(len(each.truths) for each in answers)
        share = float(np.mean(np.concatenate([each.given for each in answers]) >= 0))
        rows.append((arm, f"{share:.0%}", str(n), f"{per_person.mean():.3f}", f"{low:.3f} - {high:.3f}"))
        result[f"{arm}@{1 - missing:g}"] = {"accuracy": float(per_person.mean()), "interval": (low, high), "n": n, "labelled": share}
        result[f"{arm}@{1 - missing:g}"] |= details(answers)
    Screen().table("accuracy on people never seen", ("arm", "labelled", "n", "mean", "95 %, over people"), rows)
    for other in ("kd", "no_teacher"):
        ours, theirs = (by_person[arm, MISSING] for arm in ("ours", other))
        gains = np.array([ours[person] - theirs[person] for person in PEOPLE])
        result[f"gain_over_{other}"] = {"mean": float(gains.mean()), "interval": interval(gains), "p": sign_flips(gains)}
    return result


def of_people(answers: Sequence[Answers]) -> dict[str, float]:
    """Each person's accuracy, mean over seeds."""
    rights: dict[str, list[float]] = {person: [] for person in PEOPLE}
    for each in answers:
        for person, right in zip(each.people, each.logits[max(each.logits)].argmax(axis=1) == each.truths, strict=True):
            rights[person].append(float(right))
    return {person: statistics.mean(values) for person, values in rights.items()}


def details(answers: Sequence[Answers]) -> dict[str, Any]:
    """Accuracy of each exit, calibration error, and how given labels, right, wrong or missing, ended."""
    truths = np.concatenate([each.truths for each in answers])
    logits = {k + 1: np.concatenate([each.logits[k] for each in answers]) for k in answers[0].logits}
    given, refined, train = (np.concatenate([getattr(a, name) for a in answers]) for name in ("given", "refined", "train_truths"))
    kinds = {"right": given == train, "wrong": (given >= 0) & (given != train), "missing": given < 0}
    return {
        "exits": {k: float((x.argmax(axis=1) == truths).mean()) for k, x in logits.items()},
        "calibration_error": expected_calibration_error(torch.softmax(torch.from_numpy(logits[max(logits)]), 1).numpy(), truths),
        "labels_right_in_the_end": {
            name: f"{int((refined[rows] == train[rows]).sum())} of {int(rows.sum())}" for name, rows in kinds.items()
        },
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the means of people drawn with replacement."""
    means = np.random.default_rng(0).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def sign_flips(gains: np.ndarray) -> float:
    """Two-sided p of a mean gain at least as large, when each person's sign is a coin's: all 2^9 of them."""
    signs = 1 - 2 * ((np.arange(2 ** len(gains))[:, None] >> np.arange(len(gains))) & 1)
    return float((np.abs(signs @ gains) >= abs(gains.sum()) - 1e-12).mean())


def _run(out: Path, name: str, file: str, arm: str = "labels", *changes: str) -> Run:
    """A shipped run file with its places under the setting's folder, and what an arm changes."""
    folder = out / name
    overrides = [f"output={folder}/{arm}", f"data.source={folder}/sources.jsonl", f"data.manifest={folder}/manifest"]
    overrides += [f"labels.store={folder}/labels", f"recipe.teacher.path={folder}/probe.safetensors", "data.keep_frames=raw"]
    overrides += [f"recipe.{key}={json.dumps(value)}" for key, value in recipe_of(arm).items()]
    return run_files.load_one(JOBS / file, [*overrides, f"data.allow=[{json.dumps(str(corpus()))}]", "labels.mode=stored", *changes])


if __name__ == "__main__":
    main()
