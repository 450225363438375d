"""The command line: verbs -> functions, nothing else."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vkd import cli_jobs, cli_labels, cli_parts, cli_plan, cli_probe, cli_similarity, cli_steps
from vkd.cli_parts import Json, Overrides, RunFile
from vkd.cli_plan import MaxCost, MaxHours, PriceFile
from vkd.errors import ConfigError, StorageError, VkdError, redact


def _with_others(typed: typer.Typer) -> typer.Typer:
    typed.add_typer(cli_labels.app, name="labels")
    typed.add_typer(cli_jobs.app)
    typed.add_typer(cli_jobs.jobs, name="jobs")
    for verb in (cli_plan.plan, cli_probe.probe, *cli_similarity.VERBS):
        typed.command()(verb)
    return typed


app = _with_others(
    typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        help="Distil large frozen video models into small students, on Ray.\n\n"
        "Start with [bold]vkd run jobs/demo.yaml[/bold]. Or step by step: [bold]manifest[/bold] lists videos, [bold]label[/bold] lets the "
        "teacher speak once about every clip, [bold]distill[/bold] trains a student on that, [bold]evaluate[/bold] says what it kept. The "
        "same command after any crash goes on where it stopped.",
    )
)

INTERRUPTED = 130


@app.command()
def manifest(
    source: Annotated[str, typer.Argument(help="A folder or bucket prefix, a list file, CSV/JSON/Parquet, or package://NAME/folder.")],
    out: Annotated[str, typer.Argument(help="The manifest's folder; an existing one grows.")],
    probe: Annotated[str, typer.Option(help="none: listing only; header: duration, fps, size, codec; full: also decode.")] = "header",
    label_from: Annotated[str | None, typer.Option(help="folder, column:NAME or regex:PATTERN (group 1, in the file name).")] = None,
    uri_column: Annotated[str | None, typer.Option(help="The column of a table that holds the uri.")] = None,
    hash: Annotated[bool, typer.Option("--hash", help="Identify videos by content, and note duplicates.")] = False,
    chunk_size: Annotated[int, typer.Option(help="Clips per chunk: the unit of work, commit and resume.")] = 64,
    allow: Annotated[list[str] | None, typer.Option(help="A folder outside SOURCE whose files may be read; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """List SOURCE's videos, with ids, sizes and durations, as immutable shards."""
    from vkd.manifest import BuildOptions, build

    with cli_parts.screen(as_json) as screen:
        screen.stage("manifest")
        given = {"probe": probe, "label_from": label_from, "uri_column": uri_column, "hash": hash, "chunk_size": chunk_size}
        options = _options(BuildOptions, **given, allow=tuple(cli_parts.absolute(folder) for folder in allow or ()))
        report = build(cli_parts.absolute(source), cli_parts.absolute(out), options, screen.probed)
        screen.close()
        screen.line(f"{out}: {report}")
        screen.line(f"next: name it in a run file as data.manifest: {out}, then vkd label RUN")
        cli_parts.finish(as_json, {"manifest": out, "videos": report.videos, "new": report.new, "rejected": report.rejected})


@app.command()
def label(
    run: RunFile,
    overrides: Overrides = None,
    limit: Annotated[str, typer.Option(help="A seeded sample of whole chunks, such as 1%.")] = "100%",
    retry_rejects: Annotated[bool, typer.Option("--retry-rejects", help="Try again what was rejected and may pass now.")] = False,
    reason: Annotated[str | None, typer.Option(help="With --retry-rejects: all rejects of this reason, and no others.")] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Then put each complete shard's chunks into one file.")] = False,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
    prices: PriceFile = None,
    as_json: Json = False,
) -> None:
    """Let the teachers label every clip that the store lacks."""
    from vkd import pipeline
    from vkd.run import load_one
    from vkd.worklist import Retry

    with cli_parts.screen(as_json, run, overrides) as screen:
        if reason is not None and not retry_rejects:
            raise ConfigError("--reason says what --retry-rejects tries again", action="add --retry-rejects")
        fraction, loaded = cli_parts.fraction("--limit", limit), load_one(run, overrides or [])
        with cli_plan.limits(loaded, max_hours, max_cost, prices):
            report = pipeline.label(loaded, screen, fraction, Retry(reason) if retry_rejects else None)
        screen.close()
        screen.labels(report, loaded.labels.store)
        screen.statistics(report)
        for name, measured in report.fidelity.items():
            screen.line(f"  encoding of {name}: " + ", ".join(f"{k} {v:.6g}" for k, v in measured.items()))
        if compact:
            screen.line(f"compacted: {pipeline.compact(loaded)} files, one for each complete shard and view")
        given = cli_parts.words(run, overrides)
        rest = f"vkd label {given} for the rest, or vkd distill {given} labels.allow_partial=true"
        screen.line(f"next: {rest if fraction < 1 else f'vkd distill {given}'}")
        cli_parts.finish(as_json, cli_parts.label_json(report))


@app.command()
def distill(
    run: RunFile,
    overrides: Overrides = None,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
    prices: PriceFile = None,
    as_json: Json = False,
) -> None:
    """Train the student; teachers label meanwhile what the store lacks (labels.mode says whether, and what is kept)."""
    from vkd import pipeline
    from vkd.run import load_one

    with cli_parts.screen(as_json, run, overrides) as screen:
        loaded = load_one(run, overrides or [])
        with cli_plan.limits(loaded, max_hours, max_cost, prices):
            report = pipeline.distill(loaded, screen)
        screen.close()
        if report.labels is not None:
            screen.labels(report.labels, loaded.store)
        screen.student(report)
        screen.efficiency(report)
        if loaded.data.split.by != "none":
            screen.line(f"next: vkd evaluate {cli_parts.words(run, overrides)}")
        cli_parts.finish(as_json, cli_parts.train_json(report))


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

    with cli_parts.screen(as_json, run, overrides) as screen:
        measured = pipeline.evaluate(load_one(run, overrides or []), screen, student)
        screen.close()
        screen.retention(measured)
        cli_parts.finish(as_json, measured)


@app.command(name="run")
def run_command(
    run: RunFile,
    overrides: Overrides = None,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
    prices: PriceFile = None,
    as_json: Json = False,
) -> None:
    """Do all of a run, or of a workflow's runs in order: manifest, label, distill, evaluate."""
    from vkd import pipeline
    from vkd.run import load

    with cli_parts.screen(as_json, run, overrides) as screen:
        results: dict[str, Any] = {}
        for loaded in cli_steps.one_by_one(load(run, overrides or []), screen):
            with cli_plan.limits(loaded, max_hours, max_cost, prices):
                if (done := cli_steps.of_labels(loaded, screen)) is None:
                    labelled, trained, measured = pipeline.run_all(loaded, screen)
            if done is not None:
                results[loaded.name] = done
                continue
            screen.close()
            if labelled is not None:
                screen.labels(labelled, loaded.store)
            screen.student(trained)
            screen.efficiency(trained)
            if measured is not None:
                screen.retention(measured)
            screen.timings({})
            screen.line(f"results: {loaded.output}  (student/, {'evaluation.json, ' if measured else ''}run.yaml, tensorboard/)")
            told = labelled and cli_parts.label_json(labelled)
            results[loaded.name] = {"label": told, "distill": cli_parts.train_json(trained), "evaluate": measured}
        cli_parts.finish(as_json, results)


@app.command()
def status(store: Annotated[str, typer.Argument(help="A label store, or a run file.")], as_json: Json = False) -> None:
    """What a label store holds, from listings and file footers only: labelled, rejected, rate, time left."""
    from vkd.status import store_status

    with cli_parts.screen(as_json) as screen:
        place, header = cli_parts.store_of(store), ("set", "view", "labelled", "rejected", "of", "clips/s", "left")
        rows = store_status(place, time.time())
        screen.table(f"labels in {place}", header, [r.cells() for r in rows])
        cli_parts.finish(as_json, {"sets": [vars(row) for row in rows]})


@app.command()
def verify(
    run: RunFile,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(help="Clips to label again, live; 0 for none.")] = 8,
    rejects: Annotated[bool, typer.Option("--rejects", help="List every rejected video and clip with its reason.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="First delete what interrupted writes left, and superseded files.")] = False,
    as_json: Json = False,
) -> None:
    """Check a run's labels: each planned clip labelled or rejected, files whole, a sample labelled again agrees, training used them."""
    from vkd import verification
    from vkd.run import load_one

    with cli_parts.screen(as_json, run, overrides) as screen:
        loaded = load_one(run, overrides or [])
        if clean:
            screen.line(f"cleaned: {verification.clean(loaded)}")
        found = verification.verify(loaded, sample)
        screen.table(
            "label sets", ("set", "view", "planned", "labelled", "rejected", "missing", "damaged"), [r.cells() for r in found.sets]
        )
        for name, agreement in found.agreement.items():
            screen.line(f"labelled again, {name}: lowest cosine {agreement:.5f} of {sample} clips")
        for finding in found.unused:
            screen.line(f"teacher not used, {finding}")
        result = {"ok": found.ok, "sets": [vars(row) for row in found.sets], "agreement": found.agreement}
        result["teacher_use"] = [vars(row) for row in found.unused]
        if rejects:
            listed = verification.list_rejects(loaded)
            for row in listed:
                screen.line(f"rejected: {row}")
            result["rejects"] = [vars(row) for row in listed]
        cli_parts.finish(as_json, result)
        if not found.labels_ok:
            raise ConfigError("the labels are not whole, see above", where=loaded.labels.store, action=found.action)
        if found.unused:
            first = found.unused[0]
            raise ConfigError(
                f"the teacher is not used as it should be, see above: {first.where}", where=loaded.output, action=first.action
            )


@app.command()
def export(
    run: RunFile,
    out: Annotated[str, typer.Argument(help="The folder to write model.safetensors and config.json into.")],
    overrides: Overrides = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint after the round with the lowest loss, not the newest.")] = False,
    as_json: Json = False,
) -> None:
    """Write the student of the run's newest checkpoint to a folder, finished or not."""
    from vkd import training
    from vkd.run import load_one

    with cli_parts.screen(as_json, run, overrides) as screen:
        step = training.export_newest(load_one(run, overrides or []), cli_parts.absolute(out), best)
        screen.line(f"{out}: the student after step {step}; load_student or load_similarity of vkd.checkpoint loads it")
        cli_parts.finish(as_json, {"student": out, "step": step})


def main() -> None:
    """Entry point: every error becomes one clear line and its exit code."""
    cli_parts.take_one_interrupt()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin starve each other when cores are shared
    try:
        code = app(prog_name="vkd", standalone_mode=False)  # typer turns Ctrl-C into 130
    except typer._click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except typer._click.exceptions.ClickException as error:
        verb = error.ctx.command_path if isinstance(error, typer._click.exceptions.UsageError) and error.ctx else "vkd"
        _fail(f"{error.format_message()} -> see {verb} --help", 2)
    except VkdError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = StorageError("the disk is full", where=str(error.filename or ""), action="free space, then run the same command again")
        _fail(str(full), full.exit_code)
    if code == INTERRUPTED:
        _fail("interrupted; what is committed is kept -> run the same command again to go on", code)
    sys.exit(code)


def _fail(text: str, code: int) -> None:
    print(redact(f"vkd: {text}"), file=sys.stderr, flush=True)
    sys.exit(code)


def _options(kind: Callable[..., Any], **values: Any) -> Any:
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg']}", action="see vkd manifest --help") from error
