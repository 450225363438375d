"""What a run adds to a loop with phases: held-out clips to validate on, and labels that change between epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
from jaxtyping import Float, Int
from torch import Tensor

from vkd.feeding import Feeder, Labels
from vkd.label_table import REFINED, LabelTable, MapChunks, Version
from vkd.loop import Loop
from vkd.phases import Between
from vkd.planning import Plan
from vkd.rounds import Chunk, Round
from vkd.run import Run
from vkd.schema import VAL
from vkd.store import files
from vkd.store.labelset import LabelSetSpec
from vkd.window import Awaited


class EpochLabels:
    """The label table as a feeder reads it: always the version of the epoch that is trained. It calls `beat` while that is made."""

    def __init__(self, table: LabelTable, beat: Callable[[], None] = lambda: None) -> None:
        self.table, self.beat, self._known = table, beat, dict[int, dict[str, float]]()
        self.prepare(0)

    @property
    def spec(self) -> LabelSetSpec:
        return self.version.spec

    def read(self, view: int, chunk: Chunk, columns: Sequence[str] | None = None) -> pa.Table:
        return self.version.read(view, chunk, columns)

    def prepare(self, epoch: int) -> int:
        """Go to the version of an epoch; every rank must call it."""
        self.version: Version = self.table.at(self.table.prepare(epoch, self.beat))
        return self.version.number

    def note(self, round_: Round, examples: Int[Tensor, " n"], probs: Float[Tensor, "n c"]) -> None:
        self.table.note(round_, examples, probs)

    def metrics(self) -> Mapping[str, float]:
        """How many labels are not used and, where the truth is known, how many are right."""
        number = self.version.number
        if number not in self._known:
            accuracy = self.table.accuracy(number)
            self._known = {
                number: {"labels/unused": self.table.share_unused(number)} | ({} if accuracy is None else {"labels/right": accuracy})
            }
        return self._known[number]


def table_of(run: Run, plan: Plan, taught: Labels, map_chunks: MapChunks = map) -> LabelTable | None:
    """The run's table of refined labels, in its output; None when its recipe refines none."""
    refinement = run.recipe.refinement
    if refinement is None:
        return None
    return LabelTable(files.join(run.output, REFINED), plan, taught, run.data.views.count, refinement, map_chunks)


def equip(loop: Loop, feeder: Feeder, map_chunks: MapChunks = map) -> Feeder:
    """Give a loop with phases its held-out clips and its table of labels; the feeder that reads that table too.

    `map_chunks` does the work of many chunks of the table, see LabelTable.
    """
    if loop.between is None:
        return feeder
    run, plan, notes, held_out = feeder.run, feeder.plan, None, dict(feeder.sets)
    taught = feeder.sets[next(iter(run.recipe.teachers))]
    if isinstance(taught, Awaited):  # between epochs nobody reads, and the feeder's have been told to stop
        taught = Awaited(taught.store, taught.spec, taught.link)
    table = table_of(run, plan, taught, map_chunks)
    if table is not None:
        notes = EpochLabels(table, feeder.beat)
        held_out[REFINED] = table.at(0)  # scores of two epochs compare answers, and not labels
        feeder = replace(feeder, sets={**feeder.sets, REFINED: notes})
    loop.between = Between(loop.distiller, replace(feeder, sets=held_out, split=VAL), notes, run.train.batch_size)
    return feeder
