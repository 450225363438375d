"""Sums and gathers over ranks: four ranks that see parts of a batch learn what one rank learns from all of it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import staged
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vkd import gather
from vkd.phases import set_trainable
from vkd.recipes import RECIPES
from vkd.recipes.base import Batch, Distiller, Emits
from vkd.recipes.dns import DnS
from vkd.recipes.kd import KD, KDWeights
from vkd.recipes.kd.hints import HINTS
from vkd.recipes.substage import Substage
from vkd.schema import TensorType

EMITS: Emits = {"teacher": {"logits": TensorType("float32", (10,)), "embedding": TensorType("float32", (16,))}}
NUM_ROWS, WORLD_SIZE = 32, 4
LOSSES = list(KDWeights.model_fields)
ROWS_OF_RANKS = {"even": [8, 8, 8, 8], "ragged": [1, 13, 7, 11], "one rank is empty": [16, 0, 9, 7], "one rank has all": [0, 0, 32, 0]}
Learned = dict[str, Tensor]  # gradient by parameter, and `loss/<name>` for each mean


class Case(NamedTuple):
    """A recipe's distiller, the same on every call, and NUM_ROWS rows of what it learns from."""

    distiller: Callable[[], Distiller]
    batch: Callable[[], Batch]


def distiller(names: list[str]) -> Distiller:
    torch.manual_seed(0)
    student = {"name": "shift_cnn", "num_frames": 2, "size_px": 16}
    weights = dict.fromkeys(KDWeights.model_fields, 0.0) | {"kl": float(set(names) <= set(HINTS))} | dict.fromkeys(names, 1.5)
    tree = {"name": "kd", "teacher": "fakes:TinyMaps", "student": student, "weights": weights, "live": True}
    return KD.model_validate(tree).distiller(EMITS, 4)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    return {
        "frames": torch.randint(0, 256, (NUM_ROWS, 2, 16, 16, 3), dtype=torch.uint8, generator=generator),
        "teacher.logits": 3 * torch.randn(NUM_ROWS, 10, generator=generator),
        "teacher.embedding": torch.randn(NUM_ROWS, 16, generator=generator),
        "label": torch.arange(NUM_ROWS) % 5 - 1,  # every fifth row has none
        "weight": torch.ones(NUM_ROWS),
    }


def live_substage() -> Distiller:
    """All substages at once, on full maps of a live teacher and stitched to it: with a BatchNorm."""
    torch.manual_seed(0)
    tree = {"name": "substage", "teacher": "fakes:TinyMaps", "live": True, "fd": {"form": "full"}, "combos": {"stitch": True}}
    student = {"name": "shift_cnn", "num_frames": 2, "size_px": 16}
    cascade = {"warmup": 0, "per_stage": 0, "joint": 1}
    emits: Emits = {"teacher": {"logits": TensorType("float32", (5,))} | {f"stage{k}": TensorType("float32", (6, 4)) for k in (1, 2)}}
    module = Substage.model_validate(tree | {"student": student, "cascade": cascade}).distiller(emits, 5)
    set_trainable(module, module.phases()[0])
    module.begin()
    return module


def live_batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    labels = {f"teacher.stage{k}": torch.randn(NUM_ROWS, 6, 4, generator=generator) for k in (1, 2)}
    labels["teacher.logits"] = 3 * torch.randn(NUM_ROWS, 5, generator=generator)
    refined = {"refined.q": labels["teacher.logits"].softmax(dim=1), "refined.omega": torch.rand(NUM_ROWS, 1, generator=generator)}
    return batch() | labels | refined


def similarity(student: dict[str, Any], **teachers: Any) -> Distiller:
    """Without dropout, which draws other numbers on each rank."""
    torch.manual_seed(0)
    recipe = DnS.model_validate({"name": "dns", "student": {"num_dims": 16, "size": "small", **student}, **teachers})
    module = recipe.distiller({}, 0)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module


def triplets_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    regions = F.normalize(torch.randn(NUM_ROWS, 3, 8, 2, 16, generator=generator), dim=4)
    lengths = torch.randint(4, 9, (NUM_ROWS, 3), generator=generator)
    mask = torch.arange(8) < lengths[:, :, None]
    scores = {f"{alias}.scores": 2 * torch.rand(NUM_ROWS, 2, generator=generator) - 1 for alias in ("teacher", "coarse")}
    there = (torch.rand(NUM_ROWS, 2, generator=generator) < 0.8).float()
    batch = {"regions": regions * mask[..., None, None], "mask": mask, "pair_weight": there}
    return batch | scores | {"weight": torch.ones(NUM_ROWS)}


PAIR_SCORES = {"name": "pair_scores", "store": "x", "kind": "mean"}
TEACHER, COARSE = {"teacher": PAIR_SCORES}, {"coarse": PAIR_SCORES}
CASES = {
    "dns/copies": Case(partial(similarity, {"name": "visil"}), triplets_batch),
    "dns/attention": Case(partial(similarity, {"name": "fine"}, **TEACHER), triplets_batch),
    "dns/coarse": Case(partial(similarity, {"name": "coarse"}, **TEACHER), triplets_batch),
    "dns/selector": Case(partial(similarity, {"name": "selector"}, **TEACHER, **COARSE), triplets_batch),
}
CASES |= {f"kd/{name}": Case(partial(distiller, [name]), batch) for name in LOSSES}
CASES |= {"kd/all": Case(partial(distiller, LOSSES), batch), "substage/live": Case(live_substage, live_batch)}
CASES |= {f"substage/{name}": Case(partial(staged.distiller, phase), staged.batch) for phase, name in enumerate(staged.PHASES)}
SOFT_AND_FROZEN: dict[str, Any] = {"rel": {"correspondence": "soft"}, "cascade": {"freeze": True}, "combos": {"prefix": False}}
CASES["substage/soft"] = Case(partial(staged.distiller, 2, **SOFT_AND_FROZEN), staged.batch)
NORMALISES_BATCHES: set[str] = set()  # recipes with a BatchNorm, whose answers depend on how rows fall on ranks


def rows_of(whole: Batch, start: int, count: int) -> Batch:
    """Rows of a batch, or one masked row when there are none."""
    part = {name: tensor[start : start + max(count, 1)].clone() for name, tensor in whole.items()}
    if not count:
        part = {name: tensor[:1] for name, tensor in whole.items()} | {"weight": torch.zeros(1)}
        part |= {name: torch.zeros(1, 2) for name in part if name == "pair_weight"}
    return part


def learn(module: nn.Module, part: Batch) -> Learned:
    loss, means = gather.total_loss(module(part))
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name.removeprefix("module."): p.grad for name, p in module.named_parameters() if p.grad is not None}
    return grads | {f"loss/{name}": mean for name, mean in means.items()}


def learn_on_a_rank(rank: int, folder: str) -> None:
    """What each of four processes does; rank 0 saves what it learned."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1x1 kernels of maps that lie channels-last: slower, and right
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    found = {}
    for split, counts in ROWS_OF_RANKS.items():
        for name, case in CASES.items():
            part = rows_of(case.batch(), sum(counts[:rank]), counts[rank])
            found[f"{split}/{name}"] = learn(DistributedDataParallel(case.distiller()), part)
        gather_on_a_rank(rank, counts)
    assert gather.world() == (rank, WORLD_SIZE)
    assert gather.sum_over_ranks(torch.tensor([1.0, rank])).tolist() == [4.0, 6.0]
    assert gather.of_rank_0(f"rank {rank}") == "rank 0" and gather.of_rank_0(None if rank == 0 else "x") is None
    if rank == 0:
        torch.save(found, Path(folder) / "learned.pt")
    dist.destroy_process_group()


def gather_on_a_rank(rank: int, counts: list[int]) -> None:
    """Each rank sees all rows, and gets back what the losses of all ranks say of its own."""
    whole = torch.arange(2.0 * NUM_ROWS).reshape(NUM_ROWS, 2)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        assert gather.rows_over_ranks(whole[mine].to(dtype)).equal(whole.to(dtype))
    assert gather.rows_over_ranks(whole[mine, 0]).equal(whole[:, 0])
    own = whole[mine].clone().requires_grad_()
    rows = gather.rows_over_ranks(own)
    ((rank + 1) * whole.T @ rows).sum().backward()
    assert own.grad is not None
    assert own.grad.equal((1 + 2 + 3 + 4) * whole[mine].sum(dim=1, keepdim=True).expand_as(own))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learned]:
    """What four ranks learned, by split of the rows and loss. They are forked from one fresh process: torch is imported once."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-W", "error", __file__, folder], check=True, timeout=120)
    found: dict[str, Learned] = torch.load(folder / "learned.pt", weights_only=True)
    return found


def test_every_recipe_is_tested() -> None:
    assert {name.partition("/")[0] for name in CASES} | NORMALISES_BATCHES == set(RECIPES) - {"label"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", ROWS_OF_RANKS)
def test_four_ranks_learn_what_one_learns(learned: dict[str, Learned], split: str, name: str) -> None:
    alone = learn(CASES[name].distiller(), CASES[name].batch())
    assert any(tensor.abs().max() > 1e-3 for tensor in alone.values())
    torch.testing.assert_close(learned[f"{split}/{name}"], alone, rtol=1e-4, atol=1e-5)


def test_a_group_of_one_is_no_group(tmp_path: Path) -> None:
    part = rows_of(batch(), 0, 5)
    alone = learn(distiller(LOSSES), part)
    assert gather.world() == (0, 1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert gather.world() == (0, 1)
        assert gather.rows_over_ranks(part["weight"]) is part["weight"]
        torch.testing.assert_close(learn(DistributedDataParallel(distiller(LOSSES)), part), alone, rtol=0, atol=1e-7)
    finally:
        dist.destroy_process_group()


def test_a_batch_without_rows_has_a_loss_of_zero() -> None:
    found = learn(distiller(LOSSES), rows_of(batch(), 0, 0))
    assert all(not tensor.any() for tensor in found.values())


def test_means_are_over_the_rows_that_each_loss_counts() -> None:
    losses = {"a": (torch.tensor(6.0), torch.tensor(3.0)), "b": (torch.tensor(8.0), torch.tensor(2.0))}
    loss, means = gather.total_loss(losses)
    assert {name: mean.item() for name, mean in means.items()} == {"a": 2.0, "b": 4.0}
    assert loss.item() == 6.0


def test_without_a_group_all_rows_are_the_own_rows() -> None:
    rows = torch.ones(2, 3)
    assert gather.rows_over_ranks(rows) is rows


def test_a_sum_is_a_copy_without_gradient() -> None:
    values = torch.ones(2, requires_grad=True)
    total = gather.sum_over_ranks(values)
    assert not total.requires_grad
    total += 1
    assert values.tolist() == [1, 1]


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # DistributedDataParallel would, for a second in each rank
    mp.start_processes(learn_on_a_rank, (sys.argv[1],), nprocs=WORLD_SIZE, start_method="fork")  # type: ignore[no-untyped-call, attr-defined]
