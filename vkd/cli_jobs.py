"""`vkd submit` and the verbs `vkd jobs ...`: the same commands on a cluster."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from vkd.cli_parts import Json, RunFile, finish, screen, words
from vkd.console import Screen
from vkd.errors import VkdError, redact

if TYPE_CHECKING:
    from vkd.jobs import Job
    from vkd.submit import Cluster

INTERRUPTED = 130

app = typer.Typer()
jobs = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="List the jobs of a cluster, show what one prints, stop one.")

Address = Annotated[str | None, typer.Option(help="The cluster's job server; else RAY_ADDRESS, else http://127.0.0.1:8265.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, as vkd jobs ls shows it.")]


class JobEnded(VkdError):
    """What was waited for has not succeeded; the exit code is the job's."""

    def __init__(self, exit_code: int, what: str, *, where: str = "", action: str = "") -> None:
        super().__init__(what, where=where, action=action)
        self.exit_code = exit_code


@app.command()
def submit(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="run, label, distill, evaluate, plan or verify.")],
    run: RunFile,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides; after -- options of VERB.")] = None,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow: print the job's id and end.")] = False,
    max_restarts: Annotated[int | None, typer.Option(min=0, help="In a row, of a driver that dies; else 10.")] = None,
    runtime_env: Annotated[str | None, typer.Option(help="What Ray gives the job; else jobs/runtime_env.yaml.")] = None,
    as_json: Json = False,
) -> None:
    """Do VERB on a cluster: upload the current directory, follow what the job prints, return its exit code.

    Ctrl-C only stops following. Submitting again follows the job that runs, or goes on where one has ended.
    """
    from vkd import submission

    with screen(as_json, run, overrides) as shown:
        given = replace(submission.prepare(verb, run, overrides or [], runtime_env), max_restarts=max_restarts)
        for note in given.notes:
            shown.line(note)
        from vkd.submit import Cluster, package  # imports Ray, which takes a second

        num_bytes = package(given)
        cluster = Cluster(address)
        job = cluster.same(given)
        if job is not None:
            shown.line(f"job {job.id} does this already, {job.status.lower()} for {_seconds(job)}")
        else:
            shown.line(f"uploading the current directory, {_size(num_bytes)}, to {cluster.url}")
            job = cluster.submit(given)
            shown.line(f"job {job.id}: vkd {verb} {words(run, overrides)}")
        if detach:
            shown.line(f"next: {_command('logs', job.id, address)} --follow, or {_command('stop', job.id, address)}")
            finish(as_json, {"job": job.id, "status": job.status, "exit_code": None})
            return
        _follow(shown, cluster, job.id, address, as_json)


@jobs.command()
def ls(address: Address = None, as_json: Json = False) -> None:
    """The jobs that vkd submit started, newest last."""
    from vkd.submit import Cluster

    with screen(as_json) as shown:
        cluster = Cluster(address)
        found = cluster.jobs()
        header = ("job", "verb", "status", "exit code", "started", "took")
        shown.table(f"jobs on {cluster.url}", header, [_cells(job) for job in found])
        for job in found:
            shown.line(f"{job.id}: {', '.join(job.outputs)}")
        finish(as_json, {"jobs": [vars(job) for job in found]})


@jobs.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends, and return its exit code.")] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """What a job has printed."""
    from vkd.submit import Cluster

    with screen(as_json) as shown:
        cluster = Cluster(address)
        if follow:
            _follow(shown, cluster, job_id, address, as_json)
            return
        for line in cluster.logs(job_id).splitlines():
            _write(shown, line)
        finish(as_json, _told(cluster.job(job_id)))


@jobs.command()
def stop(job_id: JobId, address: Address = None, as_json: Json = False) -> None:
    """End a job as Ctrl-C ends a command: what is committed is kept."""
    from vkd.submit import Cluster

    with screen(as_json) as shown:
        cluster = Cluster(address)
        before, job = cluster.job(job_id), cluster.stop(job_id)
        if not job.ended:
            raise VkdError("has not ended yet", where=job_id, action="vkd jobs ls shows whether it has; then try again")
        if before.ended:
            shown.line(f"job {job_id} had ended before: {_how(job)}")
        else:
            shown.line(f"job {job_id} stopped; what is committed is kept")
            shown.line("next: the same vkd submit goes on where it stopped")
        finish(as_json, _told(job))


def _follow(shown: Screen, cluster: Cluster, job_id: str, address: str | None, as_json: bool) -> None:
    """Show a job's lines until it ends. Raises JobEnded unless it succeeds."""
    try:
        job = cluster.follow(job_id, lambda line: _write(shown, line))
    except KeyboardInterrupt as stop:
        action = f"{_command('logs', job_id, address)} --follow to follow again, {_command('stop', job_id, address)} to stop it"
        raise JobEnded(INTERRUPTED, f"no longer following; job {job_id} goes on", action=action) from stop
    finish(as_json, _told(job))
    again = "the same vkd submit goes on where it stopped"
    if job.status == "STOPPED":
        raise JobEnded(job.code, f"job {job_id} was stopped; what is committed is kept", action=again)
    if job.code:
        why = f": {job.message.strip().splitlines()[0]}" if job.exit_code is None and job.message.strip() else ""
        raise JobEnded(job.code, f"job {job_id} {_how(job)}{why}", action="its last lines say why" if job.code in (2, 4) else again)
    shown.line(f"job {job_id} {_how(job)}")


def _write(shown: Screen, line: str) -> None:
    """One line of a job, as it is but for its secrets: brackets in it are no markup."""
    shown.console.out(redact(line), highlight=False)


def _how(job: Job) -> str:
    code = f" with exit code {job.code}" if job.status == "FAILED" else ""
    return f"{job.status.lower()}{code} after {_seconds(job)}"


def _cells(job: Job) -> tuple[str, ...]:
    code = str(job.code) if job.status in ("SUCCEEDED", "FAILED") else "-"
    return job.id, job.verb, job.status.lower(), code, time.strftime("%m-%d %H:%M", time.localtime(job.started_s)), _seconds(job)


def _seconds(job: Job) -> str:
    seconds = (job.ended_s or time.time()) - job.started_s
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def _told(job: Job) -> dict[str, object]:
    return {"job": job.id, "status": job.status, "exit_code": job.code if job.ended else None}


def _command(verb: str, job_id: str, address: str | None) -> str:
    at = f" --address {shlex.quote(address)}" if address else ""
    return f"vkd jobs {verb} {job_id}{at}"
