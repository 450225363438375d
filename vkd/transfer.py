"""Tensors between host and device: pinned, on a stream of their own, with no wait in between; on a CPU nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class ToDevice:
    """Copies batches to a device.

    To a GPU they go through pinned memory on a stream of their own: a batch arrives while the step before it computes. The
    caller is held back to one batch ahead, so that device memory holds two.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._before: torch.cuda.Event | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch, ready for what the current stream does next; tensors that are there already stay as they are."""
        if self._stream is None:
            return {name: tensor.to(self.device) for name, tensor in batch.items()}
        now = torch.cuda.current_stream(self.device)
        self._keep_near(now)
        with torch.cuda.stream(self._stream):
            copies = {name: pinned(tensor).to(self.device, non_blocking=True) for name, tensor in batch.items()}
        now.wait_stream(self._stream)
        for copy in copies.values():
            copy.record_stream(now)  # else its memory could be given away while a step that was not waited for reads it
        return copies

    def _keep_near(self, now: torch.cuda.Stream) -> None:
        """Wait until the step before the last has ended; the last may still run."""
        before, self._before = self._before, torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._before.record(now)
        if before is not None:
            before.synchronize()


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in page-locked memory, from where a copy to a GPU waits for nothing; itself where this process uses no GPU."""
    return tensor.pin_memory() if _uses_gpu() and tensor.device.type == "cpu" else tensor


def staged(rows: np.ndarray) -> Tensor:
    """A copy of an array, pinned where this process uses a GPU. Ray's arrays are read-only, which torch would warn of."""
    dtype = torch.from_numpy(np.empty(0, rows.dtype)).dtype
    copy = torch.empty(rows.shape, dtype=dtype, pin_memory=_uses_gpu())
    np.copyto(copy.numpy(), rows)
    return copy


def to_host(columns: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Arrays of tensors; those of a GPU are copied one behind the other, with one wait for all."""
    copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in columns.items()}
    for device in {tensor.device for tensor in columns.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return {name: copy.numpy() for name, copy in copies.items()}


def _uses_gpu() -> bool:
    """Not whether there is one: pinning would start CUDA in a process that does not need it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
