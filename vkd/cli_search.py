"""`vkd index` and `vkd search`: what is stored of a corpus, and which of its videos show what a query shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vkd import cli_parts
from vkd.cli_parts import Json, Overrides, RunFile

if TYPE_CHECKING:
    from vkd.search.query import Hit

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
    from vkd.region_store import RegionStore
    from vkd.run import load_one
    from vkd.search import index as indexing
    from vkd.search import videos
    from vkd.search.networks import Networks

    with cli_parts.screen(as_json, run, overrides) as screen:
        screen.stage("index")
        networks = Networks.load({"coarse": coarse, "fine": fine, "selector": selector})
        listed, label_set, features = videos.of_run(load_one(run, overrides or []))
        built = indexing.build(listed, RegionStore(label_set.uri).read, networks, features, cli_parts.absolute(out))
        screen.close()
        screen.line(f"{out}: {len(built)} videos in {len(built.shards)} shards; a match scores at least {built.thresholds.match:.3f}")
        screen.line(f"next: vkd search {escape(out)} QUERY.mp4")
        cli_parts.finish(as_json, {"index": out, "videos": len(built), "shards": len(built.shards), "thresholds": vars(built.thresholds)})


@app.command()
def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A folder that vkd index made.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="A video.")],
    budget: Annotated[str, typer.Option(help="The share of the index that is compared frame by frame.")] = "5%",
    top: Annotated[int, typer.Option(help="How many videos are shown.", min=1)] = 20,
    page: Annotated[str | None, typer.Option(metavar="OUT.html", help="Write a page with the matching segments.")] = None,
    as_json: Json = False,
) -> None:
    """Find the videos of an index that show what a video shows, and where."""
    from vkd.search import query as searching
    from vkd.search import videos
    from vkd.search.index import Index
    from vkd.video.access import Access

    with cli_parts.screen(as_json) as screen:
        screen.stage("search")
        share, opened = cli_parts.fraction("--budget", budget), Index.open(cli_parts.absolute(index))
        uri = cli_parts.absolute(query)
        hits = searching.search(opened, videos.regions_of(uri, opened.features.teacher, Access()), share, top)
        screen.close()
        screen.table(f"{len(opened)} videos, {budget} compared finely", ("", "score", "", "query", "found", "video"), _rows(hits))
        if not any(hit.matches for hit in hits):
            screen.line("no match: these are only the most similar videos")
        if page is not None:
            _write(page, uri, hits)
            screen.line(f"page: {escape(page)}")
        cli_parts.finish(as_json, {"videos": len(opened), "hits": [_told(hit) for hit in hits], "page": page})


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
