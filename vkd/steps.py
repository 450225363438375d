"""What a run file may ask for in place of a student: it is made of the run's labels."""

from __future__ import annotations

from pydantic import Field

from vkd.compute import Part, Place
from vkd.schema import LABEL


class Probe(Part):
    """A linear probe on the first teacher's embedding, for the classes of the column `label`; cross-fitted by the column `by`."""

    out: Place
    by: str | None = None
    label: str = LABEL


class Whitening(Part):
    """A PCA whitening of the first teacher's regions, to so many dims."""

    out: Place
    dims: int = Field(default=128, ge=1)


class Index(Part):
    """An index of the videos whose regions the first teacher labelled, by the students in these folders."""

    out: Place
    coarse: Place
    fine: Place
    selector: Place


class Pairs(Part):
    """A manifest of pairs for similarity: for each video some of its nearest neighbours, random others, and the copies of its source.

    `splits`: only videos whose column `split` is one of these.
    """

    out: Place
    num_neighbours: int = Field(default=100, ge=0)
    num_random: int = Field(default=100, ge=0)
    seed: int = Field(default=0, ge=0)
    chunk_size: int = Field(default=16, ge=1)
    splits: tuple[str, ...] = ()
