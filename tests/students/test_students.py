"""The contract of every student."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from vkd.errors import ConfigError
from vkd.layers import group_norm
from vkd.metrics.cost import num_parameters
from vkd.models import ModelSpec, build, find
from vkd.schema import FRAMES
from vkd.students import STUDENTS
from vkd.students.base import FEATURES, Student, normalise
from vkd.students.tiny_r3d import Norm
from vkd.students.tiny_vit import tubelets

HEADS = {"logits": 11, "embedding": 7}
SHAPES = [(4, 32), (8, 16), (2, 64)]
OF_FRAMES = [name for name in STUDENTS if FRAMES in find(ModelSpec(name=name), STUDENTS, "student").needs]
SIZED = ["shift_cnn", "tiny_vit"]  # the others are sized by numbers
SUBSTAGES = {
    ("shift_cnn", "small"): ("blocks.0", "blocks.1", "blocks.2"),
    ("shift_cnn", "large"): ("blocks.0", "blocks.2", "blocks.5"),
    ("tiny_vit", "small"): ("blocks.0", "blocks.1", "blocks.2", "norm"),
    ("tiny_r3d", None): ("layer1", "layer2", "layer3", "layer4"),
}


def student(name: str, heads: dict[str, int] | None = None, **options: object) -> Student:
    torch.manual_seed(0)
    spec = ModelSpec(name=name, options={"num_frames": 4, "size_px": 32} | options)
    built: Student = build(spec, STUDENTS, "student", heads=HEADS if heads is None else heads)
    return built


def clips(count: int = 3, num_frames: int = 4, size_px: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, num_frames, size_px, size_px, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("num_frames", "size_px"), SHAPES)
@pytest.mark.parametrize("name", OF_FRAMES)
def test_output_shapes(name: str, num_frames: int, size_px: int) -> None:
    model = student(name, num_frames=num_frames, size_px=size_px)
    outputs = model(clips(3, num_frames, size_px))
    assert {label: tuple(x.shape) for label, x in outputs.items()} == {
        FEATURES: (3, model.num_features),
        "logits": (3, 11),
        "embedding": (3, 7),
    }
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in outputs.values())
    assert (model.sampling.num_frames, model.sampling.size_px) == (num_frames, size_px)


@pytest.mark.parametrize("name", OF_FRAMES)
def test_gradient_reaches_every_parameter(name: str) -> None:
    model = student(name)
    outputs = model(clips())
    (outputs["logits"].square().sum() + outputs["embedding"].square().sum()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OF_FRAMES)
def test_an_example_does_not_depend_on_its_neighbours(name: str, training: bool) -> None:
    model, frames = student(name).train(training), clips(4)
    together = model(frames)
    for i in range(4):
        alone = model(frames[i : i + 1])
        for label, x in alone.items():
            torch.testing.assert_close(x[0], together[label][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OF_FRAMES)
def test_the_order_of_frames_matters(name: str) -> None:
    model, frames = student(name), clips()
    assert not torch.allclose(model(frames)[FEATURES], model(frames.flip(1))[FEATURES], atol=1e-4)


@pytest.mark.parametrize("name", OF_FRAMES)
def test_deterministic(name: str) -> None:
    first, second = student(name), student(name)
    for label, x in first(clips()).items():
        assert torch.equal(x, first(clips())[label])
        assert torch.equal(x, second(clips())[label])


@pytest.mark.parametrize("name", OF_FRAMES)
def test_state_dict_round_trip(name: str) -> None:
    model, file = student(name), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = student(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for label, x in model(clips()).items():
        assert torch.equal(x, other(clips())[label])
    assert all(x.is_contiguous() for x in model.state_dict().values())  # safetensors refuses others


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        ("shift_cnn", "small", 0.31),
        ("shift_cnn", "medium", 1.06),
        ("shift_cnn", "large", 2.98),
        ("tiny_vit", "small", 0.88),
        ("tiny_vit", "medium", 1.90),
    ],
)
def test_number_of_parameters(name: str, size: str, millions: float) -> None:
    backbone = student(name, heads={}, size=size, num_frames=8, size_px=64)
    assert num_parameters(backbone) == pytest.approx(millions * 1e6, rel=0.1)
    with_heads = student(name, size=size, num_frames=8, size_px=64)
    assert num_parameters(with_heads) - num_parameters(backbone) == (backbone.num_features + 1) * 18


@pytest.mark.parametrize("name", OF_FRAMES)
def test_wrong_sizes_are_refused(name: str) -> None:
    model = student(name)
    with pytest.raises(ValueError, match="8 frames of 32x32 px, the model takes 4 frames of 32x32 px"):
        model(clips(1, 8, 32))
    with pytest.raises(ValueError, match="4 frames of 64x64 px"):
        model(clips(1, 4, 64))


@pytest.mark.parametrize("name", SIZED)
def test_unknown_sizes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="'huge'"):
        student(name, size="huge")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [4, 8, 16]}, "must be 4 numbers"),
        ({"widths": [0, 8, 16, 32]}, "at least 1"),
        ({"stem_stride": 3}, "stem_stride is 3"),
        ({"stem_stride": [2]}, "or .1 or 2, 1 or 2"),
    ],
)
def test_r3d_of_impossible_sizes_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        student("tiny_r3d", **options)


def test_number_of_r3d_parameters() -> None:
    assert num_parameters(student("tiny_r3d", heads={})) == 355_110
    small = student("tiny_r3d", heads={"logits": 12}, widths=[4, 8, 16, 32])
    assert num_parameters(small) == 58_092 + 33 * 12


@pytest.mark.parametrize("num_channels", [4, 8, 10])
def test_the_norm_of_r3d_is_groupnorm(num_channels: int) -> None:
    x = torch.randn(2, num_channels, 3, 5, 5).to(memory_format=torch.channels_last_3d).requires_grad_()
    ours, plain = Norm(num_channels), group_norm(num_channels)
    found, expected = ours(x), plain(x)
    assert torch.allclose(found, expected, atol=1e-5) and found.stride() == expected.stride()
    weight = torch.randn(found.shape)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), [x, *m.parameters()]) for y, m in ((found, ours), (expected, plain))), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("name", "size"), SUBSTAGES)
def test_substages_are_the_ends_of_stages(name: str, size: str | None) -> None:
    model = student(name, **({} if size is None else {"size": size}))
    assert model.substages == SUBSTAGES[name, size]
    maps, outputs = model.stages(clips())
    assert all(x.ndim == 5 and len(x) == 3 for x in maps)
    torch.testing.assert_close(maps[-1].mean(dim=(2, 3, 4)), outputs[FEATURES])
    for label, x in model(clips()).items():
        assert torch.equal(x, outputs[label])


@pytest.mark.parametrize(
    ("options", "num_frames", "size_px", "shapes"),
    [  # r3d_18 shrinks 16 frames of 112 px alike: torchvision
        ({}, 16, 112, [(10, 16, 56), (20, 8, 28), (40, 4, 14), (80, 2, 7)]),
        ({}, 8, 64, [(10, 8, 32), (20, 4, 16), (40, 2, 8), (80, 1, 4)]),
        ({"stem_stride": [2, 2]}, 8, 32, [(10, 4, 16), (20, 2, 8), (40, 1, 4), (80, 1, 2)]),
        ({"stem_stride": 1}, 1, 32, [(10, 1, 32), (20, 1, 16), (40, 1, 8), (80, 1, 4)]),
    ],
)
def test_r3d_maps(options: dict[str, object], num_frames: int, size_px: int, shapes: list[tuple[int, int, int]]) -> None:
    maps, _ = student("tiny_r3d", num_frames=num_frames, size_px=size_px, **options).stages(clips(1, num_frames, size_px))
    assert [tuple(x.shape[1:]) for x in maps] == [(c, t, s, s) for c, t, s in shapes]


@pytest.mark.parametrize("name", OF_FRAMES)
def test_an_early_stop_runs_no_later_part_and_leaves_no_gradient_there(name: str) -> None:
    model = student(name)
    ran: list[str] = []
    for part in model.substages:
        model.get_submodule(part).register_forward_pre_hook(lambda _module, _inputs, part=part: ran.append(part))
    maps, outputs = model.stages(clips(), num_stages=2)
    assert outputs is None
    assert ran == list(model.substages[:2])
    sum(x.square().sum() for x in maps).backward()
    assert all(p.grad is not None for p in model.get_submodule(model.substages[1]).parameters())
    assert not any(p.grad is not None for part in model.substages[2:] for p in model.get_submodule(part).parameters())


@pytest.mark.parametrize("name", OF_FRAMES)
def test_a_part_after_pooling_is_no_substage(name: str) -> None:
    with pytest.raises(ConfigError, match=r"substages: an output of shape \[3, 11\] is no map"):
        student(name).stages(clips(), ["heads.logits"])
    with pytest.raises(ConfigError, match="has no part 'layer9'"):
        student(name).stages(clips(), ["layer9"])


def test_maps_of_parts_that_see_frames_one_by_one() -> None:
    model = student("shift_cnn")
    (stem, block), _ = model.stages(clips(), ["stem", "blocks.0"])
    assert stem.shape == block.shape == (3, 32, 4, 8, 8)
    torch.testing.assert_close(model.blocks[0](stem.transpose(1, 2)).transpose(1, 2), block)


def test_the_map_of_tokens_lies_as_the_clip_does() -> None:
    model = student("tiny_vit")
    (tokens,), _ = model.stages(clips(), ["embed"])
    first = model.embed(normalise(clips())[:, 2:, :, 8:16, 16:24].flatten(1))  # second time, second row, third column
    torch.testing.assert_close(tokens[:, :, 1, 1, 2], first)


def test_tubelets_must_divide_the_clip() -> None:
    with pytest.raises(ConfigError, match="num_frames 3 must be a multiple of 2 and size_px 32 of 8"):
        student("tiny_vit", num_frames=3)


def test_tubelets_equal_a_loop() -> None:
    x = torch.randn(2, 4, 3, 24, 24)
    expected = [x[:, t : t + 2, :, i : i + 8, j : j + 8].flatten(1) for t in (0, 2) for i in (0, 8, 16) for j in (0, 8, 16)]
    assert torch.equal(tubelets(x), torch.stack(expected, dim=1))
