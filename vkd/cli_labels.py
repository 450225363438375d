"""The verbs `vkd labels ...`: what a store holds, and how it is given up."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from vkd.cli_parts import Json, Overrides, RunFile, absolute, finish, screen, store_of
from vkd.errors import ConfigError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="List a store's label sets, remove one, take a video down.")

Store = Annotated[str, typer.Argument(metavar="STORE", help="A label store, or a run file.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command()
def ls(store: Store, as_json: Json = False) -> None:
    """The label sets of a store: what they are, how large, how old."""
    from vkd.store.housekeeping import inventory

    with screen(as_json) as shown:
        place = store_of(store)
        kept = inventory(place)
        rows = [(k.name, str(k.views), str(k.chunks), f"{k.num_bytes / 2**20:,.1f}", _day(k.newest_s)) for k in kept]
        shown.table(f"label sets in {place}", ("set", "views", "chunks", "MiB", "newest commit"), rows)
        for each in kept:
            shown.line(f"{each.name}: {each.what}")
        finish(as_json, {"sets": [vars(each) for each in kept]})


@app.command()
def rm(
    store: Store, label_set: Annotated[str, typer.Argument(metavar="SET", help="The set's name.")], yes: Yes = False, as_json: Json = False
) -> None:
    """Delete a label set, frames and all."""
    from vkd.store.housekeeping import find, remove

    with screen(as_json) as shown:
        found = find(absolute(store_of(store)), label_set)
        _ask(f"delete {found.uri}?", yes)
        remove(found)
        shown.line(f"deleted: {found.uri}")
        finish(as_json, {"deleted": found.uri})


@app.command()
def forget(
    run: RunFile,
    video: Annotated[str, typer.Argument(metavar="VIDEO_ID", help="A video_id of the manifest, or a uri.")],
    overrides: Overrides = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Take a video down: no label or frame of it is left in any set of the store, and it is never labelled there again.

    Let other commands on the store end first. A bucket that keeps old versions of objects keeps these too.
    """
    from vkd import takedown
    from vkd.run import load_one

    with screen(as_json, run, overrides) as shown:
        loaded = load_one(run, overrides or [])
        video_ids = takedown.videos_of(loaded, video)
        _ask(f"delete the labels and frames of {', '.join(video_ids)} in {loaded.labels.store}?", yes)
        done = takedown.forget(loaded, video_ids)
        shown.line(
            f"forgotten: {', '.join(done.videos)}; {done.chunks} chunks of {done.sets} label sets held clips, {done.rewritten} written anew"
        )
        for copy in done.copies:
            shown.line(f"shows the same, not forgotten: {copy}")
        shown.line("not touched: an index that has them, until vkd index RUN makes it anew")
        shown.line("manifests of pairs that name them train no more: vkd pairs RUN into another folder")
        finish(as_json, vars(done))


def _ask(question: str, yes: bool) -> None:
    """Raises ConfigError unless the user says yes."""
    if not yes and not (sys.stdin.isatty() and typer.confirm(question, err=True)):
        raise ConfigError("nothing was deleted", where=question, action="answer y, or give --yes")


def _day(time_s: float | None) -> str:
    return "-" if time_s is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))
