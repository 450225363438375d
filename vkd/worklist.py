"""What a labelling has to do: chunks that the store lacks, and rejected examples that get another try. Needs listings only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vkd import schema
from vkd.planning import Plan
from vkd.rounds import Chunk, rounds_from
from vkd.schema import TRAIN, VAL
from vkd.stages import Item
from vkd.store import forgotten
from vkd.store.labelset import LabelSet, LabelSetSpec

if TYPE_CHECKING:
    from vkd.run import Run

REJECT_COLUMNS = (schema.REJECT_STAGE, schema.REJECT_KIND, schema.REJECT_PERMANENT)


@dataclass(frozen=True)
class Retry:
    """Which rejects get another try: those of one kind, or all that another try can help."""

    reason: str | None = None

    def wants(self, reject: Mapping[str, object]) -> bool:
        if reject[schema.REJECT_STAGE] in (None, forgotten.STAGE):
            return False
        if self.reason is not None:
            return bool(reject[schema.REJECT_KIND] == self.reason)
        return not reject[schema.REJECT_PERMANENT]


def missing_items(store: str, views: Iterable[int], specs: Mapping[str, LabelSetSpec], chunks: Sequence[Chunk]) -> list[Item]:
    """What the store lacks, view by view in plan order."""
    items = []
    for view in views:
        missing = {alias: _missing(store, spec, view, chunks) for alias, spec in specs.items()}
        for chunk in chunks:
            if lacks := tuple(alias for alias in specs if chunk in missing[alias]):
                items.append(Item(view, chunk, lacks))
    return items


def retry_items(store: str, num_views: int, specs: Mapping[str, LabelSetSpec], chunks: Sequence[Chunk], retry: Retry) -> list[Item]:
    """Chunks with rejects that get another try, and their rows in each set; footers tell which chunks need a look."""
    sets = {alias: found for alias, spec in specs.items() if (found := LabelSet.find(store, spec)) is not None}
    items = []
    for view in range(num_views):
        suspects = {alias: label_set.rejecting(view) for alias, label_set in sets.items()}
        for chunk in chunks:
            rows = {alias: _rows(sets[alias], view, chunk, retry) for alias in sets if chunk in suspects[alias]}
            if redo := {alias: found for alias, found in rows.items() if found}:
                items.append(Item(view, chunk, tuple(redo), redo))
    return items


def training_items(run: Run, plan: Plan, specs: Mapping[str, LabelSetSpec], start: tuple[int, int] = (0, 0)) -> list[Item]:
    """What the store lacks of all that training reads from its position (epoch, round) on, in its order; the rest comes last."""
    number = wanted(run, plan, start)
    chunks: dict[int, list[Chunk]] = {}
    for view, chunk in number:
        chunks.setdefault(view, []).append(chunk)
    items = [item for view in chunks for item in missing_items(run.store, [view], specs, chunks[view])]
    return sorted((item._replace(round=number[item.view, item.chunk]) for item in items), key=lambda item: item.round)


def wanted(run: Run, plan: Plan, start: tuple[int, int]) -> dict[tuple[int, Chunk], int]:
    """(view, chunk) that training or evaluation reads from a position on -> the number of the first round that does."""
    number: dict[tuple[int, Chunk], int] = {}
    sizes = [len(rows) for rows in plan.rows(TRAIN)]
    rounds = rounds_from(sizes, (0, 0), run.train.epochs, run.checkpoint.every_examples, run.train.seed)
    for n, round_ in enumerate(rounds):
        if (round_.epoch, round_.index) >= start:
            for chunk in round_.chunks:
                number.setdefault((run.stored_view(round_.epoch), plan.chunks[chunk]), n)
    if run.labels.mode == "live":
        rest = [(run.held_out_view, plan.chunks[i]) for i, rows in enumerate(plan.rows(VAL)) if rows]
    else:
        rest = [(view, chunk) for view in range(run.data.views.count) for chunk in plan.chunks]
    after = max(number.values(), default=-1) + 1
    return dict.fromkeys(rest, after) | number


def num_rows(plan: Plan, item: Item) -> int:
    """Examples of a chunk that an item is about."""
    return len({row for rows in item.redo.values() for row in rows}) if item.redo else plan.examples(item.chunk).num_rows


def total_rows(plan: Plan, items: Iterable[Item]) -> int:
    """Examples that items are about."""
    return sum(num_rows(plan, item) for item in items)


def _missing(store: str, spec: LabelSetSpec, view: int, chunks: Sequence[Chunk]) -> set[Chunk]:
    found = LabelSet.find(store, spec)
    return set(chunks) if found is None else set(found.missing(view, chunks))


def _rows(label_set: LabelSet, view: int, chunk: Chunk, retry: Retry) -> tuple[int, ...]:
    rejects = label_set.read(view, chunk, REJECT_COLUMNS).select(REJECT_COLUMNS).to_pylist()
    return tuple(row for row, reject in enumerate(rejects) if retry.wants(reject))
