"""The mixture of experts in three nouns: Router chooses, Experts compute, MoE puts them together.

Shape letters: T tokens (batch and sequence flattened), D d_model, E routed experts, K experts per token (top_k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.config import TransformerConfig
from frugal.model.experts import Experts, Routing


class SwiGLU(nn.Module):
    """Gated feed-forward w2(silu(w1 x) * w3 x) (Shazeer 2020), [..., D] -> [..., D]."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, d_hidden, bias=False)
        self.w3 = nn.Linear(d_model, d_hidden, bias=False)
        self.w2 = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to the last dimension."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """Scores every expert for every token and keeps the top_k, always in float32.

    `expert_bias` is added to the scores for the choice only, never to the weights: raising an idle expert's bias
    brings it tokens without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, section 2.1.2).
    It is moved once per optimizer step from outside (`frugal.callbacks.expert_bias`), so accumulation stays right.
    """

    expert_bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.top_k, self.score = moe.top_k, moe.score
        self.normalize_weights, self.routed_scaling = moe.normalize_weights, moe.routed_scaling
        self.weight = nn.Parameter(torch.empty(moe.n_experts, config.d_model))
        self.register_buffer("expert_bias", torch.zeros(moe.n_experts))

    def forward(self, x_TD: Tensor) -> Routing:
        """Choose top_k experts for each of T tokens."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid() if self.score == "sigmoid" else logits_TE.softmax(dim=-1)
        experts_TK = torch.topk(scores_TE.detach() + self.expert_bias, self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalize_weights:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(weights_TK * self.routed_scaling, experts_TK)


class MoE(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, Dai et al. 2024), [B, T, D] -> [B, T, D].

    While training, `load` adds up how many tokens each expert got since it was last cleared.
    """

    load: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config.d_model, moe.n_shared_experts * moe.d_expert) if moe.n_shared_experts else None
        )
        self.register_buffer("load", torch.zeros(moe.n_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Route every token of x on its own; any leading shape."""
        x_TD = x.flatten(0, -2)
        out_TD, load_E = self.experts(x_TD, self.router(x_TD))
        if self.training:
            with torch.no_grad():
                self.load += load_E
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.view_as(x)
