"""`vkd retrieval`: how well an index finds what is known to be right, and which share must be compared finely for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vkd import cli_parts
from vkd.cli_parts import Json
from vkd.errors import ConfigError

if TYPE_CHECKING:
    from vkd.search.curves import Report

BUDGETS = "0%,1%,5%,10%,30%,100%"


def retrieval(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A folder that vkd index made; the queries are among its videos.")],
    truth: Annotated[str, typer.Argument(metavar="TRUTH.json", help="The ground truth; videos by their ids, uris or file names.")],
    protocol: Annotated[
        str, typer.Option(help="relevant: for each query a list of videos; or that of a benchmark: fivr, cc_web_video, svd, evve.")
    ] = "relevant",
    budgets: Annotated[str, typer.Option(help="Shares of the videos that are compared finely.")] = BUDGETS,
    queries: Annotated[int, typer.Option(help="At most so many queries, drawn by their names; 0: all.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Mean average precision of an index against the share that is compared finely, in five orders.

    Each query is compared finely with all videos, in this process: on a large index ask for a few --queries first.
    """
    from vkd.search import curves
    from vkd.search import truth as truths
    from vkd.search.index import Index

    with cli_parts.screen(as_json) as screen:
        screen.stage("retrieval")
        shares = sorted({cli_parts.fraction("--budgets", text.strip(), zero=True) for text in budgets.split(",")})
        if not shares[-1] == 1:
            raise ConfigError("--budgets lacks 100%", action="add it: the other shares are told by what all fine scores give")
        asked = truths.read(cli_parts.absolute(truth), protocol)
        report = curves.measure(Index.open(cli_parts.absolute(index)), asked, shares, queries, screen.searched)
        screen.close()
        missing = f"; {report.missing} more are not in the index" if report.missing else ""
        screen.line(f"{report.queries} queries among {report.videos} videos{missing}")
        for metric in report.curves:
            screen.table(metric, ("order", *(f"{100 * share:.3g}%" for share in report.budgets)), _rows(report, metric))
            screen.line(_enough(report, metric))
        cli_parts.finish(as_json, report._asdict())


def _rows(report: Report, metric: str) -> list[tuple[str, ...]]:
    return [(order, *(f"{value:.4f}" for value in values)) for order, values in report.curves[metric].items()]


def _enough(report: Report, metric: str) -> str:
    """With the order of `vkd search` that gets there first."""
    from vkd.search.query import ORDERS

    order = min(ORDERS, key=lambda order: report.enough(metric, order))
    enough = report.enough(metric, order)
    return f"{metric}: 99% of what all fine scores give takes vkd search --order {order} --budget {100 * enough:.3g}%"
