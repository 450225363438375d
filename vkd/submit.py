"""Ray's job client: hand a command to a cluster, follow it, stop it. The only module that knows of it."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
from ray._private import ray_constants
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from vkd.errors import ConfigError, VkdError
from vkd.jobs import Job, Log, Say, live
from vkd.upload import check_size

if TYPE_CHECKING:  # it imports torch, which only a submission needs
    from vkd.submission import Submission

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # the first that is set, as in Ray's own command line
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 120.0
SILENCE_S = 15.0  # between two looks whether the job, and the connection, are still there
RETRY_S = 2.0
PATIENCE_S = 300.0  # with a cluster that does not answer any more
STOP_TIMEOUT_S = 60.0
NUM_RACES = 3
LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    packaging.__name__,
    "ray._private.runtime_env.working_dir",
)


class NoCluster(ConfigError):
    """No job server answers at an address."""


def package(given: Submission) -> int:
    """The bytes that Ray would upload of the current directory. Raises ConfigError when they are too many, or lack the run file."""
    sizes = _sizes(given.runtime_env["excludes"])
    for path in given.run_files:
        if path not in sizes:
            action = "move it, or look at .gitignore and excludes in jobs/runtime_env.yaml"
            raise ConfigError("is excluded from what is uploaded", where=path, action=action)
    return check_size(sizes, packaging.GCS_STORAGE_MAX_SIZE)


def _sizes(excludes: list[str]) -> dict[str, int]:
    """Bytes of each file that Ray would upload, found by its own walk: .gitignore and .rayignore count."""
    folder, sizes = Path.cwd(), {}

    def look(path: Path) -> None:
        with suppress(FileNotFoundError):  # it went away meanwhile
            if path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size

    patterns = ray_constants.get_runtime_env_default_excludes() + excludes
    use_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _quieten()
    packaging._dir_travel(folder, [packaging._get_excludes(folder, patterns)], look, include_gitignore=use_gitignore)
    return sizes


class Cluster:
    """The job server of a cluster. Every method raises NoCluster, or ConfigError for a wrong token, in one line."""

    def __init__(self, address: str | None = None) -> None:
        self.url = _url(address)
        os.environ[ADDRESS_VARIABLES[0]] = self.url  # else Ray lets the environment overrule what is asked for
        _quieten()
        with self._answering():
            _knock(self.url)
            self.client = JobSubmissionClient(self.url)
            # Ray's own requests have no time limit
            self.client._do_request = functools.partial(self.client._do_request, timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S))

    def jobs(self) -> list[Job]:
        """Every job that vkd submitted, oldest first."""
        with self._answering():
            listed = [_job(details) for details in self.client.list_jobs() if _is_ours(details)]
        return sorted(listed, key=lambda job: job.started_s)

    def job(self, job_id: str) -> Job:
        with self._answering(job_id):
            return _job(self.client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """All that a job has printed so far."""
        with self._answering(job_id):
            return str(self.client.get_job_logs(job_id))

    def same(self, given: Submission) -> Job | None:
        """The unended job that does this already. Raises ConfigError for another one that works on the same output."""
        return live(self.jobs(), given)

    def submit(self, given: Submission) -> Job:
        """A new job that does this; or one that does it already, if somebody was faster. Raises ConfigError as `same` does."""
        for _ in range(NUM_RACES):
            if (job := live(jobs := self.jobs(), given)) is not None:
                return job
            numbers = [job.id.removeprefix(given.prefix) for job in jobs if job.id.startswith(given.prefix)]
            job_id = f"{given.prefix}{1 + max(map(int, filter(str.isdecimal, numbers)), default=0)}"
            environment = given.runtime_env | {"working_dir": os.getcwd()}
            with suppress(_AlreadyThere):
                with self._answering():
                    self.client.submit_job(
                        entrypoint=given.entrypoint, submission_id=job_id, runtime_env=environment, metadata=given.metadata
                    )
                return self.job(job_id)
        raise VkdError(f"has a job {job_id} that is not listed", where=self.url, action="name another output")

    def stop(self, job_id: str) -> Job:
        """Ask a job to end and wait until it has; one that does not end in a minute is returned as it is."""
        job, give_up_s = self.job(job_id), time.monotonic() + STOP_TIMEOUT_S
        if not job.ended:
            with self._answering(job_id):
                self.client.stop_job(job_id)
        while not job.ended and time.monotonic() < give_up_s:
            time.sleep(0.5)
            job = self.job(job_id)
        return job

    def follow(self, job_id: str, write: Say) -> Job:
        """Write a job's lines as they come, until it has ended. A connection that breaks is made anew, for some minutes."""
        log, lost_s = Log(write), None
        job = self.job(job_id)
        while True:
            try:
                asyncio.run(self._stream(job_id, log))
                job, lost_s = self.job(job_id), None
            except (VkdError, aiohttp.ClientError, OSError, RuntimeError) as error:  # RuntimeError: Ray's, of a broken connection
                if isinstance(error, ConfigError) and not isinstance(error, NoCluster):
                    raise
                if lost_s is None:
                    lost_s = time.monotonic()
                    write(f"vkd: the connection to {self.url} is lost; trying again for {PATIENCE_S:.0f} s")
                if time.monotonic() - lost_s > PATIENCE_S:
                    action = f"it may go on: vkd jobs logs {job_id} --follow"
                    raise NoCluster("does not answer any more", where=self.url, action=action) from error
            if job.ended:
                log.end()
                return job
            log.again()
            time.sleep(RETRY_S)

    async def _stream(self, job_id: str, log: Log) -> None:
        """Feed the log until it or its job ends."""

        async def pump() -> None:
            async for text in self.client.tail_job_logs(job_id):
                log.feed(text)

        pumping, ended_at = asyncio.create_task(pump()), None
        try:
            while not (await asyncio.wait({pumping}, timeout=SILENCE_S))[0]:
                job = await asyncio.to_thread(self.job, job_id)  # raises when the connection broke and nobody told
                if job.status == "PENDING":
                    log.write(f"vkd: the job is pending: {job.message}")
                if job.ended and ended_at == log.num_chars:
                    return  # its last lines had all this time to come
                ended_at = log.num_chars if job.ended else None
        finally:
            pumping.cancel()
            await asyncio.wait({pumping})
        if not pumping.cancelled():
            pumping.result()

    @contextmanager
    def _answering(self, job_id: str = "") -> Iterator[None]:
        """Turns what Ray's client raises into one line."""
        try:
            yield
        except AuthenticationError as error:
            action = "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=FILE with the cluster's token"
            raise ConfigError("the cluster takes no request without its token", where=self.url, action=action) from error
        except OSError as error:
            action = "start the cluster, or its tunnel (ray dashboard cluster.yaml), or name another: --address http://HOST:8265"
            raise NoCluster("no Ray job server answers", where=self.url, action=action) from error
        except (RuntimeError, ValueError) as error:
            raise _refusal(error, self.url, job_id) from error


class _AlreadyThere(VkdError):
    """A job has this id: somebody else submitted it at the same time."""


def _url(address: str | None) -> str:
    told = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), "")
    url = DEFAULT_ADDRESS if told in ("", "auto", "local") else told if "://" in told else f"http://{told}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True) and parts.username is None
    except ValueError:  # the port is no number
        good = False
    if not good:
        raise ConfigError("is no address of a job server", where=told, action="write --address http://HOST:8265")
    return url.rstrip("/")


def _knock(url: str) -> None:
    """Raises OSError when nobody listens: Ray's client would wait long."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_S).close()


def _quieten() -> None:
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _is_ours(details: Any) -> bool:
    return bool(details.submission_id and details.submission_id.startswith("vkd-") and "digest" in (details.metadata or {}))


def _job(details: Any) -> Job:
    told = details.metadata or {}
    return Job(
        id=str(details.submission_id),
        status=str(details.status),
        verb=told.get("verb", ""),
        outputs=tuple(told.get("output", "").split("\n")),
        digest=told.get("digest", ""),
        exit_code=details.driver_exit_code,
        started_s=(details.start_time or 0) / 1000,
        ended_s=details.end_time / 1000 if details.end_time else None,
        message=details.message or "",
    )


def _refusal(error: Exception, url: str, job_id: str) -> VkdError:
    """What the server answered, or what is no answer of a job server."""
    found = re.search(r"status code (\d+): (.*)", str(error), re.DOTALL)
    status, text = found.groups() if found else ("", str(error))
    last = (text.strip().removesuffix(".").splitlines() or [""])[-1]
    if "already exists" in text:
        return _AlreadyThere(last, where=url)
    if status == "404" and job_id:
        return ConfigError(f"knows no job {job_id}", where=url, action="vkd jobs ls lists them")
    if not found:
        return ConfigError(f"is no Ray job server: {last.split('. ')[0]}", where=url, action="write --address http://HOST:8265")
    return VkdError(f"answered {status}: {last}", where=url, action="look at the head's logs, then try again")
