"""`vkd whiten`: a whitening of region features, fitted on labels that are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vkd import cli_parts
from vkd.cli_parts import Json, Overrides, RunFile

if TYPE_CHECKING:
    from vkd.console import Screen
    from vkd.run import Run
    from vkd.steps import Whitening as RunWhitening


def whiten(
    run: RunFile,
    out: Annotated[str, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    overrides: Overrides = None,
    dims: Annotated[int, typer.Option(min=1, help="Directions of most variance that are kept.")] = 128,
    as_json: Json = False,
) -> None:
    """Fit a PCA whitening on the first teacher's stored region features: the teacher regions then gives whitened ones."""
    from vkd.run import load_one
    from vkd.steps import Whitening as RunWhitening

    with cli_parts.screen(as_json, run, overrides) as screen:
        cli_parts.finish(as_json, fitted(load_one(run, overrides or []), RunWhitening(out=out, dims=dims), screen))


def fitted(run: Run, asked: RunWhitening, screen: Screen) -> dict[str, Any]:
    """Fit a whitening on stored labels and show it; what is told as JSON."""
    from vkd import whitening_fit

    screen.stage("whitening")
    report = whitening_fit.fit(run, asked.out, asked.dims)
    screen.close()
    rows = [
        ("clips", str(report.clips)),
        ("vectors", str(report.vectors)),
        ("values", str(report.num_channels)),
        ("dims", str(report.dims)),
        ("variance kept", f"{report.variance:.3f}"),
    ]
    screen.table(f"whitening of the regions of {report.alias}", ("", "fitted"), rows)
    screen.line(f"next: in a run file, under recipe.{report.alias}\n  {escape(f'whitening: {report.path}')}")
    return vars(report)
