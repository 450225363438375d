"""`vkd pairs`: which videos are compared with which, mined in features that are stored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vkd import cli_parts
from vkd.cli_parts import Json, Overrides, RunFile

if TYPE_CHECKING:
    from vkd.console import Screen
    from vkd.run import Run
    from vkd.steps import Pairs


def pairs(
    run: RunFile,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The manifest's folder; one that is there stays as it is.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Choose for each video those to compare it with, by the first teacher's stored features; pairs.num_random=50 and so on."""
    from vkd.run import load_one

    with cli_parts.screen(as_json, run, overrides) as screen:
        loaded = load_one(run, [*(overrides or []), f"pairs.out={json.dumps(out)}"])
        assert loaded.pairs is not None  # the override above made it
        cli_parts.finish(as_json, mined(loaded, loaded.pairs, screen))


def mined(run: Run, asked: Pairs, screen: Screen) -> dict[str, Any]:
    """Mine pairs in stored features and show what was found; what is told as JSON."""
    from vkd import pairs as mining

    screen.stage("pairs")
    report = mining.mine(run, asked)
    screen.close()
    rows = [("videos", str(report.videos)), ("videos left out", str(report.left_out)), ("anchors", str(report.anchors))]
    rows += [(f"candidates: {pool}", str(count)) for pool, count in report.candidates.items()]
    screen.table(f"pairs by {report.features}", ("", report.path), rows)
    return vars(report)
