"""What learns in the recipe `kd`: the student, and what single losses need beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vkd import gather
from vkd.live_teacher import LiveTeacher
from vkd.losses import distillation, relation
from vkd.losses.distillation import SumAndCount
from vkd.recipes.base import Batch, Distiller, Losses
from vkd.recipes.kd.hints import HINTS, Hints
from vkd.schema import FRAMES, LABEL, WEIGHT
from vkd.students.base import FEATURES, Student

TEACHER = "teacher"
LOGITS, EMBEDDING = "logits", "embedding"
CROSS_ENTROPY = "cross_entropy"
ON_EMBEDDINGS = ("cosine", "mse", "similarity", "cc", "rkd", "pkt")
LEARNS_FROM = {"kl": LOGITS} | dict.fromkeys(ON_EMBEDDINGS, EMBEDDING)  # loss -> the teacher's label


class KDDistiller(Distiller):
    """The student, a linear classifier on its features when it also learns from labels, and adapters of its maps.

    `weights` are those above 0; `frozen` is the teacher of losses between maps, and `substages` names the student's.
    """

    student: Student

    def __init__(
        self,
        student: Student,
        weights: Mapping[str, float],
        temperature: float,
        num_classes: int,
        frozen: LiveTeacher | None = None,
        substages: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.student, self.weights, self.temperature = student, weights, temperature
        self.frozen, self.substages = frozen, substages
        if CROSS_ENTROPY in self.weights:
            self.classifier = nn.Linear(student.num_features, num_classes)
        if frozen is not None:
            self.hints = Hints(weights.keys(), student.stage_channels(substages), [shape[0] for shape in frozen.shapes])

    def forward(self, batch: Batch) -> Losses:
        """The losses of weight > 0, each times its weight."""
        losses: Losses = {}
        if self.frozen is None:
            outputs = self.student(batch[FRAMES])
        else:
            maps, outputs = self.student.stages(batch[FRAMES], self.substages)
            taught = self.frozen.maps(batch[FRAMES])
            losses = {name: self.hints(name, maps, taught, batch[WEIGHT]) for name in self.weights if name in HINTS}
        losses |= {name: self._loss(name, outputs, batch) for name in self.weights if name not in HINTS}
        return {name: (self.weights[name] * total, count) for name, (total, count) in losses.items()}

    def _loss(self, name: str, outputs: Batch, batch: Batch) -> SumAndCount:
        weight = batch[WEIGHT]
        if name == CROSS_ENTROPY:
            return distillation.cross_entropy(self.classifier(outputs[FEATURES]), batch[LABEL], weight)
        student, teacher = outputs[LEARNS_FROM[name]], batch[f"{TEACHER}.{LEARNS_FROM[name]}"]
        if name == "kl":
            return distillation.kl(student, teacher, self.temperature, weight)
        if name in ("cosine", "mse"):
            return {"cosine": distillation.cosine, "mse": distillation.mse}[name](student, teacher, weight)
        if name == "rkd":
            distance, count = relation.rkd_distance(student, teacher, weight, gather.rows_over_ranks)
            angle, _ = relation.rkd_angle(student, teacher, weight, gather.rows_over_ranks)
            return distance + 2 * angle, count
        loss = {"similarity": distillation.similarity_preserving, "cc": relation.correlation_congruence, "pkt": relation.pkt}[name]
        return loss(student, teacher, weight, gather.rows_over_ranks)
