"""What `vkd run` does with several runs, and with a run's labels when its run file asks for something else than a student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vkd import cli_pairs, cli_parts, cli_probe, cli_search, cli_whiten

if TYPE_CHECKING:
    from vkd.console import Screen
    from vkd.run import Run

STEPS: dict[str, Any] = {"probe": cli_probe.fitted, "whitening": cli_whiten.fitted, "pairs": cli_pairs.mined, "index": cli_search.built}


def one_by_one(runs: Sequence[Run], screen: Screen) -> Iterator[Run]:
    """Each run; which one it is of several is told before it begins."""
    for number, run in enumerate(runs, start=1):
        if len(runs) > 1:
            screen.line(f"run {number} of {len(runs)}: {run.name}")
        yield run


def of_labels(run: Run, screen: Screen) -> dict[str, Any] | None:
    """Label, then do what the run file asks for with the labels; what is told as JSON, None when it asks for a student."""
    asked = {name: section for name in STEPS if (section := getattr(run, name)) is not None}
    if not asked and run.recipe.trains:
        return None
    from vkd import pipeline

    labelled = pipeline.label(run, screen)
    screen.close()
    screen.labels(labelled, run.store)
    told: dict[str, Any] = {"label": cli_parts.label_json(labelled)}
    told |= {name: STEPS[name](run, section, screen) for name, section in asked.items()}
    screen.timings({})
    return told
