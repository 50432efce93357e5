"""The mixture of experts in three nouns: Router chooses, Experts compute, MoE puts them together.

Shape letters: T tokens (batch and sequence flattened), D d_model, E routed experts, K experts per token (top_k),
N = T * K rows sorted by expert, I hidden width of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.config import TransformerConfig


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


class Routing(NamedTuple):
    """What the router decided: weights [T, K] (float32) and expert indices [T, K]."""

    weights_TK: Tensor
    experts_TK: Tensor


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


class _GroupedSwiGLU(torch.autograd.Function):
    """All routed experts at once over rows sorted by expert.

    Two choices make it fast. Rows move by gathers only, forward and backward: the backward of plain indexing is a
    scatter-add, while gathering through the inverse permutation and summing over K is the same thing. And the
    routing weight is folded into the activation before the down projection, so the experts' output need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w13_EHD: Tensor, w2_EDI: Tensor, weights_TK: Tensor, order_N: Tensor, ends_E: Tensor
    ) -> Tensor:
        top_k = weights_TK.shape[1]
        token_N = order_N.div(top_k, rounding_mode="floor")
        inverse_N = torch.empty_like(order_N)
        inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        hidden_NH = F.grouped_mm(x_TD[token_N], w13_EHD.transpose(1, 2), offs=ends_E)
        gate_NI, up_NI = hidden_NH.chunk(2, dim=1)
        weight_N1 = weights_TK.flatten()[order_N].unsqueeze(1).to(x_TD.dtype)
        out_ND = F.grouped_mm(F.silu(gate_NI) * up_NI * weight_N1, w2_EDI.transpose(1, 2), offs=ends_E)
        ctx.save_for_backward(x_TD, w13_EHD, w2_EDI, weights_TK, order_N, ends_E, token_N, inverse_N, hidden_NH)
        return out_ND[inverse_N].unflatten(0, (-1, top_k)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w13_EHD, w2_EDI, weights_TK, order_N, ends_E, token_N, inverse_N, hidden_NH = ctx.saved_tensors
        needs_x, needs_w13, needs_w2, needs_weights = ctx.needs_input_grad[:4]
        top_k = weights_TK.shape[1]
        grad_ND = grads[0][token_N]
        gate_NI, up_NI = hidden_NH.chunk(2, dim=1)
        weight_N1 = weights_TK.flatten()[order_N].unsqueeze(1).to(x_TD.dtype)
        sigmoid_NI = gate_NI.sigmoid()
        silu_NI = gate_NI * sigmoid_NI
        active_NI = silu_NI * up_NI
        grad_x = grad_w13 = grad_w2 = grad_weights = None
        if needs_w2:
            grad_w2 = F.grouped_mm(grad_ND.t(), active_NI * weight_N1, offs=ends_E)
        if needs_x or needs_w13 or needs_weights:
            grad_active_NI = F.grouped_mm(grad_ND, w2_EDI, offs=ends_E)
            if needs_weights:
                grad_weight_N = (grad_active_NI * active_NI).sum(dim=1, dtype=weights_TK.dtype)
                grad_weights = grad_weight_N[inverse_N].view_as(weights_TK)
            grad_active_NI = grad_active_NI * weight_N1
            grad_hidden_NH = torch.cat(
                (grad_active_NI * up_NI * (sigmoid_NI + silu_NI * (1 - sigmoid_NI)), grad_active_NI * silu_NI), dim=1
            )
            if needs_w13:
                grad_w13 = F.grouped_mm(grad_hidden_NH.t(), x_TD[token_N], offs=ends_E)
            if needs_x:
                grad_rows_ND = F.grouped_mm(grad_hidden_NH, w13_EHD, offs=ends_E)
                grad_x = grad_rows_ND[inverse_N].unflatten(0, (-1, top_k)).sum(dim=1)
        return grad_x, grad_w13, grad_w2, grad_weights, None, None


class Experts(nn.Module):
    """E SwiGLU experts, stacked as Hugging Face stacks them: w13 [E, 2I, D] (gate over up), w2 [E, D, I]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.w13 = nn.Parameter(torch.empty(moe.n_experts, 2 * moe.d_expert, config.d_model))
        self.w2 = nn.Parameter(torch.empty(moe.n_experts, config.d_model, moe.d_expert))

    def forward(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of each token's experts [T, D], and how many rows each expert got [E]."""
        flat_N = routing.experts_TK.flatten()
        sorted_N, order_N = flat_N.sort(stable=True)
        experts = torch.arange(self.w13.shape[0], device=x_TD.device)
        # Where each expert's rows end: found in the sorted list, so that nothing waits for the device.
        ends_E = torch.searchsorted(sorted_N, experts, right=True)
        load_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        w13: Tensor = self.w13
        w2: Tensor = self.w2
        if torch.is_autocast_enabled(x_TD.device.type):
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            x_TD, w13, w2 = x_TD.to(dtype), w13.to(dtype), w2.to(dtype)
        out_TD = _GroupedSwiGLU.apply(x_TD, w13, w2, routing.weights_TK, order_N, ends_E.to(torch.int32))
        return out_TD, load_E


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
