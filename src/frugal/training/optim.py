"""Optimizer and its parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frugal.errors import UserError


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019), fused.

    Args:
        lr: peak learning rate; model.schedule multiplies it.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; norms and biases are never decayed.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"model.optimizer.lr: must be positive, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"model.optimizer.betas: must lie in [0, 1), got {list(self.betas)}")
        if self.eps <= 0:
            raise UserError(f"model.optimizer.eps: must be positive, got {self.eps}")
        if self.weight_decay < 0:
            raise UserError(f"model.optimizer.weight_decay: must not be negative, got {self.weight_decay}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors (norms), which do not. Every parameter is in exactly one."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    assert len(matrices) + len(vectors) == len(parameters)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: AdamWConfig, fused: bool = True) -> torch.optim.AdamW:
    """The optimizer over all parameters of `model`.

    Args:
        fused: one kernel for all parameters. Under float16 with Lightning's gradient scaler it must be off: the fused
            step then unscales the gradients itself, too late for clipping (`frugal.training.precision` unscales first).
    """
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
