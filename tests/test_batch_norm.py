"""BatchNorm over four ranks is torch's BatchNorm of the whole batch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vkd.layers import BatchNorm

WORLD_SIZE, NUM_CHANNELS, NUM_ROWS = 4, 3, 12
# rows of each rank; in the last, ranks without rows run one masked row of NaN
SPLITS = {"even": [3, 3, 3, 3], "ragged": [1, 5, 2, 4], "one rank is empty": [6, 0, 4, 2], "one rank has all": [0, 0, 12, 0]}
Found = dict[str, Tensor]


def whole() -> tuple[Tensor, Tensor]:
    """The batch, far from 0, and what the loss says of each output."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_ROWS, NUM_CHANNELS, 2, 3, 2)
    return 50 + torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def learned(norm: nn.Module, x: Tensor, gradient: Tensor, *weight: Tensor) -> Found:
    """Two steps of it: outputs, gradients and statistics."""
    found: Found = {}
    for step in range(2):
        x = (x.detach() * (1 + step)).requires_grad_()
        norm.zero_grad()
        y = norm(x, *weight)
        (y * gradient).sum().backward()
        assert x.grad is not None
        found |= {f"y/{step}": y.detach(), f"x.grad/{step}": x.grad}
    grads = {f"{name}.grad": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    statistics = {name: buffer.clone() for name, buffer in norm.named_buffers() if buffer.is_floating_point()}
    return found | grads | statistics


def expected() -> Found:
    return learned(nn.BatchNorm3d(NUM_CHANNELS), *whole())


def learn_on_a_rank(rank: int, folder: str) -> None:
    """What each of four processes does, once with no row and once with a masked one where it has none."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    found = {}
    for split, counts in SPLITS.items():
        for masked in (0, 1):
            mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            x, gradient = (part[mine] for part in whole())
            weight = torch.ones(len(x))
            if masked and not len(x):
                x, gradient, weight = torch.full((1, NUM_CHANNELS, 2, 3, 2), torch.nan), gradient.new_zeros(1, 1, 1, 1, 1), torch.zeros(1)
            found[f"{split}/{masked}"] = learned(BatchNorm(NUM_CHANNELS), x, gradient, weight)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-W", "error", __file__, folder], check=True, timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("split", SPLITS)
def test_four_ranks_normalise_as_one(of_ranks: list[dict[str, Found]], split: str, masked: int) -> None:
    parts, oracle = [found[f"{split}/{masked}"] for found in of_ranks], expected()
    for name, tensor in oracle.items():
        if name in ("running_mean", "running_var"):  # the same on every rank
            for part in parts:
                torch.testing.assert_close(part[name], tensor)
        elif name.startswith(("weight", "bias")):  # DistributedDataParallel adds them up
            torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(dim=0), tensor, rtol=1e-4, atol=1e-4)
        else:
            rows = [part[name] for part, count in zip(parts, SPLITS[split], strict=True) if count]
            torch.testing.assert_close(torch.cat(rows), tensor, rtol=1e-4, atol=1e-4)
            masked_rows = [part[name] for part, count in zip(parts, SPLITS[split], strict=True) if not count]
            assert all(rows.isfinite().all() for rows in masked_rows)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([(), (3,), (2, 2)]), st.booleans())
def test_alone_it_is_torchs(num_rows: int, num_channels: int, size: tuple[int, ...], training: bool) -> None:
    if num_rows == 1 and not size:
        num_rows = 2  # torch refuses one value a channel
    ours = BatchNorm(num_channels).train(training)
    oracle = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(size)](num_channels).train(training)
    x, gradient = torch.randn(num_rows, num_channels, *size), torch.randn(num_rows, num_channels, *size)
    found, theirs = learned(ours, x, gradient, torch.ones(num_rows)), learned(oracle, x, gradient)
    for name, tensor in theirs.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)


def test_masked_rows_change_nothing() -> None:
    x, gradient = whole()
    masked = torch.cat([x, torch.full((2, *x.shape[1:]), torch.nan)])
    weight = torch.cat([torch.full((NUM_ROWS,), 0.5), torch.zeros(2)])
    found = learned(BatchNorm(NUM_CHANNELS), masked, torch.cat([gradient, torch.zeros(2, *x.shape[1:])]), weight)
    for name, tensor in expected().items():
        torch.testing.assert_close(found[name][:NUM_ROWS], tensor, rtol=1e-4, atol=1e-4)
    assert not found["x.grad/0"][NUM_ROWS:].any()


def test_of_a_batch_without_rows_nothing_is_learned() -> None:
    norm = BatchNorm(NUM_CHANNELS)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    y = norm(torch.full((1, NUM_CHANNELS, 2), torch.nan), torch.zeros(1))
    assert not y.any()
    y.sum().backward()
    assert all(buffer.equal(before[name]) for name, buffer in norm.named_buffers())


def test_half_precision_is_summed_in_float32() -> None:
    x, _ = whole()
    with torch.autocast("cpu", torch.bfloat16):
        y = BatchNorm(NUM_CHANNELS)(x.bfloat16(), torch.ones(NUM_ROWS))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, nn.BatchNorm3d(NUM_CHANNELS)(x.bfloat16().float()), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")
    mp.start_processes(learn_on_a_rank, (sys.argv[1],), nprocs=WORLD_SIZE, start_method="fork")  # type: ignore[no-untyped-call, attr-defined]
