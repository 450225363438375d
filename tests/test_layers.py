"""Blocks against slow loops and closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vkd.clips import Sampling
from vkd.layers import EncoderBlock, ShiftBlock, check_clips, group_norm, num_groups, temporal_shift


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_temporal_shift_equals_a_loop(num_frames: int) -> None:
    x = torch.randn(2, num_frames, 16, 3, 3)
    expected = torch.zeros_like(x)
    for t in range(num_frames):
        if t > 0:
            expected[:, t, :2] = x[:, t - 1, :2]
        if t < num_frames - 1:
            expected[:, t, 2:4] = x[:, t + 1, 2:4]
        expected[:, t, 4:] = x[:, t, 4:]
    assert torch.equal(temporal_shift(x), expected)


def test_temporal_shift_leaves_fewer_than_eight_channels() -> None:
    x = torch.randn(1, 3, 7, 2, 2)
    assert torch.equal(temporal_shift(x), x)


@given(st.integers(1, 300), st.integers(1, 32))
def test_groups_divide(num_channels: int, max_groups: int) -> None:
    found = num_groups(num_channels, max_groups)
    assert num_channels % found == 0
    assert found <= max_groups
    assert group_norm(num_channels).num_groups == num_groups(num_channels)


@pytest.mark.parametrize(("num_out", "stride", "size_px"), [(8, 1, 6), (16, 1, 6), (16, 2, 3)])
def test_shift_block_shapes(num_out: int, stride: int, size_px: int) -> None:
    assert ShiftBlock(8, num_out, stride)(torch.randn(2, 3, 8, 6, 6)).shape == (2, 3, num_out, size_px, size_px)


def test_shift_block_sees_only_neighbouring_frames() -> None:
    block, x = ShiftBlock(8, 8), torch.randn(1, 5, 8, 4, 4)
    changed = x.clone()
    changed[:, 0] += 1
    differs = [not torch.allclose(a, b) for a, b in zip(block(x)[0], block(changed)[0], strict=True)]
    assert differs == [True, True, False, False, False]


def test_encoder_block_equals_torch() -> None:
    block = EncoderBlock(16, 4).eval()
    oracle = torch.nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    pairs = {
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "project.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
    }
    ours = block.state_dict()
    oracle.load_state_dict({a + end: ours[b + end] for a, b in pairs.items() for end in ("weight", "bias")})
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x), oracle(x))


def test_clips_of_another_sampling_are_refused() -> None:
    sampling = Sampling(num_frames=4, size_px=16)
    check_clips(torch.zeros(2, 4, 3, 16, 16), sampling)
    with pytest.raises(ValueError, match="8 frames of 16x16 px, the model takes 4 frames of 16x16"):
        check_clips(torch.zeros(2, 8, 3, 16, 16), sampling)
    with pytest.raises(ValueError, match="4 frames of 16x24 px"):
        check_clips(torch.zeros(2, 4, 3, 16, 24), sampling)
