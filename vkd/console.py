"""What a person sees: progress while it runs, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vkd.errors import redact

if TYPE_CHECKING:  # commands that only list must not import torch
    from vkd.label_report import LabelReport
    from vkd.loop import RoundReport
    from vkd.training import TrainReport

FEW_CLIPS = 100
SILENCE_S = 10.0  # without a terminal, a line at most this often


class Screen:
    """A pipeline's watcher: a live bar on a terminal, now and then a line elsewhere. With `json` all goes to stderr."""

    def __init__(self, *, json: bool = False) -> None:
        self.console = Console(stderr=json, highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}
        self._stage, self._started_s = "", time.monotonic()
        self._printed_s: dict[str, float] = {}
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def stage(self, name: str) -> None:
        """A new stage begins; the one before it is over."""
        self.close()
        self._stage, self._started_s, self._printed_s = name, time.monotonic(), {}
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._tasks = {name: self._bar.add_task(f"{name}: starting", total=None)}
            self._bar.start()

    def close(self) -> None:
        """End the stage: no bar is left, its seconds are kept."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + time.monotonic() - self._started_s
            self._stage = ""

    def probed(self, done: int, total: int) -> None:
        self._show(f"manifest: probed {done} of {total} videos", done, total)

    def copied(self, done: int, total: int) -> None:
        self._show(f"copies: rendered those of {done} of {total} videos", done, total)

    def searched(self, done: int, total: int) -> None:
        self._show(f"retrieval: {done} of {total} queries", done, total)

    def labelled(self, report: LabelReport) -> None:
        rejected = "".join(f", {count} rejected ({kind})" for kind, count in report.rejected.most_common())
        speed = report.done / max(report.wall_s, 1e-9)
        done = report.present + report.done
        beside = f", beside {report.other_drivers} other drivers" if report.other_drivers else ""
        self._show(f"label: {done} of {report.planned} clips{rejected}, {speed:.1f}/s{beside}", done, report.planned)

    def trained(self, report: RoundReport) -> None:
        losses = "  ".join(f"{name} {value:.4f}" for name, value in report.losses.items())
        speed = f"{report.examples_per_s:.1f} clips/s  data-wait {report.wait_fraction:.1%}"
        lost = f"  {report.left_out} left out ({report.unreadable} unreadable)" if report.left_out else ""
        text = f"distill: epoch {report.epoch + 1}  step {report.step} of {report.num_steps}  {losses}  {speed}{lost}"
        self._show(text, report.step, report.num_steps)

    def _show(self, text: str, done: int, total: int) -> None:
        """What is done of a stage; one that runs beside the current one has a bar of its own."""
        name = text.partition(":")[0]
        if self._bar is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(text, total=total)
            self._bar.update(self._tasks[name], description=text, completed=done, total=total)
        elif done >= total or time.monotonic() - self._printed_s.setdefault(name, self._started_s) > SILENCE_S:
            self._printed_s[name] = time.monotonic()
            self.console.print(text)

    def line(self, text: str) -> None:
        """One line that stays."""
        self.console.print(redact(text))

    def labels(self, report: LabelReport, store: str) -> None:
        """What a labelling did."""
        before = f", {report.present} there before" if report.present else ""
        speed = f" in {report.wall_s:.1f} s" if report.done else ""
        others = f", {report.elsewhere} by other drivers" if report.elsewhere else ""
        reasons = ", ".join(f"{count} {kind}" for kind, count in report.rejected.most_common())
        rejected = f"{report.rejected.total()} rejected{f' ({reasons})' if reasons else ''}"
        self.line(f"labels: {report.labelled} labelled, {rejected} of {report.planned} clips{before}{others}{speed} -> {store}")

    def statistics(self, report: LabelReport) -> None:
        """What the new labels look like, a line each."""
        for name, told in report.statistics.items():
            entropy = f", entropy {told['entropy_nats']:.3g} nats" if "entropy_nats" in told else ""
            self.line(f"  {name}: norm {told['norm_mean']:.4g} ± {told['norm_std']:.2g}{entropy}, {told['duplicates']:.1%} duplicates")

    def student(self, report: TrainReport) -> None:
        """What a training did."""
        if report.skipped:
            self.line(f"student: finished before ({report.num_steps} steps) -> {report.student}")
            return
        since = f", resumed from step {report.resumed_from}" if report.resumed_from else ""
        self.line(f"student: {report.num_steps} steps over {report.num_examples} clips{since} -> {report.student}")

    def efficiency(self, report: TrainReport) -> None:
        """Where the time of a training went."""
        if report.efficiency is not None:
            self.line(report.efficiency.line())

    def retention(self, measured: Mapping[str, Any]) -> None:
        """What an evaluation found."""
        from vkd.evaluation import retention_rows

        few = ", so few that this is a smoke check and no result" if measured["num_clips"] < FEW_CLIPS else ""
        title = f"retention on {measured['num_clips']} held-out clips{few}"
        self.table(title, ("", "student", "teacher", "student / teacher"), retention_rows(measured))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table that stays; the first column is text, the others are numbers."""
        table = Table(title=redact(title), title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(redact, row))
        self.console.print(table)

    def timings(self, extra: Mapping[str, str]) -> None:
        """Seconds of each stage since the last time on one line."""
        self.close()
        stages = "  ".join(f"{name} {seconds:.1f} s{extra.get(name, '')}" for name, seconds in self.seconds.items())
        self.seconds = {}
        self.line(f"time: {stages}")
