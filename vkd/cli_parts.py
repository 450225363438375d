"""What the commands share: their arguments, the screen, the user's own words, one JSON object."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from vkd.console import Screen
from vkd.errors import VkdError, redact

RunFile = Annotated[str, typer.Argument(metavar="RUN", help="A run file, such as jobs/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.epochs=1.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on stdout; all else goes to stderr.")]


@contextmanager
def screen(as_json: bool, run: str | None = None, overrides: Sequence[str] | None = None) -> Iterator[Screen]:
    """A screen that ends with the command; where an error's action says RUN, the user's own words take its place."""
    shown = Screen(json=as_json)
    try:
        yield shown
    except VkdError as error:
        if run is not None:
            error.action = re.sub(r"\bRUN\b", lambda _: words(run, overrides), error.action)
        raise
    finally:
        shown.close()


def words(run: str, overrides: Sequence[str] | None) -> str:
    """The run as the user named it, to be pasted."""
    return redact(shlex.join([run, *(overrides or [])]))


def finish(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        print(redact(json.dumps(result)), flush=True)


def absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def store_of(text: str) -> str:
    if text.endswith((".yaml", ".yml")):
        from vkd.run import load_one

        return load_one(text).store
    return absolute(text)
