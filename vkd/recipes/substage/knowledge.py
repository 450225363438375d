"""What the student's substages are to share with the teacher's: feature distribution and relations, on descriptors of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vkd import gather
from vkd.descriptors import Descriptor
from vkd.losses import features, relation
from vkd.losses.adapters import DescriptorAdapter
from vkd.losses.batchwise import gathered
from vkd.losses.distillation import SumAndCount
from vkd.recipes.substage.harmonise import Harmoniser
from vkd.schema import TensorType
from vkd.stage_maps import partners

if TYPE_CHECKING:
    from vkd.recipes.substage import Substage

Found = dict[tuple[str, int], SumAndCount]  # (kind of loss, substage) -> loss
Rows = Float[Tensor, "n 6 d"]
MOMENTUM = 0.99  # of the teacher's running deviation, and of how alike the stages are


class Knowledge(nn.Module):
    """Adapters, running statistics of the teacher, and the losses of every substage.

    Substage k of N is compared with the teacher's substage round((k + 1) * M / N) - 1 of M. Ranks see each other's descriptors,
    so a loss is that of the whole batch, whatever their number.
    """

    alike: Tensor  # linear CKA of the student's substages with the teacher's
    centred: Tensor  # which adapters give means and deviations about the teacher's

    def __init__(self, recipe: Substage, channels: Sequence[int], stages: Sequence[TensorType]) -> None:
        super().__init__()
        self.fd, self.rel = recipe.fd, recipe.rel
        self.reaches_student = recipe.fd.teaches or recipe.rel.on
        self.pairs = recipe.combos.pair and self.rel.pair > 0
        sizes = [kind.row_shape[-1] for kind in stages]
        self.partner = partners(len(channels), len(sizes))
        self.describe = nn.ModuleList(Descriptor(c, k, "full") for k, c in enumerate(channels))
        self.adapters = nn.ModuleDict()
        for k, c in enumerate(channels):
            for j in self._targets(k, len(sizes)):
                self.adapters[f"{k}-{j}"] = DescriptorAdapter(c, sizes[j])
        self.harmoniser = Harmoniser(len(channels), recipe.harmonise.tau, recipe.harmonise.clip)
        for j, d in enumerate(sizes):
            self.register_buffer(f"scale{j}", torch.full((features.NUM_STATISTICS, d), torch.nan))
        self.register_buffer("alike", torch.full((len(channels), len(sizes)), torch.nan))
        self.register_buffer("centred", torch.zeros(len(channels), len(sizes)))

    def forward(self, maps: Sequence[Tensor], taught: Sequence[Tensor], weight: Tensor, learns: bool, follows: bool) -> Found:
        """The losses of the substages whose maps are given, over the rows of all ranks; without gradient unless it `learns`.

        It `follows` batches that are trained on with its running statistics: also while all of its adapters are frozen.
        """
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()), torch.autocast(maps[0].device.type, enabled=False):
            own = [describe(x if self.reaches_student else x.detach()) for describe, x in zip(self.describe, maps, strict=False)]
            rows = gathered([*own, *taught], weight, gather.rows_over_ranks)
            students, teachers = rows[: len(own)], [x.detach() for x in rows[len(own) :]]
            if follows:
                self._watch(students, teachers)
                self._centre(students, teachers, again=not learns)
            looked_at = students if self.fd.teaches else [x.detach() for x in students]
            found = self._features(looked_at, teachers, follows) if self.fd.on else {}
            return found | (self._relations(students, teachers) if self.rel.on and learns else {})

    def _features(self, students: Sequence[Rows], teachers: Sequence[Rows], follows: bool) -> Found:
        """How far each substage's features are from those that it is to have; the harmoniser is told when it `follows`."""
        found: Found = {}
        every, weights = _ones(students[0]), (self.fd.moments, self.fd.mmd, self.fd.temporal)
        for k, rows in enumerate(students):
            targets = self._targets(k, len(teachers))
            shares = relation.correspondence(self.alike.nan_to_num())[k, targets] if len(targets) > 1 else every.new_ones(1)
            total, count = every.new_zeros(()), every.sum()
            for share, j in zip(shares, targets, strict=True):
                adapted, scale = self.adapters[f"{k}-{j}"](rows), getattr(self, f"scale{j}").nan_to_num(1.0)
                total = total + share * features.descriptor_loss(adapted, teachers[j], scale, every, weights=weights)[0]
            if follows and len(rows):
                self.harmoniser.add(k, total / count)
            found["fd", k] = total, count
        return found

    def _relations(self, students: Sequence[Rows], teachers: Sequence[Rows]) -> Found:
        """How the clips of the batch, and the substages, relate to each other in student and teacher."""
        every = _ones(students[0])
        s = [features.statistics(x) for x in students]
        t = [features.statistics(teachers[self.partner[k]]) for k in range(len(students))]
        found: Found = {}
        correlations = relation.correlation(s, t, every)
        for k in range(len(students)):
            terms = [(self.rel.sp, relation.sp(s[k], t[k], every)), (self.rel.corr, correlations[k])]
            if self.pairs and k:
                terms.append((self.rel.pair, self._pair(students, t, k)))
            found["rel", k] = sum((weight * total for weight, (total, _) in terms), every.new_zeros(())), terms[0][1][1]
        return found

    def _pair(self, students: Sequence[Rows], teachers: Sequence[Tensor], k: int) -> SumAndCount:
        """How substage k goes on from the one before, in the teacher's channels."""
        pair = []
        for number in (k - 1, k):
            j = self.partner[number]
            adapted = features.statistics(self.adapters[f"{number}-{j}"](students[number]))
            directions = relation.directions(adapted.shape[1], seed=j).to(adapted)
            pair.append((adapted @ directions, teachers[number] @ directions))
        (s1, t1), (s2, t2) = pair
        return relation.pair((s1, s2), (t1, t2), _ones(students[0]))

    @torch.no_grad()
    def _centre(self, students: Sequence[Rows], teachers: Sequence[Rows], again: bool) -> None:
        """Before they learn, adapters begin where the teacher's means are: it may vary by less than a hundredth of them.

        The same on every rank; `again` for those that have begun.
        """
        for name, adapter in self.adapters.items():
            k, j = map(int, name.split("-"))
            if k < len(students) and len(students[k]) and (again or not self.centred[k, j]):
                assert isinstance(adapter, DescriptorAdapter)
                off = (teachers[j] - adapter(students[k])).mean(dim=0)
                adapter.of_means.bias.add_(off[0])
                adapter.of_deviations.bias.add_(off[1])
                self.centred[k, j] = 1

    @torch.no_grad()
    def _watch(self, students: Sequence[Rows], teachers: Sequence[Rows]) -> None:
        """Follow the teacher's deviation over clips, and how alike the stages are; the same on every rank."""
        if len(teachers[0]) > 1:
            for j, rows in enumerate(teachers):
                follow(getattr(self, f"scale{j}"), rows[:, : features.NUM_STATISTICS].std(dim=0, correction=0))
        every = _ones(students[0])
        cka = relation.stage_cka([features.statistics(x) for x in students], [features.statistics(x) for x in teachers], every)
        if cka is not None:
            follow(self.alike[: len(students)], cka)

    def metrics(self) -> Mapping[str, float]:
        """How alike the student's substages are to the teacher's that they are compared with (linear CKA)."""
        likeness = [self.alike[k, j].item() for k, j in enumerate(self.partner)]
        return {f"cka/{k + 1}": value for k, value in enumerate(likeness) if value == value}

    def _targets(self, k: int, num_teachers: int) -> list[int]:
        """The teacher's substages to whose channels substage k is adapted."""
        if self.fd.on and self.rel.correspondence == "soft":
            return list(range(num_teachers))
        return [self.partner[k]] if self.fd.on or self.pairs else []

    def adapters_of(self, k: int, newest: int) -> list[str]:
        """Parameters that the losses of substage k learn with, in a phase whose newest substage is given."""
        if not self.fd.on and newest == 0:
            return []  # a pair needs two
        mine = {name: adapter for name, adapter in self.adapters.items() if name.startswith(f"{k}-")}
        return [f"adapters.{name}.{parameter}" for name, adapter in mine.items() for parameter, _ in adapter.named_parameters()]


def _ones(rows: Rows) -> Float[Tensor, " n"]:
    return rows.new_ones(len(rows))


def follow(running: Tensor, new: Tensor) -> None:
    """Move a running mean, NaN before it knows anything, towards what is new."""
    running.copy_(torch.where(running.isnan(), new, MOMENTUM * running + (1 - MOMENTUM) * new))
