"""The routed experts, all computed at once over rows sorted by expert.

Shape letters: T tokens (batch and sequence flattened), D d_model, E routed experts, K experts per token (top_k),
N = T * K rows sorted by expert, I hidden width of an expert, H = 2 I (gate beside up).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from frugal.model.config import BlocksConfig
from frugal.model.expert_parallel import exchanged, own_share
from frugal.model.grouped import dispatch, grouped_nt, grouped_tn, grouped_tn_some
from frugal.model.linear import local


class Routing(NamedTuple):
    """What the router decided: weights [T, K] (float32) and expert indices [T, K]."""

    weights_TK: Tensor
    experts_TK: Tensor


class TrainedExperts(NamedTuple):
    """The only experts of a layer that train: which, int64 [S], and their slices of w13 and w2 as own leaves.

    The products use the whole stacks; whoever updates the slices writes them back (`frugal.training.expert_slices`).
    """

    index_S: Tensor
    w13_SHD: Tensor
    w2_SDI: Tensor


class _GroupedSwiGLU(torch.autograd.Function):
    """All routed experts at once over rows sorted by expert.

    Two choices make it fast. Rows move by gathers only, forward and backward: the backward of plain indexing is a
    scatter-add, while gathering through the inverse permutation and summing over K is the same thing. And the
    routing weight is folded into the activation before the down projection, so the experts' output need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w13_EHD: Tensor,
        w2_EDI: Tensor,
        weights_TK: Tensor,
        order_N: Tensor,
        inverse_N: Tensor,
        ends_E: Tensor,
        index_S: Tensor | None,
        w13_SHD: Tensor | None,
        w2_SDI: Tensor | None,
    ) -> Tensor:
        top_k = weights_TK.shape[1]
        hidden_NH = grouped_nt(x_TD[order_N // top_k], w13_EHD, ends_E)
        gate_NI, up_NI = hidden_NH.chunk(2, dim=1)
        weight_N1 = weights_TK.flatten()[order_N].unsqueeze(1).to(x_TD.dtype)
        out_ND = grouped_nt(F.silu(gate_NI) * up_NI * weight_N1, w2_EDI, ends_E)
        ctx.save_for_backward(x_TD, w13_EHD, w2_EDI, weights_TK, order_N, inverse_N, ends_E, hidden_NH, index_S)
        return out_ND[inverse_N].unflatten(0, (-1, top_k)).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w13_EHD, w2_EDI, weights_TK, order_N, inverse_N, ends_E, hidden_NH, index_S = ctx.saved_tensors
        needs_x, needs_w13, needs_w2, needs_weights = ctx.needs_input_grad[:4]
        needs_w13_S, needs_w2_S = ctx.needs_input_grad[8:10]
        top_k = weights_TK.shape[1]
        token_N = order_N // top_k
        grad_ND = grads[0][token_N]
        gate_NI, up_NI = hidden_NH.chunk(2, dim=1)
        weight_N1 = weights_TK.flatten()[order_N].unsqueeze(1).to(x_TD.dtype)
        sigmoid_NI = gate_NI.sigmoid()
        silu_NI = gate_NI * sigmoid_NI
        active_NI = silu_NI * up_NI
        grad_x = grad_w13 = grad_w2 = grad_weights = grad_w13_S = grad_w2_S = None
        if needs_w2:
            grad_w2 = grouped_tn(grad_ND, active_NI * weight_N1, ends_E)
        if needs_w2_S:
            grad_w2_S = grouped_tn_some(grad_ND, active_NI * weight_N1, ends_E, index_S)
        if needs_x or needs_w13 or needs_weights or needs_w13_S:
            grad_active_NI = grouped_nt(grad_ND, w2_EDI.transpose(1, 2), ends_E)
            if needs_weights:
                grad_weight_N = (grad_active_NI * active_NI).sum(dim=1, dtype=weights_TK.dtype)
                grad_weights = grad_weight_N[inverse_N].view_as(weights_TK)
            grad_active_NI = grad_active_NI * weight_N1
            grad_hidden_NH = torch.cat(
                (grad_active_NI * up_NI * (sigmoid_NI + silu_NI * (1 - sigmoid_NI)), grad_active_NI * silu_NI), dim=1
            )
            if needs_w13:
                grad_w13 = grouped_tn(grad_hidden_NH, x_TD[token_N], ends_E)
            if needs_w13_S:
                grad_w13_S = grouped_tn_some(grad_hidden_NH, x_TD[token_N], ends_E, index_S)
            if needs_x:
                grad_rows_ND = grouped_nt(grad_hidden_NH, w13_EHD.transpose(1, 2), ends_E)
                grad_x = grad_rows_ND[inverse_N].unflatten(0, (-1, top_k)).sum(dim=1)
        return grad_x, grad_w13, grad_w2, grad_weights, None, None, None, None, grad_w13_S, grad_w2_S


class Experts(nn.Module):
    """E SwiGLU experts, stacked as Hugging Face stacks them: w13 [E, 2I, D] (gate over up), w2 [E, D, I].

    With `trained` set and the stacks frozen, gradients are taken for those experts alone. With `mesh` set
    (`frugal.model.parallelize`), this process holds a part of the stacks, in order of rank.
    """

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        assert config.moe is not None
        moe = config.moe
        self.w13 = nn.Parameter(torch.empty(moe.n_experts, 2 * moe.d_expert, config.d_model))
        self.w2 = nn.Parameter(torch.empty(moe.n_experts, config.d_model, moe.d_expert))
        self.n_experts = moe.n_experts
        self.trained: TrainedExperts | None = None
        self.mesh: DeviceMesh | None = None
        self.same_tokens = False  # whether the processes of the mesh have the same tokens

    def forward(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of each token's experts [T, D], and how many rows each expert got [E].

        Where the stacks are spread over processes with the same tokens, the sum is over this process's experts only.
        """
        if self.mesh is None:
            return self._compute(x_TD, *routing, self.n_experts)

        def own(x_RD: Tensor, weights_R1: Tensor, experts_R1: Tensor) -> Tensor:
            return self._compute(x_RD, weights_R1, experts_R1, local(self.w13).shape[0])[0]

        if self.same_tokens:
            return own_share(own, x_TD, *routing, self.n_experts, self.mesh.get_local_rank(), self.mesh.size())
        return exchanged(own, x_TD, *routing, self.n_experts, self.mesh.get_group())

    def _compute(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
        """The experts whose stacks are here, numbered from 0."""
        order_N, inverse_N, ends_E = dispatch(experts_TK, n_experts)
        load_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
        w13, w2 = local(self.w13), local(self.w2)
        if torch.is_autocast_enabled(x_TD.device.type):
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            x_TD, w13, w2 = x_TD.to(dtype), w13.to(dtype), w2.to(dtype)
        index_S, w13_SHD, w2_SDI = self.trained or (None, None, None)
        if w13_SHD is not None and w2_SDI is not None and torch.is_autocast_enabled(x_TD.device.type):
            w13_SHD, w2_SDI = w13_SHD.to(w13.dtype), w2_SDI.to(w2.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):  # CUDA's would take the sum over K in float32
            out_TD = _GroupedSwiGLU.apply(
                x_TD, w13, w2, weights_TK, order_N, inverse_N, ends_E, index_S, w13_SHD, w2_SDI
            )
        return out_TD, load_E
