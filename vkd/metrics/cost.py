"""What a model costs: parameters, floating-point operations, time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Latency(NamedTuple):
    """Median of the repeats, and their interquartile range, in seconds."""

    median_s: float
    spread_s: float


def num_parameters(module: nn.Module) -> int:
    """Parameters, trained or frozen; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops(call: Callable[..., object], *inputs: Tensor) -> int:
    """Floating-point operations of one call of a module or function: matrix products, convolutions and attention; a multiply-add is 2."""
    # torch counts nothing for its fused attention on CPU; the plain one is made of matrix products
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*inputs)
    return int(counter.get_total_flops())


def latency_s(call: Callable[[], object], repeats: int = 20) -> Latency:
    """Wall time of a call after one warm-up; on a GPU the call must itself wait for the device."""
    call()
    times_s = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    low, median, high = np.percentile(times_s, [25, 50, 75])
    return Latency(float(median), float(high - low))
