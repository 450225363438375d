"""What `vkd run` does with a run's labels when its run file asks for something else than a student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkd import cli_pairs, cli_parts, cli_probe, cli_whiten

if TYPE_CHECKING:
    from vkd.console import Screen
    from vkd.run import Run


def of_labels(run: Run, screen: Screen) -> dict[str, Any] | None:
    """Label, then do what the run file asks for with the labels; what is told as JSON, None when it asks for a student."""
    if run.probe is None and run.whitening is None and run.pairs is None:
        return None
    from vkd import pipeline

    labelled = pipeline.label(run, screen)
    screen.close()
    screen.labels(labelled, run.store)
    told: dict[str, Any] = {"label": cli_parts.label_json(labelled)}
    if run.probe is not None:
        told["probe"] = cli_probe.fitted(run, run.probe, screen)
    if run.whitening is not None:
        told["whitening"] = cli_whiten.fitted(run, run.whitening, screen)
    if run.pairs is not None:
        told["pairs"] = cli_pairs.mined(run, run.pairs, screen)
    return told
