"""A live teacher says what a teacher says, of the student's frames, and lets gradients through; nothing else knows that it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import TinyMaps
from small import exported_student
from torch import Tensor, nn

from vkd.errors import ConfigError
from vkd.live_teacher import Chain, LiveTeacher
from vkd.models import ModelSpec, build
from vkd.students import STUDENTS
from vkd.students.base import Student
from vkd.teachers.base import Teacher
from vkd.teachers.efficientnet_lite import EfficientNetLiteTeacher
from vkd.teachers.student import StudentTeacher

OPTIONS = {"num_frames": 4, "size_px": 32}


def student(name: str = "tiny_r3d", **options: Any) -> Student:
    built: Student = build(ModelSpec(name=name, options=OPTIONS | options), STUDENTS, "student", heads={"logits": 10})
    return built


def live(path: str, **options: Any) -> LiveTeacher:
    return LiveTeacher(ModelSpec(name="student", options={"path": path} | options), student())


def frames_of(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Residual(StudentTeacher):
    """Adds what the first stage gives to its answer: its stages are no chain."""

    def logits_from(self, frames: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        taken: list[Tensor] = []
        hook = self.module.get_submodule("layer1").register_forward_hook(lambda module, inputs, output: taken.append(output))
        try:
            return super().logits_from(frames, outputs) + taken[0].mean()
        finally:
            hook.remove()


class NoWayIn(TinyMaps):
    """Gives maps, and takes none."""

    logits_from = Teacher.logits_from


class SeesFrames(StudentTeacher):
    """Adds how bright the frames are."""

    def logits_from(self, frames: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        return super().logits_from(frames, outputs) + frames.float().mean()


def test_its_maps_are_the_teachers(tmp_path: Path) -> None:
    path = exported_student(tmp_path / "t", name="tiny_r3d")
    found, teacher, frames = live(path), StudentTeacher(path), frames_of(3)
    teacher.load("cpu")
    with torch.autocast("cpu", torch.bfloat16):  # of the student; a teacher that declares fp32 is fp32
        torch.testing.assert_close(found.maps(frames), teacher.maps(frames), rtol=1e-2, atol=1e-2)
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in found.maps(frames))
    assert found.shapes == [tuple(x.shape[1:]) for x in teacher.maps(frames)]
    torch.testing.assert_close(live(path, substages=["layer2"]).maps(frames), teacher.maps(frames)[1:2])
    assert live(path, precision="bf16").maps(frames)[0].dtype == torch.bfloat16


def test_the_students_random_numbers_stay_its_own(tmp_path: Path) -> None:
    path = exported_student(tmp_path / "t", name="tiny_r3d")
    learner, before = student(), torch.get_rng_state()
    found = LiveTeacher(ModelSpec(name="student", options={"path": path}), learner)
    assert torch.get_rng_state().equal(before)
    assert not torch.backends.cudnn.allow_tf32
    assert not isinstance(found, nn.Module)
    assert not any(module.training for module in found.teacher.module.modules())
    assert not any(p.requires_grad for p in found.teacher.module.parameters())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_frames": 2}, r"num_frames 4 \(the student: 2\).*set recipe\.student\.num_frames=4 "),
        ({"num_frames": 8, "size_px": 64}, r"recipe\.student\.num_frames=4, recipe\.student\.size_px=32"),
    ],
)
def test_another_sampling_is_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    path = exported_student(tmp_path / "t", name="tiny_r3d")
    with pytest.raises(ConfigError, match=told):
        LiveTeacher(ModelSpec(name="student", options={"path": path}), student(**options))


def test_a_teacher_that_resizes_otherwise_is_refused_unless_told() -> None:
    spec, learner = {"name": "efficientnet_lite", "num_frames": 2}, student("shift_cnn", num_frames=2, size_px=224)
    with pytest.raises(ConfigError, match=r"resize bicubic \(the student: bilinear\).*recipe\.teacher\.resize=bilinear"):
        LiveTeacher(ModelSpec.model_validate(spec), learner)
    chain = Chain(LiveTeacher(ModelSpec.model_validate(spec | {"resize": "bilinear"}), learner))
    assert isinstance(chain.live.teacher, EfficientNetLiteTeacher)
    goes_on(chain, chain.live.probe().repeat(2, 1, 1, 1, 1), stages=[1])


@pytest.mark.parametrize("name", ["tiny_r3d", "tiny_vit", "shift_cnn"])
def test_a_chain_goes_on_from_a_map(tmp_path: Path, name: str) -> None:
    chain = Chain(live(exported_student(tmp_path / "t", name=name)))
    goes_on(chain, frames_of(3), range(len(chain.names)))


def goes_on(chain: Chain, frames: Tensor, stages: Sequence[int]) -> None:
    """From its own map the teacher gives its own logits; the gradient reaches the map, and no parameter."""
    with torch.no_grad():
        expected = chain.live.teacher.logits_from(frames, {})
    for stage in stages:
        x = chain.live.maps(frames)[stage].clone().requires_grad_()
        logits = chain.logits(stage, x, torch.zeros_like(frames))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        logits.square().sum().backward()
        assert x.grad is not None
        assert x.grad.flatten(1).any(dim=1).all()
    assert all(p.grad is None for p in chain.live.teacher.module.parameters())
    assert all("forward" not in vars(module) for module in chain.live.teacher.module.modules())


@pytest.mark.parametrize("kind", [Residual, SeesFrames])
def test_what_is_no_chain_is_refused(tmp_path: Path, kind: type[Teacher]) -> None:
    path = exported_student(tmp_path / "t", name="tiny_r3d")
    found = LiveTeacher(ModelSpec(name=f"{__name__}:{kind.__name__}", options={"path": path}), student())
    with pytest.raises(ConfigError, match=r"does not depend on that part alone.*combos\.stitch: false"):
        Chain(found)


def test_a_teacher_without_a_way_in_is_refused() -> None:
    learner = student("shift_cnn", num_frames=2, size_px=16)
    with pytest.raises(ConfigError, match=r"NoWayIn cannot go on .*combos\.stitch: false"):
        Chain(LiveTeacher(ModelSpec(name=f"{__name__}:NoWayIn"), learner))
    with pytest.raises(ConfigError, match="TinyTeacher gives no maps"):
        LiveTeacher(ModelSpec(name="fakes:TinyTeacher"), learner)


def test_a_student_without_logits_is_refused(tmp_path: Path) -> None:
    path = exported_student(tmp_path / "t", name="tiny_r3d", heads={"embedding": 16})
    with pytest.raises(ConfigError, match="answers no 'logits'"):
        Chain(live(path))
