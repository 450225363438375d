"""What `vkd submit` asks of a cluster, and what it refuses here, before anything is sent: no Ray."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vkd import models, planning
from vkd import run as run_files
from vkd.errors import ConfigError, redact
from vkd.run import Run
from vkd.teachers import TEACHERS

VERBS = ("run", "label", "distill", "evaluate", "plan", "verify")
RUNTIME_ENV = "jobs/runtime_env.yaml"
PLACES = ("output", "data.manifest", "data.source", "data.allow", "labels.store")
PLACEHOLDER = "://BUCKET"
ENVIRONMENT = {  # a stopped driver ends as after Ctrl-C, and gets time for it; Ray's own are SIGTERM and 3 s
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
SECRET_WORDS = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS", "KEY", "KEYS"}
NOT_SECRET_ENDINGS = ("_PATH", "_FILE", "_DIR", "_MODE")
MAX_NAME_CHARS = 40
DOMINATES = 0.8  # a folder's part that is named in its place when it weighs this share


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

    @property
    def prefix(self) -> str:
        """Of the job's id; a number follows. The same for every submission of one output."""
        return f"vkd-{self.name}-{_digest(chr(10).join(self.outputs))[:8]}-"

    @property
    def entrypoint(self) -> str:
        return f"exec python -m vkd.supervisor {shlex.join([self.verb, *self.words])}"

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
            raise ConfigError(f"{word!r} holds a credential, and words are shown with the job", action=_ACCESS)
    runs = run_files.load(run, overrides)
    if verb != "run":
        run_files.load_one(run, overrides)
    notes: list[str] = []
    written = run_files.trees(run, overrides)
    paths = [_inside(path) for path in dict.fromkeys([run, *(path for path, _ in written)])]
    for loaded, (path, tree) in zip(runs, written, strict=True):
        _check(loaded, path)
        notes += _check_places(tree, path)
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


_ACCESS = "leave it out: give the nodes access by an instance role, or by their own environment"


def _inside(path: str) -> str:
    """A run file's path in the package, whose text must hold no credential."""
    inside = os.path.relpath(path)
    if inside.startswith(os.pardir):
        action = f"change to a folder that holds it: cd {os.path.dirname(os.path.abspath(path))}"
        raise ConfigError("lies outside the current directory, which is what is uploaded", where=path, action=action)
    _refuse_secrets(path)
    return Path(inside).as_posix()


def _refuse_secrets(path: str) -> None:
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if redact(line) != line:
            raise ConfigError(f"line {number} holds a credential, and the file is uploaded", where=path, action=_ACCESS)


def _check(run: Run, path: str) -> None:
    """Raises ConfigError for what is known to be wrong without looking at any data."""
    if run.compute.address not in (None, "auto"):
        action = "leave the key out, and name the cluster to vkd submit --address"
        raise ConfigError("compute.address: a job runs on the cluster that it is submitted to", where=path, action=action)
    for spec in run.recipe.teachers.values():
        models.find(spec, TEACHERS, "teacher")
    planning.student_sampling(run)


def _check_places(tree: Mapping[str, Any], path: str) -> Iterator[str]:
    """A note when there are local places. Raises ConfigError for one that would lie in the unpacked package, on one node."""
    local = []
    for key in PLACES:
        value = _look_up(tree, key)
        for place in [value] if isinstance(value, str) else value or ():
            if PLACEHOLDER in place:
                raise ConfigError(f"{key}: {place!r} names no bucket", where=path, action=f"add {key}=s3://YOUR-BUCKET/...")
            if "://" not in place and not place.startswith("/"):
                said = f"{key}: {place!r} is relative, and would lie in the unpacked package of one node"
                action = f"add {key}=s3://..., or the absolute path of storage that all nodes share"
                raise ConfigError(said, where=path, action=action)
            if place.startswith(("/", "file://")):
                local.append(key)
    if local:
        yield f"note: {', '.join(dict.fromkeys(local))} are paths of a file system: every node must find the same folder there"


def _look_up(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def read_runtime_env(path: str | None) -> dict[str, Any]:
    """What a runtime environment file says, or jobs/runtime_env.yaml when there is one, with the defaults of vkd."""
    place = path or RUNTIME_ENV
    said: Any = {}
    if path is not None or os.path.exists(place):
        try:
            said = yaml.safe_load(Path(place).read_text()) or {}
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=place, action="check the path") from error
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", where=place, action="mend the file") from error
        _refuse_secrets(place)
    if not isinstance(said, dict) or "working_dir" in said:
        raise ConfigError("is no mapping, or names a working_dir", where=place, action="the current directory is what is uploaded")
    excludes, variables = said.get("excludes") or [], said.get("env_vars") or {}
    if not isinstance(excludes, list) or not all(isinstance(pattern, str) for pattern in excludes):
        raise ConfigError("excludes is no list of patterns", where=place, action='write excludes: [runs, "*.mp4"]')
    if not isinstance(variables, dict):
        raise ConfigError("env_vars is no mapping", where=place, action="write env_vars: {NAME: value}")
    for name, value in variables.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ConfigError(f"env_vars.{name} is not text", where=place, action=f'quote it: {name}: "{value}"')
        if SECRET_WORDS & set(name.upper().split("_")) and not name.upper().endswith(NOT_SECRET_ENDINGS):
            raise ConfigError(f"env_vars.{name} looks like a credential, and is shown with the job", where=place, action=_ACCESS)
    return said | {"excludes": excludes, "env_vars": ENVIRONMENT | variables}


def check_size(sizes: Mapping[str, int], max_bytes: int) -> int:
    """The size of what is uploaded. Raises ConfigError when it is too much, naming what weighs most."""
    num_bytes = sum(size + 2 * len(path) + 128 for path, size in sizes.items())  # stored, not compressed, and two headers
    if num_bytes >= max_bytes:
        named = ", ".join(f"{path} {size / 2**20:,.0f} MiB" for path, size in largest(sizes))
        action = f"add them to excludes in {RUNTIME_ENV}, or to .gitignore"
        what = f"holds {num_bytes / 2**20:,.0f} MiB to upload, and Ray takes {max_bytes / 2**20:,.0f}: {named}"
        raise ConfigError(what, where="the current directory", action=action)
    return num_bytes


def largest(sizes: Mapping[str, int], count: int = 3) -> list[tuple[str, int]]:
    """The files and folders (with a slash) that weigh most, none inside another."""
    totals: Counter[str] = Counter()
    for path, size in sizes.items():
        totals[path] += size
        for end in (i for i, char in enumerate(path) if char == "/"):
            totals[path[: end + 1]] += size
    top = Counter({name: size for name, size in totals.items() if "/" not in name[:-1]})
    return [(name, totals[name]) for name in (_heart(name, totals) for name, _ in top.most_common(count))]


def _heart(name: str, totals: Mapping[str, int]) -> str:
    """A folder, or the one part of it that is nearly all of its weight."""
    parts = [other for other in totals if other.startswith(name) and other != name and "/" not in other[len(name) : -1]]
    heaviest = max(parts, key=totals.__getitem__, default=name) if name.endswith("/") else name
    return _heart(heaviest, totals) if heaviest != name and totals[heaviest] > DOMINATES * totals[name] else name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
