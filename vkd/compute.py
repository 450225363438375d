"""How much a run asks for: decode tasks, teacher actors, student workers; and what sections of a run file are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from vkd.video.settings import MIN_MEMORY_BYTES, Limits

LABEL = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"  # what Ray takes as the value of a label
GROUP_LABEL = "vkd-group"  # of the nodes in cluster.yaml and cluster/
ACCELERATOR_LABEL = "ray.io/accelerator-type"  # Ray finds it out by itself


def absolute(path: str) -> str:
    """A local path made absolute (Ray workers have another working directory); a uri as it is."""
    if not isinstance(path, str):
        raise ValueError("a place is the path or uri of a folder")
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


Place = Annotated[str, BeforeValidator(absolute)]  # a folder: a local path or any fsspec uri


class Part(BaseModel):
    """A section of a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Placed(Part):
    """Workers that run on the nodes of a `group` of the cluster, those labelled `vkd-group: <group>`; none: on any node."""

    group: str | None = Field(default=None, pattern=LABEL)

    @property
    def labels(self) -> dict[str, str]:
        """What a node must carry."""
        return {GROUP_LABEL: self.group} if self.group else {}


class OnDevice(Placed):
    """Workers that may also ask for a kind of accelerator, such as L4, A100 or H100."""

    accelerator: str | None = Field(default=None, pattern=LABEL)

    @property
    def labels(self) -> dict[str, str]:
        return super().labels | ({ACCELERATOR_LABEL: self.accelerator} if self.accelerator else {})


class Decode(Placed):
    """Decode tasks: how many at once (none: as many as the nodes hold), CPUs each asks for, the decoder, its limits.

    A video may take `deadline_s`, and `deadline_s_per_video_s` more for each second of it; its decoder `max_memory_bytes`.
    """

    workers: int | None = Field(default=None, ge=1)
    cpus: float | None = Field(default=None, gt=0)
    backend: Literal["auto", "decord", "pyav"] = "auto"
    deadline_s: float = Field(default=Limits.deadline_s, gt=0)
    deadline_s_per_video_s: float = Field(default=Limits.deadline_s_per_video_s, ge=0)
    max_memory_bytes: int = Field(default=Limits.max_memory_bytes, ge=MIN_MEMORY_BYTES)

    @property
    def limits(self) -> Limits:
        return Limits(self.deadline_s, self.deadline_s_per_video_s, self.max_memory_bytes)


class TeacherPool(OnDevice):
    """Teacher actors: how many, and what each asks for. None: what the profile gives."""

    actors: int | None = Field(default=None, ge=1)
    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)


class StudentGroup(OnDevice):
    """Student training: `workers: 0` trains in the driver; n starts a Ray Train group of n, [n, m] one of n to m, as nodes come and go.

    A rank that makes no step and waits for no data for `stalled_s` is taken for hung, and the group starts anew.
    """

    workers: NonNegativeInt | tuple[PositiveInt, PositiveInt] = 0
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    stalled_s: float = Field(default=600, gt=0)

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @field_validator("workers")
    @classmethod
    def _ascending(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[{value[0]}, {value[1]}] is no range: the first is the smaller number")
        return value


class Compute(Part):
    """How much: `laptop` shares the cores of one machine, `cluster` asks for whole CPUs and GPUs; auto looks for GPUs.

    `teacher` is about every teacher of the recipe but those that `teachers` names.
    """

    profile: Literal["auto", "laptop", "cluster"] = "auto"
    address: str | None = None
    decode: Decode = Decode()
    teacher: TeacherPool = TeacherPool()
    teachers: Mapping[str, TeacherPool] = {}
    student: StudentGroup = StudentGroup()
