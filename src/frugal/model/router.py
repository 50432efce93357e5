"""Which experts each token uses, and the losses that keep the choice balanced.

Shape letters: B sequences, S positions of a sequence, T = B * S tokens, D d_model, E routed experts, K experts per
token (top_k), G groups of experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.config import BlocksConfig, MoEConfig
from frugal.model.experts import Routing


class Router(nn.Module):
    """Scores every expert for every token and keeps the top_k, always in float32.

    `expert_bias` is added to the scores for the choice only, never to the weights: raising an idle expert's bias
    brings it tokens without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, section 2.1.2).
    It is moved once per optimizer step from outside (`frugal.callbacks.expert_bias`), so accumulation stays right.
    """

    expert_bias: Tensor | None

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.weight = nn.Parameter(torch.empty(self.moe.n_experts, config.d_model))
        self.register_buffer(
            "expert_bias", torch.zeros(self.moe.n_experts, dtype=torch.float32) if self.moe.expert_bias else None
        )

    def forward(self, x_TD: Tensor) -> Routing:
        """Choose top_k experts for each of T tokens."""
        return self.choose(self.logits(x_TD))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Each expert's logit for each token, float32, [T, E]."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())

    def choose(self, logits_TE: Tensor) -> Routing:
        """Turn logits into top_k experts and their weights."""
        moe = self.moe
        scores_TE = logits_TE.sigmoid() if moe.score == "sigmoid" else logits_TE.softmax(dim=-1)
        choice_TE = scores_TE.detach()
        if self.expert_bias is not None:
            choice_TE = choice_TE + self.expert_bias
        if moe.topk_group < moe.n_group:
            choice_TE = keep_best_groups(choice_TE, moe.n_group, moe.topk_group, moe.group_score)
        experts_TK = torch.topk(choice_TE, moe.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if moe.normalize_weights:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(weights_TK * moe.routed_scaling, experts_TK)


def keep_best_groups(choice_TE: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Set the experts outside each token's best groups to minus infinity, [T, E] -> [T, E].

    A group's score is the sum of its two best experts (`top2`, DeepSeek-V3, section 2.1.2) or its best one (`max`,
    DeepSeek-V2, section 2.2.2). Groups are runs of E / G neighbouring experts.
    """
    choice_TGe = choice_TE.unflatten(-1, (n_group, -1))
    score_TG = choice_TGe.topk(2 if group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
    best = score_TG.topk(topk_group, dim=-1, sorted=False).indices
    dropped_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter_(1, best, False)
    return choice_TGe.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def shares(logits_TE: Tensor, score: str) -> Tensor:
    """Each token's scores as shares that sum to one, [T, E] (DeepSeek-V3, eq. 19)."""
    if score == "softmax":
        return logits_TE.softmax(dim=-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)


def sequence_balance_loss(shares_BSE: Tensor, experts_BSK: Tensor) -> Tensor:
    """Sum over experts of load times mean share within each sequence, averaged over sequences; a scalar.

    DeepSeek-V3, eq. 17-20. One under perfect balance, E / K when every token of a sequence takes the same K experts
    with all its share. Only the shares carry a gradient.
    """
    n_experts, top_k = shares_BSE.shape[-1], experts_BSK.shape[-1]
    chosen_BE = shares_BSE.new_zeros(shares_BSE.shape[0], n_experts)
    experts_BN = experts_BSK.flatten(1)
    chosen_BE.scatter_add_(1, experts_BN, torch.ones_like(experts_BN, dtype=chosen_BE.dtype))
    load_BE = chosen_BE * n_experts / (top_k * shares_BSE.shape[1])
    return (load_BE * shares_BSE.mean(dim=1)).sum(dim=-1).mean()


def global_balance_loss(shares_TE: Tensor, load_E: Tensor) -> Tensor:
    """The same over all tokens: E times the sum of each expert's fraction of rows and mean share; a scalar.

    Fedus et al. 2021 (arXiv 2101.03961), eq. 4-6, for any K. `load_E` counts the rows of as many tokens as are known:
    with the counts of all micro-batches of the step so far, specialised micro-batches are not punished (Qiu et al.
    2025, arXiv 2501.11873).
    """
    fraction_E = load_E.detach().to(shares_TE.dtype) / load_E.sum().clamp_min(1)
    return shares_TE.shape[-1] * (fraction_E * shares_TE.mean(dim=0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean square of the logits' log-sum-exp, which keeps them small; a scalar (Zoph et al. 2022, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def router_loss(moe: MoEConfig, logits_TE: Tensor, experts_TK: Tensor, load_E: Tensor, n_sequences: int) -> Tensor:
    """The weighted sum of the losses above that have a coefficient; a scalar, the mean over T tokens."""
    loss = logits_TE.new_zeros(())
    if moe.sequence_loss_coef or moe.global_loss_coef:
        shares_TE = shares(logits_TE, moe.score)
        if moe.sequence_loss_coef:
            shares_BSE, experts_BSK = (x.unflatten(0, (n_sequences, -1)) for x in (shares_TE, experts_TK))
            loss = loss + moe.sequence_loss_coef * sequence_balance_loss(shares_BSE, experts_BSK)
        if moe.global_loss_coef:
            loss = loss + moe.global_loss_coef * global_balance_loss(shares_TE, load_E)
    if moe.z_loss_coef:
        loss = loss + moe.z_loss_coef * z_loss(logits_TE)
    return loss
