"""The coarse student: golden values, padding, order of frames."""

from __future__ import annotations

import hashed
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vkd.metrics.cost import num_parameters
from vkd.regions import collate
from vkd.students.coarse import CoarseStudent, load_reference

LAYER, NORM = "transformer.layers.0.", "transformer.norm."
SHAPES = hashed.ATTENTION | {
    f"{LAYER}self_attn.in_proj_weight": (1536, 512),
    f"{LAYER}self_attn.in_proj_bias": (1536,),
    f"{LAYER}self_attn.out_proj.weight": (512, 512),
    f"{LAYER}self_attn.out_proj.bias": (512,),
    f"{LAYER}linear1.weight": (2048, 512),
    f"{LAYER}linear1.bias": (2048,),
    f"{LAYER}linear2.weight": (512, 2048),
    f"{LAYER}linear2.bias": (512,),
    f"{LAYER}norm1.weight": (512,),
    f"{LAYER}norm1.bias": (512,),
    f"{LAYER}norm2.weight": (512,),
    f"{LAYER}norm2.bias": (512,),
    f"{NORM}weight": (512,),
    f"{NORM}bias": (512,),
    "netvlad.centroids": (64, 512),
    "netvlad.conv.weight": (64, 512, 1, 1),
    "netvlad.reduction_layer.weight": (1024, 32768),
    "netvlad.norm.weight": (1024,),
    "netvlad.norm.bias": (1024,),
}


def small() -> CoarseStudent:
    """With drawn weights where it starts with none."""
    torch.manual_seed(0)
    student = CoarseStudent(num_dims=16, size="small").eval()
    for parameter in student.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return student


def videos(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, 9, 16, generator=generator) for length in lengths]


@torch.no_grad()
def test_golden_values() -> None:
    student = load_reference(hashed.parameters(SHAPES)).eval()
    query, target = student.index(hashed.query()[None])[0], student.index(hashed.target()[None])[0]
    assert query[:4].tolist() == pytest.approx([-0.01025079, 0.02403045, 0.08684780, -0.02203791], abs=1e-8)
    assert (query @ target).item() == pytest.approx(0.99250804, abs=1e-8)


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        assert num_parameters(CoarseStudent()) == 37_038_592


@pytest.mark.parametrize("grad", [True, False])  # without a gradient torch takes another path through the transformer
def test_padding_does_not_matter(grad: bool) -> None:
    student, clips = small(), videos(5, 9, 1)
    with torch.set_grad_enabled(grad):
        together = student.index(*collate(clips))
        for clip, row in zip(clips, together, strict=True):
            torch.testing.assert_close(student.index(clip[None])[0], row, rtol=0, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_it_starts_near_the_cosine_of_mean_features() -> None:
    torch.manual_seed(0)
    student = CoarseStudent(num_dims=16, size="small").eval()
    clips = torch.randn(40, 1, 1, 16) + 0.3 * torch.randn(40, 6, 9, 16)
    vectors, means = student.index(clips), F.normalize(F.normalize(clips.sum(2), dim=2).mean(1), dim=1)
    rows, columns = torch.triu_indices(40, 40, 1)
    found, expected = (vectors @ vectors.T)[rows, columns], (means @ means.T)[rows, columns] / 2 + 0.5
    assert (found - expected).abs().mean() < 0.05


def test_the_order_of_frames_does_not_matter() -> None:
    student, (clip,) = small(), videos(7)
    torch.testing.assert_close(student.index(clip[None]), student.index(clip.flip(0)[None]), rtol=0, atol=1e-6)


def test_an_empty_video_is_finite() -> None:
    student, (regions, mask) = small().train(), collate(videos(4, 4))
    mask[1] = False
    found = student.index(regions, mask)
    F.mse_loss(found[0], torch.zeros(256)).backward()
    assert found.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    assert [name for name, p in student.named_parameters() if not p.grad.abs().sum() > 0] == []
