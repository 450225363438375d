"""The recipe `substage` in small: its distiller in any phase, and rows of what it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vkd.phases import set_trainable
from vkd.recipes.base import Batch, Emits
from vkd.recipes.substage import Substage
from vkd.recipes.substage.distiller import SubstageDistiller
from vkd.schema import TensorType

NUM_CLASSES, STAGES, NUM_ROWS = 3, (5, 7), 32
PHASES = ["warm-up", "substage 1", "substage 2", "substage 3", "joint"]
JOINT = PHASES.index("joint")
STUDENT = {"name": "tiny_r3d", "num_frames": 4, "size_px": 32, "widths": [4, 4, 6, 8]}
NAMES = ["layer2", "layer3", "layer4"]


def emits(stages: Sequence[int] = STAGES, num_classes: int = NUM_CLASSES) -> Emits:
    found = {f"stage{k}": TensorType("float32", (6, d)) for k, d in enumerate(stages, 1)}
    return {"teacher": {"logits": TensorType("float32", (num_classes,))} | found}


def recipe(**fields: Any) -> Substage:
    given = {"name": "substage", "teacher": "t", "student": STUDENT, "substages": NAMES, "cascade": {}} | fields
    epochs = {"warmup": 1, "per_stage": 1, "joint": 1}
    return Substage.model_validate(given | {"cascade": epochs | given["cascade"]})


def distiller(phase: int, stages: Sequence[int] = STAGES, **fields: Any) -> SubstageDistiller:
    """Untrained, at the beginning of one of PHASES."""
    torch.manual_seed(0)
    module = recipe(**fields).distiller(emits(stages), NUM_CLASSES)
    enter(module, phase)
    return module


def enter(module: SubstageDistiller, phase: int) -> None:
    """What a loop does when a phase begins, less the optimizer."""
    module.enter(phase)
    module.zero_grad()
    set_trainable(module, module.phases()[phase])
    module.begin()


def batch(num_rows: int = NUM_ROWS, seed: int = 3) -> Batch:
    """Clips of one colour each, under noise, and random labels; descriptors vary as much as they are large."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 200, (num_rows, 1, 1, 1, 3), generator=generator)
    frames = colours + torch.randint(0, 56, (num_rows, 4, 32, 32, 3), generator=generator)
    described = {f"teacher.stage{k}": torch.randn(num_rows, 6, d, generator=generator).abs() for k, d in enumerate(STAGES, 1)}
    return described | {
        "frames": frames.to(torch.uint8),
        "teacher.logits": 3 * torch.randn(num_rows, NUM_CLASSES, generator=generator),
        "refined.q": torch.randn(num_rows, NUM_CLASSES, generator=generator).softmax(dim=1),
        "refined.omega": torch.rand(num_rows, 1, generator=generator),
        "label": torch.arange(num_rows) % (NUM_CLASSES + 1) - 1,  # every fourth row has none
        "example": torch.arange(num_rows),
        "weight": torch.ones(num_rows),
    }


def means(module: SubstageDistiller, data: Batch) -> dict[str, float]:
    """Each loss as one number."""
    return {name: (total / count).item() for name, (total, count) in module(data).items() if count}
