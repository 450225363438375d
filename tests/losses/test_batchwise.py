"""What all losses of a whole batch have in common, on one rank and on four: rows may be permuted, split, missing or degenerate."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vkd import gather
from vkd.losses import relation
from vkd.losses.adapters import StageAttention
from vkd.losses.batchwise import MIN_ROWS, AllRows, own_rows
from vkd.losses.distillation import SumAndCount
from vkd.losses.features import descriptor_loss
from vkd.losses.maps import map_loss, mse_of_rows

WIDTH, NUM_ROWS, WORLD_SIZE, NUM_BINS = 48, 32, 4, 6
Loss = Callable[[Tensor, Tensor, Tensor, AllRows], SumAndCount]
Found = dict[str, tuple[Tensor, Tensor]]  # by loss: the mean over all ranks, the gradients of all rows


def of_descriptors(s: Tensor, t: Tensor, weight: Tensor, all_rows: AllRows) -> SumAndCount:
    scale = torch.linspace(0.5, 2, 16, dtype=s.dtype).reshape(2, 8)
    return descriptor_loss(s.reshape(-1, 6, 8), t.reshape(-1, 6, 8), scale, weight, all_rows)


def of_maps(s: Tensor, t: Tensor, weight: Tensor, all_rows: AllRows) -> SumAndCount:
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=s.dtype)
    return map_loss(s.reshape(-1, 3, 2, 4, 2), t.reshape(-1, 3, 2, 4, 2), scale, weight, all_rows)


def of_stages(s: Tensor, t: Tensor, weight: Tensor, all_rows: AllRows) -> SumAndCount:
    return relation.correlation(s.split(16, dim=1), t.split(16, dim=1), weight, all_rows)[2]


def of_pairs(s: Tensor, t: Tensor, weight: Tensor, all_rows: AllRows) -> SumAndCount:
    (s1, s2), (t1, t2) = s.split(24, dim=1), t.split(24, dim=1)
    return relation.pair((s1, s2), (t1, t2), weight, all_rows)


def of_attended_stages(s: Tensor, t: Tensor, weight: Tensor, all_rows: AllRows) -> SumAndCount:
    torch.manual_seed(0)
    attention = StageAttention(3, 3, NUM_BINS).to(s.dtype)
    students, teachers = s.split(16, dim=1), t.split(16, dim=1)
    profiles = [
        torch.stack([relation.similarity_profiles(x, weight, NUM_BINS, all_rows) for x in stages], dim=1) for stages in (students, teachers)
    ]
    s_maps, t_maps = ([x.reshape(-1, 2, 2, 2, 2) for x in stages] for stages in (students, teachers))
    losses = torch.stack([torch.stack([mse_of_rows(a, b, weight) for b in t_maps], dim=1) for a in s_maps], dim=1)
    diagonal = torch.eye(3, dtype=s.dtype)  # so that equal models lose nothing
    return relation.attended(losses * diagonal, attention(*profiles), weight)


LOSSES: dict[str, Loss] = {
    "descriptors": of_descriptors,
    "maps": of_maps,
    "stages": of_stages,
    "pairs": of_pairs,
    "attended stages": of_attended_stages,
    "sp": relation.sp,
    "rkd_distance": relation.rkd_distance,
    "rkd_angle": relation.rkd_angle,
    "pkt": relation.pkt,
    "correlation_congruence": relation.correlation_congruence,
}
NEED_ROWS = {"stages", "pairs", "sp"}
every_loss = pytest.mark.parametrize("name", LOSSES)


def rows(n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return student.requires_grad_(), teacher, torch.ones(n, dtype=dtype)


def learn(loss: Loss, student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the gradient."""
    student = student.detach().clone().requires_grad_()
    total, count = loss(student, teacher, weight, own_rows)
    (gradient,) = torch.autograd.grad(total / count.clamp(min=1), student)
    return (total / count.clamp(min=1)).detach(), gradient


@every_loss
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    student, teacher, weight = rows()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    value, gradient = learn(LOSSES[name], student, teacher, weight)
    assert value > 1e-4
    torch.testing.assert_close(learn(LOSSES[name], student[order], teacher[order], weight), (value, gradient[order]))


@every_loss
def test_a_student_equal_to_its_teacher_loses_nothing(name: str) -> None:
    student, _, weight = rows()
    value, gradient = learn(LOSSES[name], student, student.detach(), weight)
    assert value.item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "attended stages"])  # which holds back the gradient of its attention
def test_gradients_are_right_and_reach_the_student_only(name: str) -> None:
    student, teacher, weight = rows(9)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher, weight, own_rows)[0], student, fast_mode=True)
    LOSSES[name](student, teacher, weight, own_rows)[0].backward()
    assert teacher.grad is None


@every_loss
@pytest.mark.parametrize("filler", [torch.inf, torch.nan])
def test_rows_of_weight_0_count_nothing(name: str, filler: float) -> None:
    student, teacher, weight = rows()
    value, gradient = learn(LOSSES[name], student[:9], teacher[:9], weight[:9])
    with torch.no_grad():
        student[9:], teacher[9:], weight[9:] = filler, filler, 0
    found = learn(LOSSES[name], student, teacher, weight)
    torch.testing.assert_close(found[0], value)
    torch.testing.assert_close(found[1][:9], gradient)
    assert not found[1][9:].any()


@every_loss
@pytest.mark.parametrize("num_rows", [0, 1, 2, MIN_ROWS - 1])
def test_few_rows(name: str, num_rows: int) -> None:
    """A loss that needs more says so by its count; no row at all may also be rows that all have weight 0."""
    student, teacher, weight = rows()
    for s, t, w in (
        (student[:num_rows], teacher[:num_rows], weight[:num_rows]),
        (student, teacher, (torch.arange(12) < num_rows).double()),
    ):
        total, count = LOSSES[name](s, t, w, own_rows)
        (gradient,) = torch.autograd.grad(total, student)
        skips = num_rows == 0 or name in NEED_ROWS
        assert count.item() == (0 if skips else num_rows) and total.isfinite() and gradient.isfinite().all()
        assert not skips or (total.item() == 0 and not gradient.any())


@every_loss
@pytest.mark.parametrize("n", [1, 2, 12])
def test_degenerate_rows_have_finite_gradients(name: str, n: int) -> None:
    """Zeros, rows that are all equal, columns that are constant: for the student, the teacher or both."""
    varied, other, weight = rows(n, torch.float32)
    constant_columns = other.clone()
    constant_columns[:, ::2] = 3.3
    kinds = [torch.zeros_like(other), torch.full_like(other, 3.3), other[:1].expand_as(other), constant_columns, varied.detach()]
    for student, teacher in product(kinds, (kinds[0], kinds[2], kinds[3])):
        value, gradient = learn(LOSSES[name], student, teacher, weight)
        assert value.isfinite() and gradient.isfinite().all()


@every_loss
def test_a_row_of_zeros_has_no_wild_gradient(name: str) -> None:
    student, teacher, weight = (x.detach() for x in rows())
    student[0] = 0
    assert learn(LOSSES[name], student, teacher, weight)[1].abs().max() < 1e3


@every_loss
def test_half_precision_loses_only_what_its_inputs_lose(name: str) -> None:
    student, teacher, weight = (x.detach().bfloat16() for x in rows())
    full, _ = learn(LOSSES[name], student.float(), teacher.float(), weight.float())
    half = LOSSES[name](student.float(), teacher, weight.float(), own_rows)
    torch.testing.assert_close(half[0] / half[1], full)
    if name != "attended stages":  # what it learns with, a recipe runs as it likes
        with torch.autocast("cpu", torch.bfloat16):
            total, count = LOSSES[name](student.float(), teacher, weight.float(), own_rows)
        torch.testing.assert_close(total / count, full)


SPLITS = {  # rows of each rank
    "even": [8, 8, 8, 8],
    "ragged": [19, 0, 0, 13],
    "too few": [2, 0, 1, 2],
}


def learn_on_a_rank(rank: int, folder: str) -> None:
    """What each of four processes does; rank 0 saves what all of them found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    found: dict[str, Found] = {}
    for split, counts in SPLITS.items():
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        student, teacher, weight = (x.detach()[mine] for x in rows(NUM_ROWS))
        if rank == 1:  # one more row, that says nothing
            student, teacher = (torch.cat([x, torch.full((1, WIDTH), torch.nan, dtype=x.dtype)]) for x in (student, teacher))
            weight = torch.cat([weight, torch.zeros(1, dtype=weight.dtype)])
        found[split] = learn_together(student, teacher, weight)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def learn_together(student: Tensor, teacher: Tensor, weight: Tensor) -> Found:
    found: Found = {}
    for name, loss in LOSSES.items():
        own = student.clone().requires_grad_()
        scalar, means = gather.total_loss({name: loss(own, teacher, weight, gather.rows_over_ranks)})
        scalar.backward()
        assert own.grad is not None
        # DDP averages the gradients of parameters; these are rows, each of which one rank has
        found[name] = means[name], gather.rows_over_ranks(own.grad[weight > 0]) / WORLD_SIZE
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, "-W", "error", __file__, folder], check=True, timeout=120)
    learned: dict[str, Found] = torch.load(folder / "found.pt", weights_only=True)
    return learned


@every_loss
@pytest.mark.parametrize("split", SPLITS)
def test_four_ranks_find_what_one_finds(found: dict[str, Found], split: str, name: str) -> None:
    n = sum(SPLITS[split])
    student, teacher, weight = (x[:n] for x in rows(NUM_ROWS))
    value, gradient = learn(LOSSES[name], student, teacher, weight)
    assert (value > 0) == (split != "too few" or name not in NEED_ROWS)
    mean, gradients = found[split][name]
    torch.testing.assert_close(mean, value.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradients, gradient, rtol=1e-5, atol=1e-9)


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # or each rank imports it, for a second
    mp.start_processes(learn_on_a_rank, (sys.argv[1],), nprocs=WORLD_SIZE, start_method="fork")  # type: ignore[no-untyped-call, attr-defined]
