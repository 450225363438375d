"""How close a student's outputs are to its teacher's, on the same rows; arrays or CPU tensors."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Array = np.ndarray | Tensor


def top1_agreement(student_logits: Float[Array, "n c"], teacher_logits: Float[Array, "n c"]) -> float:
    """Fraction of rows in which both rank the same class first."""
    student, teacher = _float64(student_logits), _float64(teacher_logits)
    return float((student.argmax(dim=1) == teacher.argmax(dim=1)).double().mean())


def mean_cosine(a: Float[Array, "n d"], b: Float[Array, "n d"]) -> float:
    """Mean cosine of the angle between rows, in [-1, 1]; 0 where either row is zero."""
    return float(F.cosine_similarity(_float64(a), _float64(b), dim=1).mean())


def mean_kl(student_logits: Float[Array, "n c"], teacher_logits: Float[Array, "n c"]) -> float:
    """Mean KL(teacher || student) in nats, at temperature 1."""
    log_student = F.log_softmax(_float64(student_logits), dim=1)
    log_teacher = F.log_softmax(_float64(teacher_logits), dim=1)
    return float(F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True))


def _float64(x: Float[Array, "n d"]) -> Float[Tensor, "n d"]:
    """Rows in double precision. Raises ValueError when there are none."""
    if len(x) == 0:
        raise ValueError("no rows to compare: the split that is evaluated is empty")
    return torch.as_tensor(x).detach().double()
