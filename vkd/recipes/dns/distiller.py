"""What learns in the recipe `dns`: a student of similarity, or a selector between two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vkd.losses import similarity
from vkd.losses.distillation import SumAndCount
from vkd.recipes.base import Batch, Distiller, Losses
from vkd.recipes.dns.batches import COARSE, MASK, PAIR_WEIGHT, REGIONS, SCORES, TEACHER
from vkd.schema import WEIGHT
from vkd.students.base import Comparison, SimilarityStudent
from vkd.students.selector import Selector

if TYPE_CHECKING:
    from vkd.recipes.dns import DnS


class SimilarityDistiller(Distiller):
    """A student that learns the teacher's score of an anchor with each of its two candidates."""

    student: SimilarityStudent
    regularisers = ("excess",)

    def __init__(self, student: SimilarityStudent, recipe: DnS) -> None:
        super().__init__()
        self.student, self.recipe, self.repeats = student, recipe, not student.masked

    def forward(self, batch: Batch) -> Losses:
        taught, weight = batch[f"{TEACHER}.{SCORES}"].T.flatten(), batch[PAIR_WEIGHT].T.flatten()
        said = self.said_of_pairs(batch)
        losses = {"absolute": similarity.absolute(said.similarity, similarity.to_unit(taught) if self.student.unit else taught, weight)}
        return losses | _excess(said, weight, self.recipe.excess)

    def said_of_pairs(self, batch: Batch) -> Comparison:
        """Of all anchors with their first candidates, then with their second; videos are repeated to one length if they must be."""
        regions, mask = _videos(batch[REGIONS]), _videos(batch[MASK])
        if self.repeats:
            return self.student.compare_pairs(*_split(self.student.index(repeated(regions, mask))))
        anchors, candidates = _split(self.student.index(regions, mask))
        anchor_mask, mask = _split(mask)
        return self.student.compare_pairs(anchors, candidates, anchor_mask, mask)

    def right(self, batch: Batch) -> SumAndCount:
        """How often the first candidate is scored above the second."""
        first, second = self.said_of_pairs(batch).similarity.chunk(2)
        return ((first > second) * batch[WEIGHT]).sum(), batch[WEIGHT].sum()


class TripletDistiller(SimilarityDistiller):
    """A network that learns that copies are alike, by a margin."""

    def __init__(self, student: SimilarityStudent, recipe: DnS) -> None:
        super().__init__(student, recipe)
        self.repeats = True

    def forward(self, batch: Batch) -> Losses:
        said = self.said_of_pairs(batch)
        positive, negative = said.similarity.chunk(2)
        losses = {"triplet": ((F.relu(negative - positive + self.recipe.margin) * batch[WEIGHT]).sum(), batch[WEIGHT].sum())}
        return losses | _excess(said, batch[PAIR_WEIGHT].T.flatten(), self.recipe.excess)


class SelectorDistiller(Distiller):
    """A selector that learns for which pairs the coarse score is far from the fine one, which the coarse score alone tells in part."""

    student: Selector
    unpaired = ("cross_entropy",)

    def __init__(self, student: Selector, recipe: DnS) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe

    def forward(self, batch: Batch) -> Losses:
        logits, label, weight = self._said(batch)
        return {"cross_entropy": similarity.binary_cross_entropy(logits, label, weight)}

    def right(self, batch: Batch) -> SumAndCount:
        """How often it is right about a pair."""
        logits, label, weight = self._said(batch)
        return (((logits > 0) == (label > 0)) * weight).sum(), weight.sum()

    def _said(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and weights of all anchors with their first candidates, then with their second."""
        fine, coarse = (batch[f"{alias}.{SCORES}"].T.flatten() for alias in (TEACHER, COARSE))
        weight = batch[PAIR_WEIGHT].T.flatten()
        anchors, candidates = _split(self.student.index(_videos(batch[REGIONS]), _videos(batch[MASK])))
        return self.student(anchors, candidates, coarse, weight), similarity.needs_fine(fine, coarse, self.recipe.threshold), weight


def repeated(regions: Float[Tensor, "b t r d"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t r d"]:
    """Each video begun anew where it is over, in place of padding."""
    lengths = mask.sum(1).clamp_min(1)
    frames = torch.arange(regions.shape[1], device=regions.device) % lengths[:, None]
    return regions[torch.arange(len(regions), device=regions.device)[:, None], frames]


def _videos(triplets: Tensor) -> Tensor:
    """All anchors, then all first candidates, then all second."""
    return triplets.transpose(0, 1).flatten(0, 1)


def _split(videos: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors twice, and all candidates."""
    anchors, first, second = videos.chunk(3)
    return torch.cat([anchors, anchors]), torch.cat([first, second])


def _excess(said: Comparison, weight: Tensor, scale: float) -> Losses:
    if said.cells is None or not scale:
        return {}
    total, count = similarity.excess(said.cells, said.mask, weight)
    return {"excess": (scale * total, count)}
