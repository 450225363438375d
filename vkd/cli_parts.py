"""What the commands share: their arguments, the screen, the user's own words, one JSON object."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vkd.console import Screen
from vkd.errors import ConfigError, VkdError, redact

if TYPE_CHECKING:
    from vkd.label_report import LabelReport
    from vkd.training import TrainReport

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


def fraction(option: str, text: str, zero: bool = False) -> float:
    """A share such as 1% or 0.01, of nothing only with `zero`. Raises ConfigError that names the option."""
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1 or (found == 0 and not zero):
        raise ConfigError(f"{option} {text!r} is no share", action="write 1% or 0.01")
    return found


def train_json(report: TrainReport) -> dict[str, Any]:
    """A training as JSON."""
    told = {"labels": report.labels and label_json(report.labels), "efficiency": report.efficiency and report.efficiency.figures()}
    return vars(report) | told


def label_json(report: LabelReport) -> dict[str, Any]:
    """A labelling as JSON."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(report).items()}


def seconds_of_this_process() -> float:
    """How long this process is there, imports included (Linux)."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        started_ticks = float(stat.read().rpartition(")")[2].split()[19])
        return float(uptime.read().split()[0]) - started_ticks / os.sysconf("SC_CLK_TCK")


def take_one_interrupt() -> None:
    """A second SIGINT within a second of the first is dropped: one that comes while the first is raised leaves locks in disorder."""
    last_s = [float("-inf")]

    def interrupt(signum: int, frame: object) -> None:
        if time.monotonic() - last_s[0] > 1.0:
            last_s[0] = time.monotonic()
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
