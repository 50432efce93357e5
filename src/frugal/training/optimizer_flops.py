"""FLOPs of the matrix products that an optimizer makes of its own: torch's counter over tensors without data."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from frugal.training.optim import settings

log = logging.getLogger(__name__)
# Have no products (Adafactor two FLOPs a parameter), and some of them cannot step without data.
WITHOUT = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor)
SELDOM = ("freq", "gap", "interval", "compute_steps")  # settings that say after how many steps something is done again


def qr_flops(a_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOPs of the thin QR decomposition by Householder reflections, both factors formed.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, 5.2.
    """
    rows, columns = max(a_shape[-2:]), min(a_shape[-2:])
    return math.prod(a_shape[:-2]) * (4 * rows * columns**2 - 4 * columns**3 // 3)


def product_flops(make: Any, optimizer: torch.optim.Optimizer) -> dict[tuple[int, torch.Size], float]:
    """FLOPs of an optimizer's products in a step, by group and shape of the parameter, over the steps' mean.

    A twin of the optimizer takes steps over parameters on the meta device. Its first step, where many set up their
    state, is left out. What torch's counter does not know but for QR (eigenvalues, inverses) is not counted.

    Args:
        make: called with groups, gives the optimizer.
        optimizer: made by it; its groups' settings and shapes count.
    """
    from torch.utils.flop_counter import FlopCounterMode

    found: dict[tuple[int, torch.Size], float] = {}
    if isinstance(optimizer, WITHOUT):
        return found
    try:
        for index, (group, said) in enumerate(zip(optimizer.param_groups, settings(optimizer), strict=True)):
            periods = [v for k, v in said.items() if isinstance(v, int) and any(word in k for word in SELDOM)]
            period = max([10, *periods])
            for shape, dtype in {p.shape: p.dtype for p in group["params"]}.items():
                parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
                parameter.grad = torch.empty_like(parameter)
                twin = make([{**said, "params": [parameter]}])
                if hasattr(twin, "train"):  # schedule-free ones want to be told
                    twin.train()
                counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_qr: qr_flops})
                with torch.compiler.set_stance("force_eager"):
                    twin.step()
                    with counter:
                        for _ in range(period):
                            twin.step()
                found[index, shape] = counter.get_total_flops() / period
    except Exception as error:  # an optimizer of the user's may do anything
        log.info("model.optimizer: products of %s are not counted in FLOPs (%s)", type(optimizer).__name__, error)
        return {}
    return found
