"""The baseline recipe: it learns, it counts, and it says what is wrong with a run file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from vkd.errors import ConfigError
from vkd.losses import distillation
from vkd.models import ModelSpec, find
from vkd.recipes import RECIPES
from vkd.recipes.base import Batch, Emits
from vkd.recipes.kd import KD, KDDistiller
from vkd.schema import TensorType

EMITS: Emits = {"teacher": {"logits": TensorType("float32", (10,)), "embedding": TensorType("float32", (16,))}}
STUDENT = {"name": "shift_cnn", "num_frames": 4, "size_px": 32}


def recipe(**fields: Any) -> KD:
    return KD.model_validate({"name": "kd", "teacher": "efficientnet_lite", "student": STUDENT} | fields)


def distiller(num_classes: int = 0, **fields: Any) -> KDDistiller:
    torch.manual_seed(0)
    return recipe(**fields).distiller(EMITS, num_classes)


def batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return {
        "frames": torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "teacher.logits": 3 * torch.randn(count, 10, generator=generator),
        "teacher.embedding": torch.randn(count, 16, generator=generator),
        "label": torch.arange(count) % 4,
        "weight": torch.ones(count),
    }


def test_registered() -> None:
    assert find(ModelSpec(name="kd"), RECIPES, "recipe") is KD


def test_overfits_eight_clips() -> None:
    module = distiller(4, weights={"mse": 1.0, "similarity": 1.0, "cross_entropy": 1.0})
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    data, history = batch(), []
    for _ in range(50):
        losses = {name: total / count for name, (total, count) in module(data).items()}
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    assert all(history[-1][name] < 0.1 * first for name, first in history[0].items()), (history[0], history[-1])


def test_losses_are_the_weighted_sums_of_what_the_student_says() -> None:
    module, data = distiller(weights={"kl": 2.0, "cosine": 0.5}, temperature=3.0), batch()
    data["weight"][5:] = 0
    outputs, losses = module.student(data["frames"]), module(data)
    assert set(losses) == {"kl", "cosine"}
    total, count = distillation.kl(outputs["logits"], data["teacher.logits"], 3.0, data["weight"])
    torch.testing.assert_close(losses["kl"], (2.0 * total, count))
    total, count = distillation.cosine(outputs["embedding"], data["teacher.embedding"], data["weight"])
    torch.testing.assert_close(losses["cosine"], (0.5 * total, count))
    assert losses["kl"][1].item() == 5


def test_only_losses_of_positive_weight_are_computed_and_needed() -> None:
    only_mse = {"kl": 0, "cosine": 0, "mse": 1}
    data = batch()
    del data["teacher.logits"], data["label"]
    assert set(distiller(weights=only_mse)(data)) == {"mse"}
    assert recipe(weights=only_mse).needs == ("teacher.embedding",)
    assert recipe().needs == ("teacher.embedding", "teacher.logits")
    assert recipe(weights={"kl": 0, "cosine": 0, "cross_entropy": 1}).needs == ()


@pytest.mark.parametrize("name", ["kl", "cosine", "mse", "similarity", "cross_entropy"])
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    module = distiller(4, weights={"kl": 0.0, "cosine": 0.0} | {name: 1.0})
    module(batch())[name][0].backward()
    assert [key for key, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = {key for key, p in module.named_parameters() if not p.requires_grad}
    assert all(key.startswith("student.heads.") for key in frozen)


def test_a_masked_batch_trains_nothing() -> None:
    module, data = distiller(4, weights={"mse": 1, "similarity": 1, "cross_entropy": 1}), batch(1)
    data["weight"] = torch.zeros(1)
    losses = module(data)
    assert {name: (total.item(), count.item()) for name, (total, count) in losses.items()} == dict.fromkeys(losses, (0.0, 0.0))
    torch.stack([total for total, _ in losses.values()]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_heads_are_the_teachers_one_dimensional_labels() -> None:
    extra = {"tokens": TensorType("float32", (None, 4)), "map": TensorType("float32", (2, 3)), "ragged": TensorType("float32", (None,))}
    module = recipe().distiller({"teacher": dict(EMITS["teacher"]) | extra}, 0)
    assert {name: head.out_features for name, head in module.student.heads.items()} == {"logits": 10, "embedding": 16}


def test_teachers() -> None:
    assert {alias: spec.name for alias, spec in recipe().teachers.items()} == {"teacher": "efficientnet_lite"}


def test_a_label_that_the_teacher_does_not_emit_is_named() -> None:
    emits: Emits = {"teacher": {"embedding": TensorType("float32", (16,)), "map": TensorType("float32", (2, 3))}}
    with pytest.raises(ConfigError, match=r"weights\.kl .*'logits'.*emits embedding \[16\], map \[2, 3\]"):
        recipe().distiller(emits, 0)
    with pytest.raises(ConfigError, match=r"weights\.mse .*'embedding'"):
        recipe(weights={"cosine": 0, "mse": 1}).distiller({"teacher": {"logits": TensorType("float32", (10,))}}, 0)


def test_cross_entropy_without_labels_says_how_to_get_them() -> None:
    with pytest.raises(ConfigError, match=r"the manifest has none.*column 'label'"):
        distiller(0, weights={"cross_entropy": 1.0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0}, "greater than 0"),
        ({"weights": {"kl": -1}}, "greater than or equal to 0"),
        ({"weights": {"kl": 0, "cosine": 0}}, "nothing would be learned"),
        ({"weights": {"ktl": 1}}, "Extra inputs"),
        ({"temprature": 1}, "Extra inputs"),
        ({"name": "dk"}, "Input should be 'kd'"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(**fields)
