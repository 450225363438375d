"""Anchors and drawn candidates -> region features of three videos each, with the scores of their teachers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vkd import schema, triplets
from vkd.batches import Part
from vkd.errors import LabelsMismatch
from vkd.recipes.base import Batch
from vkd.region_store import RegionStore
from vkd.regions import MAX_FRAMES, augmented_frames, collate, tiled
from vkd.similarity_layers import MIN_FRAMES
from vkd.store.encodings import decode
from vkd.transfer import pinned

if TYPE_CHECKING:
    from vkd.recipes.dns import DnS

TEACHER, COARSE, SCORES = "teacher", "coarse", "scores"
ANCHOR, OTHERS, POOLS, FEATURES, LENGTH = "anchor", "others", "pools", "features", "num_frames"  # columns of a pair manifest
REGIONS, MASK, PAIR_WEIGHT = "regions", "mask", "pair_weight"
Draw = Literal["copies", "scores", "selection"]


@dataclass(frozen=True)
class _Anchor:
    """A row of a pair manifest: its candidates with their pools, and what each teacher scored them."""

    example_id: str
    number: int
    features: str
    video: str
    others: Sequence[str]
    pools: Sequence[str]
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Triplet:
    """An anchor in one epoch, with which two of its candidates: None where there is none to draw."""

    anchor: _Anchor
    chosen: tuple[int | None, int | None]
    rng: np.random.Generator  # for the augmentation


class TripletBatches:
    """For n anchors "regions" [n, 3, t, r, d] and "mask" [n, 3, t]: each anchor and two of its candidates; t is a multiple of 4.

    The first candidate is the positive one (of a selector: one that needs the fine score). "pair_weight" [n, 2] is 0 where there is
    no candidate, "weight" [n] where an anchor has nothing to learn from; "ALIAS.scores" [n, 2] are the teachers'. An anchor has the
    same candidates and the same augmentation in an epoch, whatever its batch.
    """

    def __init__(self, recipe: DnS, draw: Draw, regions: RegionStore, seed: int, *, augment: bool) -> None:
        self.recipe, self.draw, self.regions, self.seed, self.augment, self.unreadable = recipe, draw, regions, seed, augment, 0
        self._lock = threading.Lock()

    def __call__(self, parts: Sequence[Part], epoch: int) -> Batch:
        anchors = [anchor for part in parts for anchor in self._anchors(part)]
        drawn = [found for anchor in anchors if (found := self._drawn(anchor, epoch)) is not None]
        batch = self._batch(drawn) if drawn else self._masked()
        return {name: pinned(tensor) for name, tensor in batch.items()}

    def _anchors(self, part: Part) -> list[_Anchor]:
        chunk, rows = part
        scores = {alias: decode(table, SCORES, rows) for alias, table in chunk.tables.items()}
        found = []
        for i, row in enumerate(chunk.examples.take(rows).to_pylist()):
            others, pools = row[OTHERS].split(), row[POOLS].split()
            own = {alias: np.asarray(values[i]) for alias, values in scores.items()}
            named = row[schema.EXAMPLE_ID], int(chunk.numbers[rows[i]]), row[FEATURES], row[ANCHOR]
            found.append(_Anchor(*named, others, pools, own))
        return found

    def _drawn(self, anchor: _Anchor, epoch: int) -> _Triplet | None:
        """None when the anchor has nothing to learn from."""
        rng, scores = triplets.rng_of(self.seed, epoch, anchor.example_id), anchor.scores
        if self.draw == "selection":
            chosen = triplets.draw_selector_pairs(scores[TEACHER], scores[COARSE], rng, self.recipe.threshold)
            return None if chosen == (None, None) else _Triplet(anchor, chosen, rng)
        drawn = triplets.draw_triplet(anchor.pools, scores.get(TEACHER), rng, self.recipe.min_positive)
        return None if drawn is None else _Triplet(anchor, (drawn.positive, drawn.negative), rng)

    def _batch(self, drawn: Sequence[_Triplet]) -> Batch:
        regions, mask = collate([self._video(each, position) for each in drawn for position in (None, *each.chosen)])
        lacking = -regions.shape[1] % MIN_FRAMES  # else how much of a video's end counts would depend on its batch
        batch = {REGIONS: F.pad(regions, (0, 0, 0, 0, 0, lacking)), MASK: F.pad(mask, (0, lacking))}
        batch = {name: tensor.reshape(len(drawn), 3, *tensor.shape[1:]) for name, tensor in batch.items()}
        there = torch.tensor([[position is not None for position in each.chosen] for each in drawn])
        batch |= {PAIR_WEIGHT: there.float(), schema.WEIGHT: torch.ones(len(drawn))}
        batch[schema.EXAMPLE] = torch.tensor([each.anchor.number for each in drawn])
        for alias in self.recipe.teachers:
            scores = [[_at(each.anchor.scores[alias], position) for position in each.chosen] for each in drawn]
            batch[f"{alias}.{SCORES}"] = torch.tensor(scores, dtype=torch.float32)
        return batch

    def _video(self, triplet: _Triplet, position: int | None) -> Tensor:
        """Regions of a candidate, disturbed, or of the anchor, as they are: it stands where there is no candidate, too."""
        anchor = triplet.anchor
        found = self._read(anchor.features, anchor.video if position is None else anchor.others[position])
        frames = np.arange(len(found))
        if self.augment and position is not None:
            frames = augmented_frames(len(found), triplet.rng)
        return tiled(torch.from_numpy(found[frames[:MAX_FRAMES]]))

    def _read(self, features: str, video: str) -> np.ndarray:
        if features != self.regions.name:
            what = f"pairs of {features} among pairs of {self.regions.name}"
            raise LabelsMismatch(what, where="data.manifest", action="vkd pairs RUN into a manifest of its own")
        with self._lock:
            return self.regions.read(video)

    def _masked(self) -> Batch:
        """One anchor of weight 0, without frames that are real."""
        shape = (1, 3, MIN_FRAMES, self.regions.num_regions, self.regions.num_dims)
        batch = {REGIONS: torch.zeros(shape), MASK: torch.zeros(shape[:3], dtype=torch.bool), PAIR_WEIGHT: torch.zeros(1, 2)}
        batch |= {schema.WEIGHT: torch.zeros(1), schema.EXAMPLE: torch.full((1,), -1)}
        return batch | {f"{alias}.{SCORES}": torch.zeros(1, 2) for alias in self.recipe.teachers}


def _at(scores: np.ndarray, position: int | None) -> float:
    return 0.0 if position is None else float(scores[position])
