"""`vkd adopt`: published weights of a similarity network become an export."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from vkd import cli_parts
from vkd.cli_parts import Json, Overrides, RunFile


def adopt(
    run: RunFile,
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS", help="A checkpoint of mever-team/distill-and-select or MKLab-ITI/visil.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The export's folder.")],
    network: Annotated[
        str, typer.Option(help="fine_attention, fine_binary, coarse or selector (DnS), visil or visil_symmetric (a teacher).")
    ],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Use published weights with the region features of a run's first teacher: in vkd index, or as the path of pair_scores."""
    from vkd import published
    from vkd.run import load_one

    with cli_parts.screen(as_json, run, overrides) as screen:
        told = published.adopt(load_one(run, overrides or []), cli_parts.absolute(weights), network, cli_parts.absolute(out))
        screen.line(f"{escape(out)}: {network}, {told['parameters']:,} parameters, for features {told['features']}")
        screen.line("they are right only for the features of their authors: the same backbone, its weights, whitening and frames a second")
        cli_parts.finish(as_json, told)
