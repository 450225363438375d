"""The recipe `substage` beside a live teacher: losses on full maps, and students stitched to the teacher's later substages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vkd import gather
from vkd.layers import BatchNorm
from vkd.live_teacher import Chain, LiveTeacher
from vkd.losses import distillation, relation
from vkd.losses import maps as map_losses
from vkd.losses.distillation import kept
from vkd.recipes.base import Batch, Losses
from vkd.recipes.substage.distiller import LOGITS, TEACHER, SubstageDistiller
from vkd.recipes.substage.knowledge import Found, Knowledge, follow
from vkd.recipes.substage.schedule import Step
from vkd.schema import FRAMES, WEIGHT, TensorType
from vkd.stage_maps import partners
from vkd.students.base import Student

if TYPE_CHECKING:
    from vkd.recipes.substage import Substage


class LiveSubstageDistiller(SubstageDistiller):
    """With stitches, the student's substages up to the newest go on through the teacher's later ones, and imitate its logits.

    In the phase that adds a substage that is the newest; while all learn at once every substage but the last is stitched, as
    DistributedDataParallel wants each of them to get a gradient.
    """

    def __init__(self, student: Student, recipe: Substage, stages: Sequence[TensorType]) -> None:
        super().__init__(student, recipe, stages)
        self.frozen = LiveTeacher(recipe.teacher, student)
        channels = student.stage_channels(self.names)
        if recipe.fd.full and recipe.fd.on:
            self.knowledge = MapKnowledge(recipe, channels, stages, [shape[0] for shape in self.frozen.shapes])
        if recipe.combos.stitch:
            self.chain, self.partner = Chain(self.frozen), partners(len(channels), len(self.frozen.shapes))
            self.stitches = nn.ModuleList(Stitch(channels[k], self.frozen.shapes[self.partner[k]]) for k in range(len(channels) - 1))

    def _taught(self, batch: Batch) -> list[Tensor]:
        """Descriptors, and maps after them when losses look at these."""
        described = super()._taught(batch)
        return [*described, *self.frozen.maps(batch[FRAMES])] if isinstance(self.knowledge, MapKnowledge) else described

    def _more(self, maps: Sequence[Tensor], weights: Float[Tensor, " n"], batch: Batch) -> Losses:
        losses: Losses = {}
        for k in self._stitched(self.step):
            stitched = self.chain.logits(self.partner[k], self.stitches[k](maps[k], batch[WEIGHT]), batch[FRAMES])
            tau = self._between(self.recipe.resp.tau, k)
            total, count = distillation.kl(stitched, batch[f"{TEACHER}.{LOGITS}"], tau, batch[WEIGHT])
            losses[f"stitch/{k + 1}"] = (weights[k] * total, count)
        return losses

    def _rates(self, step: Step) -> dict[str, float]:
        stitches = {f"stitches.{k}.{name}": 1.0 for k in self._stitched(step) for name, _ in self.stitches[k].named_parameters()}
        return super()._rates(step) | stitches

    def _stitched(self, step: Step) -> list[int]:
        """The substages that go on through the teacher's in a phase."""
        if not self.recipe.combos.stitch or step.warmup:
            return []
        ends = range(len(self.names) - 1)
        return [k for k in ends if step.joint or k == step.newest]


class Stitch(nn.Module):
    """A student's map in the place of a teacher's [c, t, h, w]: averaged to its size, a 1x1x1 convolution, BatchNorm of all ranks."""

    def __init__(self, num_in: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.size = (shape[1], shape[2], shape[3])
        self.conv, self.norm = nn.Conv3d(num_in, shape[0], 1, bias=False), BatchNorm(shape[0])

    def forward(self, x: Float[Tensor, "b c t h w"], weight: Float[Tensor, " b"]) -> Float[Tensor, "b c2 t2 h2 w2"]:
        adapted: Tensor = self.norm(self.conv(F.adaptive_avg_pool3d(x, self.size)), weight)
        return adapted


class MapKnowledge(Knowledge):
    """Feature-distribution losses on whole maps; relations, and the descriptors' adapters for pairs, are as without them.

    `taught` holds the teacher's descriptors, and after them as many maps.
    """

    def __init__(self, recipe: Substage, channels: Sequence[int], stages: Sequence[TensorType], map_channels: Sequence[int]) -> None:
        super().__init__(recipe, channels, stages)
        self.soft = recipe.rel.correspondence == "soft"
        self.weights = (self.fd.moments, self.fd.mmd, self.fd.temporal, self.fd.channel)
        self.on_maps = nn.ModuleDict()
        for k, num_in in enumerate(channels):
            for j in self._followed(k):
                self.on_maps[f"{k}-{j}"] = nn.Conv3d(num_in, map_channels[j], 1)
        for j, c in enumerate(map_channels):
            self.register_buffer(f"map_scale{j}", torch.full((c,), torch.nan))

    def forward(self, maps: Sequence[Tensor], taught: Sequence[Tensor], weight: Tensor, learns: bool, follows: bool) -> Found:
        num_stages = len(taught) // 2
        found = super().forward(maps, taught[:num_stages], weight, learns, follows)
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()), torch.autocast(maps[0].device.type, enabled=False):
            return found | self._on_maps([x.float() for x in maps], taught[num_stages:], weight, follows)

    def adapters_of(self, k: int, newest: int) -> list[str]:
        of_pairs = super().adapters_of(k, newest) if newest > 0 else []  # a pair needs two
        mine = {name: adapter for name, adapter in self.on_maps.items() if name.startswith(f"{k}-")}
        return of_pairs + [f"on_maps.{name}.{parameter}" for name, adapter in mine.items() for parameter, _ in adapter.named_parameters()]

    def _on_maps(self, students: Sequence[Tensor], teachers: Sequence[Tensor], weight: Tensor, follows: bool) -> Found:
        if follows:
            self._watch_maps(teachers, weight)
        found: Found = {}
        for k, x in enumerate(students):
            targets = self._followed(k)
            shares = relation.correspondence(self.alike.nan_to_num())[k, targets] if self.soft else x.new_ones(1)
            total = x.new_zeros(())
            for share, j in zip(shares, targets, strict=True):
                adapted, scale = self.on_maps[f"{k}-{j}"](x), getattr(self, f"map_scale{j}").nan_to_num(1.0)
                part, count = map_losses.map_loss(adapted, teachers[j], scale, weight, gather.rows_over_ranks, self.weights)
                total = total + share * part
            found["fd", k] = total, count
            summed, rows = gather.sum_over_ranks(torch.stack([total, count])).unbind()
            if follows and rows > 0:
                self.harmoniser.add(k, summed / rows)
        return found

    @torch.no_grad()
    def _watch_maps(self, teachers: Sequence[Tensor], weight: Tensor) -> None:
        """Follow the deviation over clips of the teacher's maps, of all positions of a channel; the same on every rank."""
        count = gather.sum_over_ranks((weight > 0).sum())
        if count < 2:
            return
        for j, x in enumerate(kept(x.float(), weight) for x in teachers):
            mean = gather.sum_over_ranks(x.sum(dim=0)) / count
            variance = gather.sum_over_ranks(kept(x - mean, weight).square().sum(dim=0)) / count
            follow(getattr(self, f"map_scale{j}"), variance.mean(dim=(1, 2, 3)).sqrt())

    def _targets(self, k: int, num_teachers: int) -> list[int]:
        return [self.partner[k]] if self.pairs else []

    def _features(self, students: Sequence[Tensor], teachers: Sequence[Tensor], follows: bool) -> Found:
        return {}

    def _followed(self, k: int) -> list[int]:
        return list(range(self.alike.shape[1])) if self.soft else [self.partner[k]]
