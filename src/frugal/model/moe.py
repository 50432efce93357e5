"""The mixture of experts in three nouns: Router chooses, Experts compute, MoE puts them together.

Shape letters: T tokens (batch and sequence flattened), D d_model, E routed experts, K experts per token (top_k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.config import BlocksConfig
from frugal.model.experts import Experts
from frugal.model.grouped import add_load
from frugal.model.linear import Linear
from frugal.model.router import Router, router_loss


class SwiGLU(nn.Module):
    """Gated feed-forward w2(silu(w1 x) * w3 x) (Shazeer 2020), [..., D] -> [..., D]."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_hidden)
        self.w3 = Linear(d_model, d_hidden)
        self.w2 = Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to the last dimension."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, Dai et al. 2024), [B, T, D] -> [B, T, D].

    While training, `load` adds up how many tokens each expert got since it was last cleared, and `router_loss` holds
    the balance and z losses of the last call, or None where no coefficient asks for them.
    """

    load: Tensor

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.config = moe = config.moe
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.d_model, moe.shared_width) if moe.shared_width else None
        self.register_buffer("load", torch.zeros(moe.n_experts, dtype=torch.float32), persistent=False)
        self.router_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Route every token of x on its own; any leading shape, whose last dimension is the position."""
        x_TD = x.flatten(0, -2)
        logits_TE = self.router.logits(x_TD)
        routing = self.router.choose(logits_TE)
        out_TD, load_E = self.experts(x_TD, routing)
        if self.training:
            add_load(self.load, load_E)
            if self.config.has_router_loss:
                n_sequences = x_TD.shape[0] // x.shape[-2]
                self.router_loss = router_loss(self.config, logits_TE, routing.experts_TK, self.load, n_sequences)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.view_as(x)
