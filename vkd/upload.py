"""What is uploaded with a job, and the environment that it gets; neither may hold a secret."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vkd.errors import ConfigError, redact

RUNTIME_ENV = "jobs/runtime_env.yaml"
GIVE_ACCESS = "leave it out: give the nodes access by an instance role, or by their own environment"
ENVIRONMENT = {  # a stopped driver ends as after Ctrl-C, and gets time for it; Ray's own are SIGTERM and 3 s
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",
}
SECRET_WORDS = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS", "KEY", "KEYS"}
NOT_SECRET_ENDINGS = ("_PATH", "_FILE", "_DIR", "_MODE")
DOMINATES = 0.8  # a folder's part that is named in its place when it weighs this share


def refuse_secrets(path: str) -> None:
    """Raises ConfigError for a file that holds a credential, naming the line."""
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if redact(line) != line:
            raise ConfigError(f"line {number} holds a credential, and the file is uploaded", where=path, action=GIVE_ACCESS)


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
        refuse_secrets(place)
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
            raise ConfigError(f"env_vars.{name} looks like a credential, and is shown with the job", where=place, action=GIVE_ACCESS)
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
