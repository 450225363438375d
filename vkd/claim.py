"""Whose an output folder is: the resolved run lies with its results, and another run is refused."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import yaml

from vkd import planning
from vkd import run as run_files
from vkd.errors import ConfigError
from vkd.planning import Plan
from vkd.run import Run
from vkd.store import files

DECIDES = ("data", "labels", "recipe", "train", "checkpoint")  # sections that decide the weights; compute does not
DECIDES_NOT = {  # less these
    "data": {"allow", "max_reject_fraction", "max_inline_bytes", "max_requests_per_s"},
    "labels": {"mode", "lead_rounds", "window_bytes"},
    "recipe": {"cache_bytes"},
    "train": {"check_every_steps"},
}


def claim_output(run: Run) -> None:
    """Save the resolved run with its results. Raises ConfigError, naming the key, when the output holds a run that differs."""
    place, resolved = files.join(run.output, "run.yaml"), run_files.dump(run)
    if files.exists(place):
        before, now = _today(yaml.safe_load(files.read(place))), yaml.safe_load(resolved)
        for section in DECIDES:
            there, here = (_less(tree.get(section), DECIDES_NOT.get(section, set())) for tree in (before, now))
            if difference := _difference(there, here, section):
                raise ConfigError(
                    f"holds a run with another {difference}", where=run.output, action="name another output, or delete this one"
                )
    files.put(place, resolved.encode())


def require_same_labels(run: Run, exported: Mapping[str, Any]) -> None:
    """Raises ConfigError when a finished student (its config) learned from other labels than the run has now.

    A run file names a teacher by its folder, and what lies there may have been trained anew.
    """
    teachers = planning.build_teachers(run.recipe.teachers)
    now = {planning.teacher_spec(run, alias, teacher).name for alias, teacher in teachers.items()}
    about = run.recipe.provenance(Plan.of(run))
    if now <= set(exported["label_sets"]) and about.items() <= exported.items():
        return
    others = ", ".join(sorted([*now, *about.values()]))
    what = f"the student there is finished, and learned from {', '.join(exported['label_sets']) or 'no labels'}; the run now has {others}"
    raise ConfigError(what, where=run.output, action="name another output, or delete this one to train anew")


def _today(tree: Any) -> Any:
    """The run with the defaults of keys that came after it was written; as it is when it is no run any more."""
    try:
        return yaml.safe_load(run_files.dump(run_files.parse(tree)))
    except ConfigError:
        return tree


def _less(section: Any, keys: Set[str]) -> Any:
    return {k: v for k, v in section.items() if k not in keys} if isinstance(section, Mapping) else section


def _difference(before: Any, now: Any, path: str) -> str | None:
    """The first key that differs, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = (_difference(before.get(key), now.get(key), f"{path}.{key}") for key in sorted({*before, *now}))
        return next(filter(None, found), None)
    return None if before == now else f"{path}: {before!r} there, {now!r} here"
