"""Run files and workflow files as they are written: YAML, read safely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vkd.errors import ConfigError

MAX_VALUES = 100_000  # of a file whose aliases are written out


def read(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError when it cannot be read, or is none."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the run file: {error.strerror}", where=str(path), action="check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, text that is not UTF-8
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", where=str(path), action="mend the file") from error
    refuse_bomb(tree, str(path))
    if not isinstance(tree, dict):
        raise ConfigError("is not a mapping of keys", where=str(path), action="start from jobs/demo.yaml")
    return tree


def refuse_bomb(tree: Any, where: str) -> None:
    """Raises ConfigError for a few lines whose aliases stand for millions of values, or for themselves."""
    todo, num_values = [tree], 0
    while todo:
        node, num_values = todo.pop(), num_values + 1
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if num_values + len(todo) > MAX_VALUES:
            raise ConfigError(f"stands for more than {MAX_VALUES} values", where=where, action="write it without aliases")
