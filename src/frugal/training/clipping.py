"""Clipping of gradients, also of sharded ones on several meshes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from frugal.model.linear import local


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that parameters have; of sharded ones, this process's part."""
    return [local(p.grad) for p in parameters if p.grad is not None]


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[Tensor],
    most: float | None,
    by_value: bool = False,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scale all gradients in place so that their norm is at most `most`; return the norm before.

    Args:
        parameters: whose gradients.
        most: the largest norm, or the largest value; null: any.
        by_value: clamp each value instead.
        reduce_sum: sums a scalar over processes, where each element of a gradient is on exactly one of them; then the
            norm is right whatever meshes the tensors lie on.
    """
    largest = float("inf") if by_value or not most else most
    if reduce_sum is None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    else:
        parts = gradients(parameters)
        device = next((part.device for part in parts), torch.device("cpu"))
        norms = torch._foreach_norm(parts, dtype=torch.float32) if parts else [torch.zeros(())]
        norm = reduce_sum(torch.stack(norms).square().sum().to(device)).sqrt()
        if math.isfinite(largest) and parts:
            torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp_max(1.0).to(device))
    if by_value and most:
        for part in gradients(parameters):
            part.clamp_(-most, most)
    return norm
