"""`vkd plan`: what a run will take, before anything is spent; and the limits that stop one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vkd import cli_parts
from vkd.cli_parts import Json, Overrides, RunFile
from vkd.console import Screen
from vkd.errors import ConfigError

if TYPE_CHECKING:
    from vkd.forecast import GroupCost, Prices
    from vkd.preflight import PlanReport
    from vkd.run import Run

PRICES = "cluster/prices.yaml"
MaxHours = Annotated[float | None, typer.Option("--max-hours", min=0, help="Stop once all starts of this run took so many hours.")]
MaxCost = Annotated[float | None, typer.Option("--max-cost", min=0, help="Stop once the cluster cost so much; needs --prices.")]
PriceFile = Annotated[str | None, typer.Option("--prices", metavar="FILE", help=f"What nodes cost an hour, such as {PRICES}.")]


def plan(
    run: RunFile,
    overrides: Overrides = None,
    sample: Annotated[str, typer.Option(help="The share of clips to measure on.")] = "2%",
    prices: PriceFile = None,
    as_json: Json = False,
) -> None:
    """Check every part of a run, measure a sample of its clips, and tell time, bytes and money. Writes no labels."""
    from vkd import forecast, pipeline
    from vkd.run import load_one

    with cli_parts.screen(as_json, run, overrides) as screen:
        table = None if prices is None else read_prices(prices)
        loaded, share = load_one(run, overrides or []), cli_parts.fraction("--sample", sample)
        report = pipeline.plan(loaded, screen, share, before_s=cli_parts.seconds_of_this_process())
        screen.close()
        costs = [] if table is None else forecast.money(report.forecast, report.trial.nodes, table)
        _show(screen, report)
        if table is not None:
            _show_money(screen, report, costs, table)
        screen.line(f"next: vkd run {cli_parts.words(run, overrides)}")
        cli_parts.finish(as_json, _json(report, costs))


def _show(screen: Screen, report: PlanReport) -> None:
    for name, text in report.checks.items():
        screen.line(f"ok  {name:10s} {text}")
    told, work = report.forecast, report.forecast.work
    count = {told.student.name: work.to_train * work.epochs}
    rows = [
        (
            s.name,
            str(s.num_workers),
            f"{1e3 * s.busy_s:.0f}",
            f"{1e3 * s.cpu_s:.0f}",
            _time(s.busy_s * count.get(s.name, work.to_label) / s.num_workers),
        )
        for s in told.workers
    ]
    screen.table(f"measured on {report.trial.num_clips} clips", ("stage", "workers", "ms a clip", "CPU ms a clip", "alone"), rows)
    training = f", an epoch {_time(told.epoch_s)}; {work.epochs:g} epochs; without manifest and evaluation" if work.to_train else ""
    screen.line(f"time: {_time(told.total_s)} (start {_time(told.start_s)}, labels {_time(told.label_s)}{training})")
    if told.stages and (work.to_label or work.to_train):
        balanced = ", ".join(f"{number} x {name}" for name, number in told.balanced().items())
        screen.line(f"slowest: {told.bottleneck}; balanced to {told.stages[-1].name}: {balanced}")
    stored, network = f"{told.storage_bytes() / 1e6:.1f} MB in the store", f"{report.network_bytes / 1e6:.1f} MB read and written"
    screen.line(f"bytes: {work.label_bytes:.0f} of labels and {work.frame_bytes:.0f} of frames a clip; {stored}; {network}")


def _show_money(screen: Screen, report: PlanReport, costs: list[GroupCost], prices: Prices) -> None:
    rows = [(c.group, f"{c.nodes} x {c.instance}", f"{c.hours:.2f}", f"{c.cost:.2f}", f"{c.on_demand:.2f}", f"{c.spot:.2f}") for c in costs]
    screen.table(f"{prices.currency}", ("group", "nodes", "node-hours", "cost", "all on demand", "all spot"), rows)
    stored = report.forecast.storage_bytes() / 1e9 * prices.storage_per_gb_month
    network = report.network_bytes / 1e9 * prices.network_per_gb
    total = sum(cost.cost for cost in costs)
    screen.line(f"cost: {total:.2f} {prices.currency} of nodes, {network:.2f} of network, {stored:.2f} a month of storage")
    unknown = [name for name in report.trial.nodes if name not in prices.per_h]
    if unknown:
        screen.line(f"not counted: nodes of {', '.join(name or 'no group' for name in unknown)}, which the table of prices lacks")


def _json(report: PlanReport, costs: list[GroupCost]) -> dict[str, Any]:
    told = report.forecast
    seconds = {"start_s": told.start_s, "label_s": told.label_s, "epoch_s": told.epoch_s, "total_s": told.total_s}
    stages = [vars(stage) for stage in told.workers]
    sizes = {"storage_bytes": told.storage_bytes(), "network_bytes": report.network_bytes}
    money = [vars(cost) for cost in costs]
    known = {"checks": report.checks, "work": vars(told.work), "stages": stages, "num_clips_measured": report.trial.num_clips}
    return known | seconds | sizes | {"bottleneck": told.bottleneck, "balanced": told.balanced(), "cost": money}


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def read_prices(path: str) -> Prices:
    """The table of prices in a file. Raises ConfigError that says what it lacks."""
    import yaml

    from vkd.forecast import Prices

    try:
        with open(path) as file:
            return Prices.parse(yaml.safe_load(file))
    except OSError as error:
        raise ConfigError(f"cannot read the prices: {error.strerror}", where=path, action=f"start from {PRICES}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}", where=path, action="mend the file") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"is no table of prices: {error}", where=path, action=f"compare it with {PRICES}") from error


@contextmanager
def limits(run: Run, max_hours: float | None, max_cost: float | None, prices: str | None) -> Iterator[None]:
    """End the body once the run took as long, or cost as much, as it may."""
    from vkd import budget, cluster

    if max_cost is not None and prices is None:
        raise ConfigError("--max-cost needs to know what nodes cost", action=f"add --prices {PRICES}, with your own prices")
    allowed = budget.Budget(max_hours, max_cost, None if prices is None else read_prices(prices))
    with budget.limited(run.output, allowed, cluster.nodes_by_group):
        yield
