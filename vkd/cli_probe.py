"""`vkd probe`: a teacher for the user's own classes, fitted on labels that are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from vkd import cli_parts
from vkd.cli_parts import Json, Overrides, RunFile

if TYPE_CHECKING:
    from vkd.console import Screen
    from vkd.probing import ProbeReport
    from vkd.run import Run
    from vkd.steps import Probe as RunProbe


def probe(
    run: RunFile,
    out: Annotated[str, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    overrides: Overrides = None,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Answer each clip by a fit without its value of this column.")] = None,
    label: Annotated[str, typer.Option(metavar="COLUMN", help="The manifest column that holds the classes.")] = "label",
    as_json: Json = False,
) -> None:
    """Fit a linear probe on the first teacher's stored embeddings: a teacher whose logits are the classes of the manifest."""
    from vkd.run import load_one
    from vkd.steps import Probe as RunProbe

    with cli_parts.screen(as_json, run, overrides) as screen:
        loaded = load_one(run, overrides or [])
        cli_parts.finish(as_json, fitted(loaded, RunProbe(out=out, by=by, label=label), screen))


def fitted(run: Run, asked: RunProbe, screen: Screen) -> dict[str, Any]:
    """Fit a probe on stored labels and show it; what is told as JSON."""
    from vkd import probing

    screen.stage("probe")
    report = probing.fit(run, asked.out, asked.by, asked.label)
    screen.close()
    crossed = "- (give --by)" if report.accuracy is None else f"{report.accuracy:.3f}"
    rows = [
        ("clips", str(report.clips)),
        ("clips, a view each", str(report.rows)),
        ("classes", str(len(report.classes))),
        ("groups left out", str(report.groups)),
        ("out-of-fold accuracy", crossed),
    ]
    screen.table(f"probe on the embedding of {report.alias}", ("", asked.label), rows)
    line = _yaml(run, report)
    screen.line(f"next: in the run file, under recipe\n  {escape(line)}")
    return vars(report) | {"yaml": line}


def _yaml(run: Run, report: ProbeReport) -> str:
    """The teacher as a line of a run file."""
    import yaml

    teacher: dict[str, Any] = {"name": "probe", "path": report.path, "of": run.recipe.teachers[report.alias].model_dump(mode="json")}
    text = yaml.safe_dump(teacher, default_flow_style=True, sort_keys=False, width=float("inf"))
    return f"{report.alias}: {text.strip()}"
