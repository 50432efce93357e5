"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a block keeps its input only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from frugal.model.moe import MoE
from frugal.model.transformer import Block, Transformer


def recompute_blocks(model: Transformer) -> None:
    """Make every block compute its forward pass again in the backward pass rather than keep what is inside; in place.

    Gradients are the same to the bit. Loads of experts are counted once. Comes after compiling and before sharding.
    """
    for block in model.all_blocks():
        block.forward = _recomputed(block, block.forward)  # type: ignore[method-assign]


def _recomputed(block: Block, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        try:
            return forward(x_BTD, rotary)
        finally:  # torch stops the second run when it has what it needs
            if torch._C._current_graph_task_id() != -1 and isinstance(block.ffn, MoE):
                block.ffn.router_loss = None  # the second run's; holding it would keep the block's activations

    def either(x_BTD: Tensor, rotary: tuple[Tensor, Tensor], cache: Any = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return forward(x_BTD, rotary, cache)
        out: Tensor = checkpoint(run, x_BTD, rotary, use_reentrant=False)
        return out

    return either
