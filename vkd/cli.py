"""The command line: verbs -> functions, nothing else."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from vkd.console import Screen
from vkd.errors import ConfigError, StorageError, VkdError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Distil large frozen video models into small students, on Ray.\n\n"
    "Start with [bold]vkd run jobs/demo.yaml[/bold]. Or step by step: [bold]manifest[/bold] lists videos, [bold]label[/bold] lets the "
    "teacher speak once about every clip, [bold]distill[/bold] trains a student on that, [bold]evaluate[/bold] says what it kept. The "
    "same command after any crash goes on where it stopped.",
)

RunFile = Annotated[str, typer.Argument(metavar="RUN", help="A run file, such as jobs/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.epochs=1.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last on stdout; all else goes to stderr.")]


@app.command()
def manifest(
    source: Annotated[str, typer.Argument(help="A folder or bucket prefix, a list file, CSV/JSON/Parquet, or package://NAME/folder.")],
    out: Annotated[str, typer.Argument(help="The manifest's folder; an existing one grows.")],
    probe: Annotated[str, typer.Option(help="none: listing only; header: duration, fps, size, codec; full: also decode.")] = "header",
    label_from: Annotated[str | None, typer.Option(help="folder, column:NAME or regex:PATTERN (group 1, in the file name).")] = None,
    uri_column: Annotated[str | None, typer.Option(help="The column of a table that holds the uri.")] = None,
    hash: Annotated[bool, typer.Option("--hash", help="Identify videos by content, and note duplicates.")] = False,
    chunk_size: Annotated[int, typer.Option(help="Clips per chunk: the unit of work, commit and resume.")] = 64,
    as_json: Json = False,
) -> None:
    """List SOURCE's videos, with ids, sizes and durations, as immutable shards."""
    from vkd.manifest import BuildOptions, build

    with _screen(as_json) as screen:
        screen.stage("manifest")
        options = _options(BuildOptions, probe=probe, label_from=label_from, uri_column=uri_column, hash=hash, chunk_size=chunk_size)
        report = build(_absolute(source), _absolute(out), options, screen.probed)
        screen.close()
        screen.line(f"{out}: {report}")
        _finish(as_json, {"manifest": out, "videos": report.videos, "new": report.new, "rejected": report.rejected})


@app.command()
def label(
    run: RunFile,
    overrides: Overrides = None,
    limit: Annotated[str, typer.Option(help="A seeded sample of whole chunks, such as 1%.")] = "100%",
    as_json: Json = False,
) -> None:
    """Let the teachers label every clip that the store lacks."""
    from vkd import pipeline
    from vkd.run import load_one

    with _screen(as_json) as screen:
        loaded = load_one(run, overrides or [])
        report = pipeline.label(loaded, screen, _fraction(limit))
        screen.close()
        screen.line(_label_line(report, loaded.labels.store))
        for name, measured in report.fidelity.items():
            screen.line(f"  encoding of {name}: " + ", ".join(f"{k} {v:.6g}" for k, v in measured.items()))
        screen.line(f"next: vkd distill {run}")
        _finish(as_json, _label_json(report))


@app.command()
def distill(run: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train the student on the labels of the store."""
    from vkd import pipeline
    from vkd.run import load_one

    with _screen(as_json) as screen:
        report = pipeline.distill(load_one(run, overrides or []), screen)
        screen.close()
        screen.line(_train_line(report))
        screen.line(f"next: vkd evaluate {run}")
        _finish(as_json, vars(report))


@app.command()
def evaluate(
    run: RunFile,
    overrides: Overrides = None,
    student: Annotated[str | None, typer.Option(help="Another exported student's folder.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the student with its teacher on held-out clips."""
    from vkd import pipeline
    from vkd.run import load_one

    with _screen(as_json) as screen:
        measured = pipeline.evaluate(load_one(run, overrides or []), screen, student)
        screen.close()
        _show_evaluation(screen, measured)
        _finish(as_json, measured)


@app.command(name="run")
def run_command(run: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Do all of a run, or of a workflow's runs in order: manifest, label, distill, evaluate."""
    from vkd import pipeline
    from vkd.run import load

    with _screen(as_json) as screen:
        results: dict[str, Any] = {}
        for loaded in load(run, overrides or []):
            labelled, trained, measured = pipeline.run_all(loaded, screen)
            screen.close()
            screen.line(_label_line(labelled, loaded.labels.store))
            screen.line(_train_line(trained))
            _show_evaluation(screen, measured)
            screen.timings({})
            screen.line(f"results: {loaded.output}  (student/, evaluation.json, run.yaml, tensorboard/)")
            results[loaded.name] = {"label": _label_json(labelled), "distill": vars(trained), "evaluate": measured}
        _finish(as_json, results)


@app.command()
def status(store: Annotated[str, typer.Argument(help="A label store, or a run file.")], as_json: Json = False) -> None:
    """What a label store holds, from listings and file footers only: labelled, rejected, rate, time left."""
    from vkd.status import store_status

    with _screen(as_json) as screen:
        rows = store_status(_store_of(store), time.time())
        screen.table(
            f"labels in {_store_of(store)}", ("set", "view", "labelled", "rejected", "of", "clips/s", "left"), [r.cells() for r in rows]
        )
        _finish(as_json, {"sets": [vars(row) for row in rows]})


@app.command()
def verify(
    run: RunFile,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(help="Clips to label again, live; 0 for none.")] = 8,
    rejects: Annotated[bool, typer.Option("--rejects", help="List every rejected clip with its reason.")] = False,
    as_json: Json = False,
) -> None:
    """Check a run's labels: each planned clip labelled or rejected, every file whole, a sample labelled again agrees."""
    from vkd import verification
    from vkd.run import load_one

    with _screen(as_json) as screen:
        loaded = load_one(run, overrides or [])
        found = verification.verify(loaded, sample)
        screen.table(
            "label sets", ("set", "view", "planned", "labelled", "rejected", "missing", "damaged"), [r.cells() for r in found.sets]
        )
        for name, agreement in found.agreement.items():
            screen.line(f"labelled again, {name}: lowest cosine {agreement:.5f} of {sample} clips")
        if rejects:
            screen.table("rejects", ("clip", "stage", "reason", "message"), [r.cells() for r in verification.list_rejects(loaded)])
        _finish(as_json, {"ok": found.ok, "sets": [vars(row) for row in found.sets], "agreement": found.agreement})
        if not found.ok:
            raise ConfigError("the labels are not whole, see above", where=loaded.labels.store, action=f"vkd label {run}")


@app.command()
def export(
    run: RunFile,
    out: Annotated[str, typer.Argument(help="The folder to write model.safetensors and config.json into.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write the student of the run's newest checkpoint to a folder, finished or not."""
    from vkd import training
    from vkd.run import load_one

    with _screen(as_json) as screen:
        step = training.export_newest(load_one(run, overrides or []), _absolute(out))
        screen.line(f"{out}: the student after step {step}; load it with vkd.checkpoint.load_student({out!r})")
        _finish(as_json, {"student": out, "step": step})


def main() -> None:
    """Entry point: every error becomes one clear line and its exit code."""
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer._click.exceptions.ClickException as error:
        error.show()
        sys.exit(2)
    except VkdError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what is committed is kept -> run the same command again to go on", 130)
    except OSError as error:
        if error.errno != 28:
            raise
        _fail(
            str(StorageError("the disk is full", where=str(error.filename or ""), action="free space, then run the same command again")), 3
        )


def _fail(text: str, code: int) -> None:
    print(f"vkd: {text}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def _screen(as_json: bool) -> Iterator[Screen]:
    screen = Screen(json=as_json)
    try:
        yield screen
    finally:
        screen.close()


def _finish(as_json: bool, result: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(result), flush=True)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _options(kind: Callable[..., Any], **values: Any) -> Any:
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg']}", action="see vkd manifest --help") from error


def _fraction(text: str) -> float:
    try:
        fraction = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        raise ConfigError(f"--limit {text!r} is no share", action="write 1% or 0.01")
    return fraction


def _store_of(text: str) -> str:
    if text.endswith((".yaml", ".yml")):
        from vkd.run import load_one

        return load_one(text).labels.store
    return _absolute(text)


def _label_line(report: Any, store: str) -> str:
    rejected = report.rejected.total()
    before = f", {report.present} there before" if report.present else ""
    speed = f" in {report.wall_s:.1f} s" if report.done else ""
    return f"labels: {report.labelled} labelled, {rejected} rejected of {report.planned} clips{before}{speed} -> {store}"


def _label_json(report: Any) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(report).items()}


def _train_line(report: Any) -> str:
    if report.skipped:
        return f"student: finished before ({report.num_steps} steps) -> {report.student}"
    since = f", resumed from step {report.resumed_from}" if report.resumed_from else ""
    return f"student: {report.num_steps} steps over {report.num_examples} clips{since} -> {report.student}"


def _show_evaluation(screen: Screen, measured: dict[str, Any]) -> None:
    from vkd.evaluation import retention_rows

    title = f"retention on {measured['num_clips']} held-out clips"
    screen.table(title, ("", "student", "teacher", "student / teacher"), retention_rows(measured))
