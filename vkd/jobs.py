"""What is known of a job on a cluster, and its log as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vkd.errors import ConfigError

if TYPE_CHECKING:
    from vkd.submission import Submission

INTERRUPTED, BY_SIGNAL = 130, 128
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A job of vkd on a cluster; times are seconds since the epoch."""

    id: str
    status: str
    verb: str
    outputs: tuple[str, ...]
    digest: str
    exit_code: int | None
    started_s: float
    ended_s: float | None
    message: str

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def code(self) -> int:
        """What a command that waited for it returns."""
        if self.status in ("SUCCEEDED", "STOPPED"):
            return INTERRUPTED if self.status == "STOPPED" else 0
        code = 1 if self.exit_code is None else self.exit_code
        return code if code >= 0 else BY_SIGNAL - code


def live(jobs: Sequence[Job], given: Submission) -> Job | None:
    """The unended job that does the same. Raises ConfigError for one that works on the same output, but differs."""
    for job in jobs:
        if not job.ended and set(job.outputs) & set(given.outputs):
            if (job.verb, job.digest) == (given.verb, given.digest):
                return job
            differs = f"vkd {job.verb}" if job.verb != given.verb else f"vkd {job.verb} of a run file that differs"
            action = f"wait for it: vkd jobs logs {job.id} --follow, or end it: vkd jobs stop {job.id}"
            raise ConfigError(f"job {job.id} works on it: {differs}", where=job.outputs[0], action=action)
    return None


class Log:
    """Whole lines of a text that comes in pieces, and from its beginning again after `again`."""

    def __init__(self, write: Say) -> None:
        self.write, self.num_chars = write, 0
        self._skip, self._rest = 0, ""

    def feed(self, text: str) -> None:
        new, self._skip = text[self._skip :], max(0, self._skip - len(text))
        self.num_chars += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self.write(line)

    def again(self) -> None:
        self._skip = self.num_chars

    def end(self) -> None:
        if self._rest:
            self.write(self._rest)
