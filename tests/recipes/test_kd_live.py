"""Baselines beside a live teacher: each learns, the teacher stays what it was, and no checkpoint knows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import exported_student
from torch import nn

from vkd import checkpoint
from vkd.checkpoint import Position
from vkd.errors import ConfigError
from vkd.live_teacher import LiveTeacher
from vkd.losses import relation
from vkd.phases import parameter_groups, set_trainable
from vkd.recipes.base import Batch, Emits, Phase
from vkd.recipes.kd import KD, KDDistiller, KDWeights
from vkd.recipes.kd.hints import HINTS
from vkd.schema import TensorType

EMITS: Emits = {"teacher": {"logits": TensorType("float32", (10,)), "embedding": TensorType("float32", (16,))}}
SMALL = {"name": "tiny_r3d", "num_frames": 4, "size_px": 32, "widths": [6, 8, 12, 16]}
ON_EMBEDDINGS = ("cc", "rkd", "pkt")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported_student(tmp_path_factory.mktemp("teacher"), seed=5, name="tiny_r3d")


def distiller(path: str, seed: int = 0, **fields: Any) -> KDDistiller:
    torch.manual_seed(seed)
    tree = {"name": "kd", "teacher": {"name": "student", "path": path}, "student": SMALL, "live": True} | fields
    return KD.model_validate(tree).distiller(EMITS, 0)


def batch(teacher: LiveTeacher, count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    frames = (frames * torch.linspace(0.2, 1, count)[:, None, None, None, None]).to(torch.uint8)
    answers = teacher.teacher({"frames": frames.numpy()})
    return {
        "frames": frames,
        "teacher.logits": torch.from_numpy(answers["logits"]),
        "teacher.embedding": torch.from_numpy(answers["embedding"]),
        "label": torch.full((count,), -1),
        "weight": torch.ones(count),
    }


def train(module: KDDistiller, optimizer: torch.optim.Optimizer, data: Batch, num_steps: int) -> list[dict[str, float]]:
    """The mean of each loss, step by step."""
    history = []
    for _ in range(num_steps):
        losses = {name: total / count for name, (total, count) in module(data).items()}
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return history


@pytest.mark.parametrize("name", [*HINTS, *ON_EMBEDDINGS])
def test_each_learns(path: str, name: str) -> None:
    weights = {"cosine": 0.0, name: 1.0} | ({"kl": 0.01} if name in HINTS else {"kl": 0.0})
    module = distiller(path, weights=weights, live=name in HINTS)
    data = batch(module.frozen or distiller(path, weights={"at": 1}).frozen or pytest.fail())
    history = train(module, torch.optim.AdamW(module.parameters(), lr=3e-3), data, 20)
    assert history[-1][name] < 0.97 * history[0][name], history
    assert [key for key, p in module.named_parameters() if p.grad is None] == []


def test_every_parameter_of_all_of_them_together_learns(path: str) -> None:
    module = distiller(path, weights=dict.fromkeys([*HINTS, *ON_EMBEDDINGS], 1.0))
    assert module.frozen is not None
    train(module, torch.optim.SGD(module.parameters(), lr=1e-3), batch(module.frozen), 1)
    assert [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_rkd_is_distances_and_twice_angles(path: str) -> None:
    module = distiller(path, weights={"kl": 0, "cosine": 0, "rkd": 25, "at": 1})
    assert module.frozen is not None
    data = batch(module.frozen)
    student, teacher, weight = module.student(data["frames"])["embedding"], data["teacher.embedding"], data["weight"]
    distance, angle = (loss(student, teacher, weight)[0] for loss in (relation.rkd_distance, relation.rkd_angle))
    torch.testing.assert_close(module(data)["rkd"][0], 25 * distance + 50 * angle)


def test_stagewise_adapts_only_other_channels(path: str) -> None:
    same = distiller(path, weights={"stagewise": 1}, student=SMALL | {"widths": [10, 8, 40, 80]})
    kinds = [type(same.hints.adapters[f"stagewise-{k}"]) for k in range(4)]
    assert kinds == [nn.Identity, nn.Conv3d, nn.Identity, nn.Identity]


def test_stages_may_be_fewer_than_the_teachers(path: str) -> None:
    module = distiller(path, weights=dict.fromkeys(HINTS, 1.0), substages=["layer2", "layer4"])
    assert module.hints.partner == [1, 3]
    assert module.frozen is not None
    data = batch(module.frozen)
    assert all(total.isfinite() for total, _ in module(data).values())
    data["weight"][3:] = 0
    kept = module(data)
    data["frames"][3:] = 255  # rows of weight 0 count nothing
    assert all(torch.allclose(kept[name][0], total) for name, (total, _) in module(data).items() if name != "semckd")
    assert {count.item() for _, count in kept.values()} == {3}


def test_the_teacher_is_frozen_and_no_checkpoint_knows_it(path: str, tmp_path: Path) -> None:
    module, data = trainable(path, seed=0)
    assert module.frozen is not None
    before = {name: x.clone() for name, x in module.frozen.teacher.module.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.05, Phase("all", 1)), lr=1e-3)
    train(module, optimizer, data, 2)
    checkpoint.save(str(tmp_path), 2, checkpoint.snapshot(Position(step=2), module, optimizer))
    told = train(module, optimizer, data, 2)
    assert all(x.equal(before[name]) for name, x in module.frozen.teacher.module.state_dict().items())
    assert not any(each.training for each in module.frozen.teacher.module.modules())
    theirs = {id(p) for p in module.frozen.teacher.module.parameters()}
    assert not any(id(p) in theirs for group in optimizer.param_groups for p in group["params"])
    assert {name.partition(".")[0] for name in module.state_dict()} == {"student", "hints"}
    other, _ = trainable(path, seed=9)
    again = torch.optim.AdamW(parameter_groups(other, 0.05, Phase("all", 1)), lr=1e-3)
    assert checkpoint.restore(f"{tmp_path}/step-000000002", other, again).step == 2
    assert train(other, again, data, 2) == told


def trainable(path: str, seed: int) -> tuple[KDDistiller, Batch]:
    module = distiller(path, seed, weights=dict.fromkeys(HINTS, 1.0))
    set_trainable(module, Phase("all", 1))
    assert module.frozen is not None
    return module, batch(module.frozen)


def test_the_student_begins_as_without_a_live_teacher(path: str) -> None:
    with_maps, without = distiller(path, weights={"semckd": 1}), distiller(path, live=False)
    assert without.frozen is None
    assert all(x.equal(with_maps.student.state_dict()[name]) for name, x in without.student.state_dict().items())


@pytest.mark.parametrize("name", HINTS)
def test_maps_are_refused_offline(path: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.weights\.{name}.*full maps are in no label.*set recipe\.live: true"):
        distiller(path, weights={name: 1.0}, live=False)


def test_what_cannot_be_compared_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="maps alone teach the student no answer"):
        distiller(path, weights={"kl": 0, "cosine": 0, "fitnet": 1})
    with pytest.raises(ConfigError, match="has no part 'layer5'"):
        distiller(path, weights={"at": 1}, substages=["layer5"])
    with pytest.raises(ConfigError, match="TinyTeacher gives no maps"):
        distiller(path, weights={"at": 1}, teacher={"name": "fakes:TinyTeacher", "num_frames": 4, "size_px": 32})


def test_names_of_weights_are_known() -> None:
    assert set(KDWeights.model_fields) >= {*HINTS, *ON_EMBEDDINGS}
