"""`vkd index` and `vkd search`: what is stored of a corpus, and which of its videos show what a query shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

from vkd import cli_parts
from vkd.cli_parts import Json, Overrides, RunFile
from vkd.errors import ConfigError

if TYPE_CHECKING:
    from vkd.console import Screen
    from vkd.run import Run
    from vkd.search.calibration import Thresholds
    from vkd.search.query import Hit, Order
    from vkd.steps import Index

T = TypeVar("T")
app = typer.Typer()
Folder = Annotated[str, typer.Option(metavar="DIR", help="The student/ folder of the run that trained it.")]


@app.command()
def index(
    run: RunFile,
    out: Annotated[str, typer.Argument(help="The index's folder; the same command again adds what the corpus has more.")],
    coarse: Folder,
    fine: Folder,
    selector: Folder,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Index all videos whose regions a run's first teacher has labelled."""
    from vkd.run import load_one
    from vkd.steps import Index

    with cli_parts.screen(as_json, run, overrides) as screen:
        asked = Index(out=out, coarse=coarse, fine=fine, selector=selector)
        cli_parts.finish(as_json, built(load_one(run, overrides or []), asked, screen))


def built(run: Run, asked: Index, screen: Screen) -> dict[str, Any]:
    """Index what is stored of a run's videos and show what was made; what is told as JSON."""
    from vkd.region_store import RegionStore
    from vkd.search import index as indexing
    from vkd.search import videos
    from vkd.search.networks import Networks

    screen.stage("index")
    networks = Networks.load({"coarse": asked.coarse, "fine": asked.fine, "selector": asked.selector})
    listed, label_set, features = videos.of_run(run)
    made = indexing.build(listed, RegionStore(label_set.uri).read, networks, features, asked.out, partial(_spread, run))
    screen.close()
    screen.line(f"{asked.out}: {len(made)} videos in {len(made.shards)} shards; {_match(made.thresholds)}")
    if cut_short := made.cut_short:
        told = f"of {cut_short} videos only the beginning is indexed: what their features leave out is never found"
        screen.line(f"{told} (a larger max_frames of the teacher, then vkd label RUN)")
    screen.line(f"next: vkd search {escape(asked.out)} QUERY.mp4")
    return {
        "index": asked.out,
        "videos": len(made),
        "shards": len(made.shards),
        "cut_short": cut_short,
        "thresholds": vars(made.thresholds),
    }


def _spread(run: Run, function: Callable[[T], None], parts: Sequence[T]) -> list[None]:
    """Few parts are made here, many by the run's Ray cluster."""
    from vkd import cluster

    with cluster.session(run.compute) if len(parts) >= cluster.MANY_CHUNKS else nullcontext(), cluster.worker_errors():
        return cluster.map_chunks(function, parts)


@app.command()
def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A folder that vkd index made.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A video.")],
    budget: Annotated[str, typer.Option(help="The share of the index that is compared frame by frame.")] = "5%",
    order: Annotated[str, typer.Option(help="Of which: selector, or coarse, those most alike; see vkd retrieval.")] = "selector",
    top: Annotated[int, typer.Option(help="How many videos are shown.", min=1)] = 20,
    actors: Annotated[int, typer.Option(help="So many actors of the Ray cluster hold the index between them; 0: this process.", min=0)] = 0,
    match_from: Annotated[float | None, typer.Option(help="The fine score of a match; the index's own unless told.", min=0, max=1)] = None,
    page: Annotated[str | None, typer.Option(metavar="OUT.html", help="Write a page with the matching segments.")] = None,
    as_json: Json = False,
) -> None:
    """Find the videos of an index that show what a video shows, and where."""
    with cli_parts.screen(as_json) as screen:
        screen.stage("search")
        uri = cli_parts.absolute(query)
        how = cli_parts.fraction("--budget", budget, zero=True), top, _order(order)
        num_videos, only_first_s, hits = _found(cli_parts.absolute(index), uri, how, actors, match_from)
        screen.close()
        title = f"{num_videos} videos, {int(how[0] * num_videos)} compared finely to rank them"
        screen.table(title, ("", "score", "", "query", "found", "video"), _rows(hits))
        if only_first_s is not None:
            screen.line(f"the query goes on: only its first {only_first_s:.1f} s were searched for, as the index sees no more of a video")
        if not any(hit.matches for hit in hits):
            screen.line("no match: these are only the most similar videos")
        if page is not None:
            _write(page, uri, hits)
            screen.line(f"page: {escape(page)}")
        told = {"videos": num_videos, "only_first_s": only_first_s, "hits": [_told(hit) for hit in hits], "page": page}
        cli_parts.finish(as_json, told)


def _order(text: str) -> Order:
    """Raises ConfigError for an unknown one."""
    from vkd.search.query import ORDERS

    found: Order | None = next((order for order in ORDERS if order == text), None)
    if found is None:
        raise ConfigError(f"--order {text!r} is no order", action=f"choose {' or '.join(ORDERS)}")
    return found


def _found(
    index: str, query: str, how: tuple[float, int, Order], num_actors: int, match_from: float | None
) -> tuple[int, float | None, list[Hit]]:
    """How many videos were searched, for how much of a query that goes on, and the best of them."""
    from vkd.search import query as searching
    from vkd.search import videos
    from vkd.search.index import Index
    from vkd.video.access import Access

    if not num_actors:
        opened = Index.open(index, match_from=match_from)
        seen = videos.query_of(query, opened.features, Access())
        return len(opened), seen.only_first_s(opened.features.fps), searching.search(opened, seen.regions, *how)
    from vkd import cluster
    from vkd.compute import Compute
    from vkd.search.sharded import ShardedIndex

    with cluster.session(Compute()), cluster.worker_errors():
        spread = ShardedIndex(index, num_actors, match_from)
        seen = videos.query_of(query, spread.features, Access())
        hits = spread.search(seen.regions, *how)
        return len(spread), seen.only_first_s(spread.features.fps), hits


def _match(found: Thresholds) -> str:
    if found.match is None:
        return "nothing matches: too few of its videos are known to differ, or their fine scores are all one (vkd search --match-from)"
    shares = [
        f"{share:.1%} of {which}"
        for share, which in ((found.recall, "the pairs known to show the same"), (found.by_chance, "other pairs drawn at random"))
        if share is not None
    ]
    return f"a match scores at least {found.match:.3f}" + (f", as do {' and '.join(shares)}" if shares else "")


def _write(place: str, uri: str, hits: list[Hit]) -> None:
    from vkd.search import page as pages
    from vkd.store import files
    from vkd.video.access import Access

    files.put(cli_parts.absolute(place), pages.page(uri, hits, pages.thumbnails(uri, hits, Access())).encode())


def _rows(hits: list[Hit]) -> list[tuple[str, ...]]:
    rows = list[tuple[str, ...]]()
    for hit in hits:
        s = hit.segment
        spans = ("-", "-") if s is None else (f"{s.query_start_s:.1f}-{s.query_end_s:.1f} s", f"{s.start_s:.1f}-{s.end_s:.1f} s")
        rows.append(("match" if hit.matches else "no match", f"{hit.score:.3f}", "fine" if hit.is_fine else "coarse", *spans, hit.uri))
    return rows


def _told(hit: Hit) -> dict[str, Any]:
    return hit._asdict() | {"segment": hit.segment and hit.segment._asdict()}
