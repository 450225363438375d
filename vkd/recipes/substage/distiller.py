"""What learns in the recipe `substage`: the student, an exit and an adapter a substage, and the losses between them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vkd.layers import BatchNorm
from vkd.losses import response
from vkd.losses.distillation import SumAndCount
from vkd.recipes.base import Batch, Distiller, Losses, Phase
from vkd.recipes.substage.knowledge import Knowledge
from vkd.recipes.substage.schedule import HEADS, Step, parts_of, steps_of
from vkd.schema import FRAMES, LABEL, WEIGHT, TensorType
from vkd.students.base import Student

if TYPE_CHECKING:
    from vkd.recipes.substage import Substage

TEACHER, LOGITS = "teacher", "logits"
TARGET, TRUST = "refined.q", "refined.omega"  # the label table's columns
EARLIER = 0.5  # what the losses of substages of earlier phases count


class Exit(nn.Module):
    """A classifier on a map's mean over space-time, each channel normalised over the batch: such means hardly differ between clips."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.classifier = BatchNorm(num_channels), nn.Linear(num_channels, num_classes)

    def forward(self, stage_map: Float[Tensor, "b c t h w"], weight: Float[Tensor, " b"]) -> Float[Tensor, "b classes"]:
        logits: Tensor = self.classifier(self.norm(stage_map.mean(dim=(2, 3, 4)), weight))
        return logits


class SubstageDistiller(Distiller):
    """The student and what it needs only while learning: exits, adapters, and itself as it was when the phase began."""

    unpaired = ("fd", "rel")

    def __init__(self, student: Student, recipe: Substage, stages: Sequence[TensorType]) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe
        self.regularisers = () if recipe.fd.teaches else ("fd",)
        self.names = recipe.substages or student.substages
        channels, last = student.stage_channels(self.names), len(self.names) - 1
        num_classes = cast(nn.Linear, student.heads[LOGITS]).out_features
        self.exits = nn.ModuleList(Exit(channels[k], num_classes) for k in range(last))  # that of the last substage is the student's
        self.fusion = nn.Parameter(torch.zeros(len(self.names)))
        self.knowledge = Knowledge(recipe, channels, stages) if recipe.uses_features else None
        self.uncertainty = nn.Parameter(torch.zeros(len(self.names))) if recipe.harmonise.form == "uncertainty" else None
        self.steps = steps_of(recipe.cascade, len(self.names), recipe.combos.prefix)
        self.step: Step = self.steps[0]
        self.assistant: nn.ModuleDict | None = None
        if any(self._assisted(step) for step in self.steps):
            self.assistant = nn.ModuleDict({"student": copy.deepcopy(student), "exits": copy.deepcopy(self.exits)}).requires_grad_(False)
        self._noted: dict[str, Tensor] = {}

    def phases(self) -> Sequence[Phase]:
        return [Phase(step.name, step.epochs, self._rates(step), "linear" if step.warmup else "cosine") for step in self.steps]

    def enter(self, phase: int) -> None:
        self.step = self.steps[phase]

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the student as the phase before left it, and how far its features are from the teacher's."""
        if self._assisted(self.step) and self.assistant is not None:
            self.assistant["student"].load_state_dict(self.student.state_dict())
            self.assistant["exits"].load_state_dict(self.exits.state_dict())
        if self.knowledge is not None and not self.step.warmup:
            self.knowledge.harmoniser.start()

    def forward(self, batch: Batch) -> Losses:
        """The losses of the phase, named kind/substage, each with its weight."""
        maps, logits = self._exits(self.student, self.exits, batch)
        fused = self._fused(logits)
        self.said = fused.detach().float().softmax(dim=1)
        weights, helper = self._weights(), self._helper(batch)
        losses: Losses = {}
        for k in self.step.exits:
            total, count = self._response(k, logits[k], batch, helper)
            losses[f"resp/{k + 1}"] = (weights[k] * total, count)
        if self.step.joint and self.recipe.combos.fused and len(logits) > 1:
            losses["resp/fused"] = self._response(len(self.names) - 1, fused, batch, None)
        if self.knowledge is not None:
            learns = not self.step.warmup
            found = self.knowledge(maps, self._taught(batch), batch[WEIGHT], learns, follows=self.training)
            mine = {each: part for each, part in found.items() if learns and each[1] in self.step.exits}
            losses |= {f"{kind}/{k + 1}": (weights[k] * total, count) for (kind, k), (total, count) in mine.items()}
        if self.uncertainty is not None and self.step.joint:
            count = batch[WEIGHT].sum()
            losses["uncertainty"] = (self.uncertainty[list(self.step.exits)].sum() * count, count)
        losses |= self._more(maps, weights, batch)
        if self.training:  # not when somebody only looks
            self._note(logits, batch)
        return losses

    def _more(self, maps: Sequence[Tensor], weights: Float[Tensor, " n"], batch: Batch) -> Losses:
        """Losses that need more than labels: none here."""
        return {}

    def score(self, batch: Batch) -> SumAndCount:
        """The response loss of the phase's newest exit, or of all exits fused."""
        _, logits = self._exits(self.student, self.exits, batch)
        answer = self._fused(logits) if self.step.joint else logits[self.step.newest]
        return self._response(self.step.newest, answer, batch, None)

    def exit_logits(self, batch: Batch) -> dict[int, Float[Tensor, "b c"]]:
        """What the exits of the phase answer, by substage; the last is the student's own."""
        return self._exits(self.student, self.exits, batch)[1]

    def metrics(self) -> Mapping[str, float]:
        """Weights of the substages, accuracy of the exits on the labels as they are given, likeness of the stages."""
        noted = {name: values.tolist() for name, values in self._noted.items()}
        self._noted = {}
        found = {name: right / count for name, (right, count) in noted.items() if count}
        found |= {f"alpha/{k + 1}": weight for k, weight in enumerate(self._weights().tolist())}
        return {**found, **(self.knowledge.metrics() if self.knowledge is not None else {})}

    def _exits(self, student: nn.Module, exits: nn.Module, batch: Batch) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Maps of the substages that the phase reaches, and the logits of its exits."""
        maps, outputs = student.stages(batch[FRAMES], self.names, num_stages=self.step.newest + 1)  # type: ignore[operator]
        logits = {k: exits[k](maps[k], batch[WEIGHT]) for k in self.step.exits if k < len(self.names) - 1}  # type: ignore[index]
        if outputs is not None:
            logits[len(self.names) - 1] = outputs[LOGITS]
        return maps, logits

    def _fused(self, logits: Mapping[int, Tensor]) -> Float[Tensor, "b c"]:
        """All exits of the phase, weighed by learned weights; the newest alone when nothing is fused."""
        if not self.recipe.combos.fused:
            return logits[self.step.newest]
        shares = self.fusion[list(logits)].softmax(dim=0)
        return torch.stack([share * answer for share, answer in zip(shares, logits.values(), strict=True)]).sum(dim=0)

    def _response(self, k: int, logits: Float[Tensor, "b c"], batch: Batch, helper: Float[Tensor, "b c"] | None) -> SumAndCount:
        rho, tau = self._between(self.recipe.resp.rho, k), self._between(self.recipe.resp.tau, k)
        target = batch[TARGET]
        taught = response.soften(batch[f"{TEACHER}.{LOGITS}"], tau)
        if helper is not None:
            agrees = helper.argmax(dim=1) == target.argmax(dim=1)
            beta = torch.where(agrees, self.recipe.cascade.assistant_beta, 0.0)[:, None]
            taught = (1 - beta) * taught + beta * response.soften(helper, tau)
        return response.response(logits, target, taught, response.Mix(rho, tau), batch[WEIGHT], batch[TRUST][:, 0])

    def _between(self, ends: tuple[float, float], k: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * (k / (len(self.names) - 1) if len(self.names) > 1 else 1.0)

    @torch.no_grad()
    def _helper(self, batch: Batch) -> Float[Tensor, "b c"] | None:
        """What the student answered at the end of the phase before, all of its exits fused."""
        if not self._assisted(self.step) or self.assistant is None:
            return None
        before = self.steps[self.steps.index(self.step) - 1]
        maps, _ = self.assistant["student"].stages(batch[FRAMES], self.names, num_stages=before.newest + 1)  # type: ignore[operator]
        exits = self.assistant["exits"]
        logits = {k: exits[k](maps[k], batch[WEIGHT]) for k in before.exits}  # type: ignore[index]
        return self._fused(logits) if self.recipe.combos.fused else logits[before.newest]

    def _assisted(self, step: Step) -> bool:
        return self.recipe.cascade.assistant_beta > 0 and not step.warmup and not step.joint and step.newest > 0

    def _weights(self) -> Float[Tensor, " n"]:
        """What the losses of each substage count in this phase."""
        if self.uncertainty is not None and self.step.joint:
            return torch.exp(-self.uncertainty)
        equal = torch.ones_like(self.fusion.detach())
        if self.step.warmup:
            return equal
        known = self.knowledge is not None and self.recipe.harmonise.form == "fd_ratio"
        weights = self.knowledge.harmoniser.weights() if known and self.knowledge is not None else equal
        if not self.step.joint:
            weights = EARLIER * weights
            weights[self.step.newest] = 1
        return weights

    def _rates(self, step: Step) -> dict[str, float]:
        """Scales of the learning rates: all of what the phase adds, a part of what earlier ones added; the rest is frozen."""
        cascade, rates = self.recipe.cascade, dict[str, float]()
        parts, last = parts_of(self.student, self.names), len(self.names) - 1
        for k, names in enumerate(parts):
            whole = step.joint or step.warmup or k == step.newest
            if k > step.newest or (cascade.freeze and not whole):
                continue
            scale = 1.0 if whole else cascade.lower_lr
            rates |= {f"student.{name}": scale for name in names if name.startswith(HEADS) <= (last in step.exits)}
            if k < last and k in step.exits:
                rates |= {f"exits.{k}.{name}": scale for name, _ in self.exits[k].named_parameters()}
            if self.knowledge is not None and not step.warmup and k in step.exits:
                rates |= {f"knowledge.{name}": scale for name in self.knowledge.adapters_of(k, step.newest)}
        if step.joint and self.recipe.combos.fused and len(step.exits) > 1:
            rates["fusion"] = 1.0
        if step.joint and self.uncertainty is not None:
            rates["uncertainty"] = 1.0
        return rates

    def _taught(self, batch: Batch) -> list[Tensor]:
        found: list[Tensor] = []
        while (name := f"{TEACHER}.stage{len(found) + 1}") in batch:
            found.append(batch[name])
        return found

    @torch.no_grad()
    def _note(self, logits: Mapping[int, Tensor], batch: Batch) -> None:
        counted = batch[WEIGHT] * (batch[LABEL] >= 0)
        for k, answer in logits.items():
            right = ((answer.argmax(dim=1) == batch[LABEL]) * counted).sum()
            now = torch.stack([right, counted.sum()]).float()
            self._noted[f"accuracy/{k + 1}"] = self._noted.get(f"accuracy/{k + 1}", torch.zeros_like(now)) + now
