"""Transfers: on a CPU nothing is copied or waited for; on a GPU (skipped without one) a step is never waited for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from vkd import transfer
from vkd.transfer import ToDevice

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_batch_on_the_cpu_is_the_same_tensors() -> None:
    batch = {"frames": torch.zeros(2, 3, dtype=torch.uint8), "weight": torch.ones(2)}
    moved = ToDevice("cpu")(batch)
    assert list(moved) == list(batch)
    assert all(moved[name] is batch[name] for name in batch)


def test_nothing_is_pinned_where_no_gpu_is_used() -> None:
    if not torch.cuda.is_initialized():
        tensor = torch.ones(3)
        assert transfer.pinned(tensor) is tensor
        assert not transfer.staged(np.ones(3)).is_pinned()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_staged_rows_are_a_writable_copy(dtype: type, num_rows: int) -> None:
    rows = np.arange(num_rows * 4).reshape(num_rows, 2, 2).astype(dtype)[:, ::-1]
    rows.flags.writeable = False
    tensor = transfer.staged(rows)
    np.testing.assert_array_equal(tensor.numpy(), rows)
    assert tensor.numpy().dtype == dtype
    tensor += 1
    np.testing.assert_array_equal(tensor.numpy(), rows + 1)


def test_columns_come_to_the_host() -> None:
    columns = {"a": torch.ones(2, 3), "b": torch.arange(2)}
    found = transfer.to_host(columns)
    assert {name: array.tolist() for name, array in found.items()} == {"a": [[1, 1, 1]] * 2, "b": [0, 1]}


class FakeStream:
    """Notes what waits for it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def fake_cuda(log: list[str], monkeypatch: pytest.MonkeyPatch) -> ToDevice:
    """A copier on the CPU that takes the path of a GPU and notes its steps."""
    numbers = itertools.count()

    class FakeEvent:
        def __init__(self, blocking: bool) -> None:
            self.number = next(numbers)

        def record(self, stream: FakeStream) -> None:
            log.append(f"event {self.number} on {stream.name}")

        def synchronize(self) -> None:
            log.append(f"host waits for event {self.number}")

    @contextlib.contextmanager
    def stream(entered: FakeStream) -> Iterator[None]:
        log.append(f"copies on {entered.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log, "main"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    to_device = ToDevice("cpu")
    to_device._stream = FakeStream(log, "side")
    return to_device


def test_a_copy_waits_for_no_step_but_the_one_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    to_device, batch = fake_cuda(log, monkeypatch), {"x": torch.ones(2)}
    for step in range(3):
        assert to_device(batch)["x"].tolist() == [1, 1]
        log.append(f"step {step}")
    copied = ["copies on side", "main waits for side", "kept for main"]
    first, second = ["event 0 on main", *copied, "step 0"], ["event 1 on main", "host waits for event 0", *copied, "step 1"]
    assert log == [*first, *second, "event 2 on main", "host waits for event 1", *copied, "step 2"]


@needs_a_gpu
def test_many_batches_arrive_whole_on_a_gpu() -> None:
    to_device, total = ToDevice("cuda"), torch.zeros(1 << 20, device="cuda")
    for value in range(50):
        arrived = to_device({"x": torch.full((1 << 20,), float(value))})["x"]
        total += arrived * arrived.sin().asin().cos() ** 0
    assert transfer.to_host({"total": total})["total"].tolist() == [sum(range(50))] * (1 << 20)


@needs_a_gpu
def test_a_gpu_is_not_waited_for() -> None:
    to_device, weight = ToDevice("cuda"), torch.ones(64, 64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            weight = to_device({"x": torch.ones(64, 64)})["x"] @ weight / 64
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.is_cuda
