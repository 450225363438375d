"""Substage distillation beside a live teacher: losses on full maps, and students that go on through the teacher's substages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import exported_student

from vkd import checkpoint
from vkd.checkpoint import Position
from vkd.errors import ConfigError
from vkd.losses import distillation
from vkd.phases import parameter_groups, set_trainable
from vkd.recipes.base import Batch, Emits
from vkd.recipes.substage import Substage
from vkd.recipes.substage.distiller import SubstageDistiller
from vkd.recipes.substage.live import LiveSubstageDistiller, MapKnowledge
from vkd.schema import TensorType

NUM_CLASSES, COUNT = 10, 12
STUDENT = {"name": "tiny_r3d", "num_frames": 4, "size_px": 32, "widths": [6, 8, 12, 16]}
FULL, STITCH = {"fd": {"form": "full"}}, {"combos": {"stitch": True}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return exported_student(tmp_path_factory.mktemp("teacher"), seed=5, name="tiny_r3d")


def distiller(path: str, seed: int = 0, **fields: Any) -> SubstageDistiller:
    torch.manual_seed(seed)
    teacher = {"name": "student", "path": path, "substages": True}
    tree: dict[str, Any] = {"name": "substage", "teacher": teacher, "student": STUDENT, "live": True}
    tree["cascade"] = {"warmup": 1, "per_stage": 1, "joint": 1}
    emits: Emits = {"teacher": {"logits": TensorType("float32", (NUM_CLASSES,))} | {f"stage{k}": STAGE for k in range(1, 5)}}
    return Substage.model_validate(tree | fields).distiller(emits, NUM_CLASSES)


STAGE = TensorType("float32", (6, 128))


def batch(module: SubstageDistiller) -> Batch:
    assert isinstance(module, LiveSubstageDistiller)
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (COUNT, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    frames = (frames * torch.linspace(0.2, 1, COUNT)[:, None, None, None, None]).to(torch.uint8)
    answers = module.frozen.teacher({"frames": frames.numpy()})
    labels = {f"teacher.{name}": torch.from_numpy(answers[name]) for name in ("logits", "stage1", "stage2", "stage3", "stage4")}
    refined = {"refined.q": labels["teacher.logits"].softmax(dim=1), "refined.omega": torch.ones(COUNT, 1)}
    return {"frames": frames, **labels, **refined, "label": torch.full((COUNT,), -1), "weight": torch.ones(COUNT)}


def step(module: SubstageDistiller, phase: int, optimizer: torch.optim.Optimizer | None, data: Batch) -> dict[str, float]:
    losses = {name: total / count for name, (total, count) in module(data).items()}
    module.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    if optimizer is not None:
        optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def enter(module: SubstageDistiller, phase: int) -> torch.optim.Optimizer:
    module.enter(phase)
    set_trainable(module, module.phases()[phase])
    module.begin()
    return torch.optim.AdamW(parameter_groups(module, 0.05, module.phases()[phase]), lr=3e-3)


@pytest.mark.parametrize(("fields", "key"), [(FULL, r"fd\.form"), (STITCH, r"combos\.stitch")])
def test_maps_are_refused_offline(path: str, fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.{key}.*full maps are in no label.*set recipe\.live: true"):
        distiller(path, **fields, live=False)
    assert type(distiller(path)) is SubstageDistiller


@pytest.mark.parametrize("correspondence", ["hard", "soft"])
def test_each_phase_trains_what_it_says(path: str, correspondence: str) -> None:
    module = distiller(path, **FULL, **STITCH, rel={"correspondence": correspondence})
    assert isinstance(module, LiveSubstageDistiller)
    data, before = batch(module), {name: x.clone() for name, x in module.frozen.teacher.module.state_dict().items()}
    stitched = {}
    for phase, part in enumerate(module.phases()):
        optimizer = enter(module, phase)
        told = step(module, phase, optimizer, data)
        assert all(value == value for value in told.values()), told
        stitched[part.name] = [name for name in told if name.startswith("stitch/")]
        assert [n for n, p in module.named_parameters() if (p.grad is not None) != (part.rate(n) > 0)] == [], part.name
        assert any(name.startswith("fd/") for name in told) == (part.name != "warm-up")
    one = {f"substage {k}": [f"stitch/{k}"] for k in (1, 2, 3)}
    assert stitched == {"warm-up": [], **one, "substage 4": [], "joint": ["stitch/1", "stitch/2", "stitch/3"]}
    assert all(x.equal(before[name]) for name, x in module.frozen.teacher.module.state_dict().items())
    assert all(p.grad is None for p in module.frozen.teacher.module.parameters())


@pytest.mark.parametrize("fields", [FULL, STITCH, {**FULL, "rel": {"sp": 0, "corr": 0, "pair": 0}}])
def test_it_learns(path: str, fields: dict[str, Any]) -> None:
    module = distiller(path, **fields, cascade={"warmup": 0, "per_stage": 0, "joint": 1}, harmonise={"form": "uniform"})
    data, optimizer = batch(module), enter(module, 0)
    told = [step(module, 0, optimizer, data) for _ in range(12)]
    names = [name for name in told[0] if name.startswith(("fd/", "stitch/"))]
    assert len(names) == (4 if fields is not STITCH else 4 + 3)
    assert all(told[-1][name] < 0.97 * told[0][name] for name in names if fields is not STITCH or name.startswith("stitch/")), (
        told[0],
        told[-1],
    )


def test_a_stitch_is_the_chain_of_both(path: str) -> None:
    module = distiller(path, **STITCH, cascade={"warmup": 0, "per_stage": 0, "joint": 1}, harmonise={"form": "uniform"})
    assert isinstance(module, LiveSubstageDistiller)
    data, student, network = batch(module), module.student, module.frozen.teacher.module
    enter(module, 0)
    x, _ = student.stages(data["frames"])
    stitch = module.stitches[1]
    for layer in (stitch.conv, network.layer3, network.layer4):
        x[1] = layer(x[1]) if layer is not stitch.conv else stitch.norm(layer(x[1]), data["weight"])
    logits = network.heads["logits"](x[1].mean(dim=(2, 3, 4)))
    tau = 8 + (4 - 8) / 3
    torch.testing.assert_close(module(data)["stitch/2"], distillation.kl(logits, data["teacher.logits"], tau, data["weight"]))


def test_no_checkpoint_knows_the_teacher(path: str, tmp_path: Any) -> None:
    module = distiller(path, **FULL, **STITCH)
    data = batch(module)
    optimizer = enter(module, 5)
    step(module, 5, optimizer, data)
    names = {name.partition(".")[0] for name in module.state_dict()}
    assert names == {"student", "exits", "fusion", "knowledge", "assistant", "stitches"}
    checkpoint.save(str(tmp_path), 1, checkpoint.snapshot(Position(step=1), module, optimizer))
    told = [step(module, 5, optimizer, data) for _ in range(2)]
    other = distiller(path, seed=9, **FULL, **STITCH)
    again = enter(other, 5)
    checkpoint.restore(f"{tmp_path}/step-000000001", other, again)
    assert [step(other, 5, again, data) for _ in range(2)] == told


def test_the_scale_of_maps_is_their_deviation_over_clips(path: str) -> None:
    module = distiller(path, **FULL)
    assert isinstance(module, LiveSubstageDistiller)
    assert isinstance(module.knowledge, MapKnowledge)
    data = batch(module)
    data["weight"][10:] = 0
    enter(module, 5)
    module(data)
    for j, x in enumerate(module.frozen.maps(data["frames"][:10])):
        expected = x.var(dim=0, correction=0).mean(dim=(1, 2, 3)).sqrt()
        torch.testing.assert_close(getattr(module.knowledge, f"map_scale{j}"), expected)
