"""How fast this machine multiplies matrices: the ceiling that MFU is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from frugal.model.linear import linear


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.6) -> float:
    """FLOP/s of the best square matrix product that this machine does now: the ceiling of MFU.

    Best of several repeats, because a shared machine is slower than itself at times, and of torch's own product and
    the one that the model uses (`frugal.model.linear`), because on some CPUs the latter is twice as fast.
    """
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    until = time.perf_counter() + seconds
    repeats = 0
    products: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.matmul, linear)
    while repeats < 4 or time.perf_counter() < until:
        product = products[repeats % 2]
        synchronize(device)
        start = time.perf_counter()
        product(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        repeats += 1
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do, so that a clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
