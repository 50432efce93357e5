"""Balance the experts' load without an auxiliary loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from frugal.errors import UserError


def updated_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """Raise the bias of experts with less than the mean load and lower the others', each by `rate`.

    Auxiliary-loss-free load balancing (Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-V3 uses
    rate 0.001). `bias_E` and `load_E` have shape [E]; an expert exactly at the mean keeps its bias.
    """
    load_E = load_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(load_E.mean() - load_E)


class ExpertBias(pl.Callback):
    """Update every router's bias once per optimizer step from the loads of all micro-batches and ranks.

    Args:
        rate: size of one update; 0 switches balancing off.
        final_fraction: last share of the run in which the biases rest (DeepSeek-V3 rests them for its last 3%).
    """

    def __init__(self, rate: float = 0.001, final_fraction: float = 0.0) -> None:
        if rate < 0:
            raise UserError(f"expert_bias.rate: must not be negative, got {rate}")
        if not 0 <= final_fraction <= 1:
            raise UserError(f"expert_bias.final_fraction: must lie in [0, 1], got {final_fraction}")
        self.rate, self.final_fraction = rate, final_fraction

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Move the biases when an optimizer step is complete."""
        resting = trainer.global_step > trainer.max_steps * (1 - self.final_fraction)
        if self.rate == 0 or resting or not pl_module.step_complete:
            return
        for moe in pl_module.model.moe_layers().values():
            # None without model.transformer.moe.expert_bias; a frozen router's bias rests with its weights.
            if moe.router.expert_bias is not None and moe.router.weight.requires_grad:
                moe.router.expert_bias.copy_(updated_bias(moe.router.expert_bias, moe.load, self.rate))
