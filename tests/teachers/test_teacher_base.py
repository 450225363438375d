"""What all teachers share: the probe clip and batches that halve."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vkd.clips import Sampling
from vkd.errors import TeacherError
from vkd.teachers.base import HalvingBatches, probe_frames


def doubling(limit: int, sizes: list[int]) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function that notes the rows it was asked for and has memory for `limit` of them."""

    def fn(rows: Tensor) -> dict[str, Tensor]:
        sizes.append(len(rows))
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"doubled": rows * 2, "first": rows[:, :1]}

    return fn


def test_batches_halve_and_stay_halved() -> None:
    sizes: list[int] = []
    batches, rows = HalvingBatches(8), np.arange(22).reshape(11, 2)
    np.testing.assert_array_equal(batches.run(doubling(3, sizes), rows)["doubled"], rows * 2)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    sizes.clear()
    batches.run(doubling(3, sizes), rows[:4])
    assert sizes == [2, 2]


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(TeacherError, match="one clip does not fit"):
        HalvingBatches(4).run(doubling(0, []), np.zeros((3, 2)))


def test_other_errors_pass() -> None:
    def fn(rows: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        HalvingBatches(4).run(fn, np.zeros((3, 2)))


@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9))
def test_batches_give_all_rows_in_order(num_rows: int, batch_size: int, limit: int) -> None:
    rows = np.arange(2 * num_rows).reshape(num_rows, 2)
    out = HalvingBatches(batch_size).run(doubling(limit, []), rows)
    np.testing.assert_array_equal(out["doubled"], rows * 2)
    assert out["first"].shape == (num_rows, 1)


def test_read_only_rows_are_copied_not_changed() -> None:
    def fn(rows: Tensor) -> dict[str, Tensor]:
        return {"same": rows.add_(1)}

    rows = np.arange(6, dtype=np.uint8).reshape(3, 2)
    rows.flags.writeable = False
    out = HalvingBatches(2).run(fn, rows)
    np.testing.assert_array_equal(out["same"], rows + 1)
    assert rows.max() == 5


def test_networks_run_without_gradients_in_the_declared_precision() -> None:
    network, rows = nn.Linear(4, 3), np.ones((5, 4), np.float32)
    found: list[tuple[torch.dtype, bool]] = []

    def fn(rows: Tensor) -> dict[str, Tensor]:
        answer = network(rows)
        found.append((answer.dtype, answer.requires_grad))
        return {"answer": answer.float()}

    full, low = (HalvingBatches(5, precision=precision).run(fn, rows)["answer"] for precision in ("fp32", "bf16"))
    assert found == [(torch.float32, False), (torch.bfloat16, False)]
    np.testing.assert_array_equal(full, network(torch.ones(5, 4)).detach().numpy())
    np.testing.assert_allclose(low, full, atol=0.02)
    with pytest.raises(ValueError, match="precision is 'auto'; it can be fp32, bf16"):
        HalvingBatches(1, precision="auto")


def test_probe_is_the_same_bytes_on_every_machine() -> None:
    frames = probe_frames(Sampling(num_frames=2, size_px=32))
    assert frames.shape == (2, 32, 32, 3)
    assert hashlib.sha256(frames.tobytes()).hexdigest()[:16] == "63e048782504c4df"
    assert len(np.unique(frames)) > 100
    assert not np.array_equal(frames[0], frames[1])
