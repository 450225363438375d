"""What `vkd submit` asks of a cluster, and what it refuses here, before anything is sent: no Ray."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkd import models, planning
from vkd import run as run_files
from vkd.errors import ConfigError, redact
from vkd.run import Run
from vkd.teachers import TEACHERS
from vkd.upload import GIVE_ACCESS, read_runtime_env, refuse_secrets

VERBS = ("run", "label", "distill", "evaluate", "plan", "verify")
PLACES = (
    *("output", "data.manifest", "data.source", "data.allow", "data.copies.out", "data.copies.distractors", "labels.store"),
    *("probe.out", "whitening.out", "pairs.out", "index.out", "index.coarse", "index.fine", "index.selector"),
    *("recipe.*.path", "recipe.*.store", "recipe.*.whitening"),  # what other runs made, and teachers read
    *("recipe.models.*.path", "recipe.models.*.store", "recipe.models.*.whitening"),
)
PLACEHOLDER = "://BUCKET"
MAX_NAME_CHARS = 40


@dataclass(frozen=True)
class Submission:
    """A command for a cluster. `words` are what follows the verb, `run_files` must be uploaded, `notes` are told to the user."""

    verb: str
    words: tuple[str, ...]
    name: str
    outputs: tuple[str, ...]
    digest: str
    run_files: tuple[str, ...]
    runtime_env: dict[str, Any]
    notes: tuple[str, ...] = ()
    max_restarts: int | None = None

    @property
    def prefix(self) -> str:
        """Of the job's id; a number follows. The same for every submission of one output."""
        return f"vkd-{self.name}-{_digest(chr(10).join(self.outputs))[:8]}-"

    @property
    def entrypoint(self) -> str:
        limit = [] if self.max_restarts is None else ["--max-restarts", str(self.max_restarts)]
        return f"exec python -m vkd.supervisor {shlex.join([*limit, self.verb, *self.words])}"

    @property
    def metadata(self) -> dict[str, str]:
        return {"verb": self.verb, "output": "\n".join(self.outputs), "digest": self.digest}


def prepare(verb: str, run: str, words: Sequence[str], runtime_env: str | None = None) -> Submission:
    """What to submit; `words` are overrides, then options of the verb.

    Raises ConfigError for what a cluster could not do, or must not see.
    """
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} cannot be submitted", action=f"use one of {', '.join(VERBS)}")
    first_option = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    overrides, options = words[:first_option], words[first_option:]
    for word in (run, *words):
        if redact(word) != word:
            raise ConfigError(f"{word!r} holds a credential, and words are shown with the job", action=GIVE_ACCESS)
    runs = run_files.load(run, overrides)
    if verb != "run":
        run_files.load_one(run, overrides)
    notes: list[str] = []
    written = run_files.trees(run, overrides)
    paths = [_inside(path) for path in dict.fromkeys([run, *(path for path, _ in written)])]
    for loaded, (path, tree) in zip(runs, written, strict=True):
        _check(loaded, path)
        notes += _check_places(tree, loaded, path)
    name = runs[0].name if len(runs) == 1 else re.sub(r"[^A-Za-z0-9._-]+", "-", Path(run).stem)
    return Submission(
        verb=verb,
        words=(paths[0], *words),
        name=name[:MAX_NAME_CHARS],
        outputs=tuple(dict.fromkeys(loaded.output for loaded in runs)),
        digest=_digest("\n".join([*options, *map(run_files.dump, runs)]))[:16],
        run_files=tuple(paths),
        runtime_env=read_runtime_env(runtime_env),
        notes=tuple(dict.fromkeys(notes)),
    )


def _inside(path: str) -> str:
    """A run file's path in the package, whose text must hold no credential."""
    inside = os.path.relpath(path)
    if inside.startswith(os.pardir):
        action = "change to the folder that holds it, and your own code if there is any"
        raise ConfigError("lies outside the current directory, which is what is uploaded", where=path, action=action)
    refuse_secrets(path)
    return Path(inside).as_posix()


def _check(run: Run, path: str) -> None:
    """Raises ConfigError for what is known to be wrong without looking at any data."""
    if run.compute.address not in (None, "auto"):
        action = "leave the key out, and name the cluster to vkd submit --address"
        raise ConfigError("compute.address: a job runs on the cluster that it is submitted to", where=path, action=action)
    for spec in run.recipe.teachers.values():
        models.find(spec, TEACHERS, "teacher")
    planning.student_sampling(run)


def _check_places(tree: Mapping[str, Any], run: Run, path: str) -> Iterator[str]:
    """A note when there are local places. Raises ConfigError for one that would lie in the unpacked package, on one node."""
    local = []
    for key, value in (found for pattern in PLACES for found in _look_up(tree, pattern)):
        for place in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
            if PLACEHOLDER in place:
                raise ConfigError(f"{key}: {place!r} names no bucket", where=path, action=f"add {key}=s3://YOUR-BUCKET/...")
            if "://" not in place and not place.startswith("/"):
                said = f"{key}: {place!r} is relative, and would lie in the unpacked package of one node"
                action = f"add {key}=s3://..., or the absolute path of storage that all nodes share"
                raise ConfigError(said, where=path, action=action)
            if place.startswith(("/", "file://")):
                local.append(key)
    if local:
        yield f"note: {', '.join(dict.fromkeys(local))}: a path of a file system, where every node must find the same folder"


def _look_up(tree: Any, pattern: str) -> Iterator[tuple[str, Any]]:
    """The keys of a tree that a pattern, in which `*` is any name, fits, each with its value."""
    name, dot, rest = pattern.partition(".")
    names = [] if not isinstance(tree, Mapping) else [*tree] if name == "*" else [name] if name in tree else []
    for found in names:
        yield from ((f"{found}.{key}", value) for key, value in _look_up(tree[found], rest)) if dot else [(found, tree[found])]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
