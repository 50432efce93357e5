"""Routed experts that live on several processes: tokens travel to their experts, or stay where all have them.

Shape letters: T tokens, D d_model, E experts in all, e experts of this process, K experts per token, N = T * K rows
sorted by expert, R rows that this process computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from frugal.model.grouped import dispatch

# rows [R, D], their weights [R, 1] and their experts among this process's own [R, 1] -> [R, D]
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Rows(torch.autograd.Function):
    """x[order // K], whose backward gathers through the inverse permutation too (plain indexing scatters)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = top_k
        return x_TD[order_N // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0][inverse_N].unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


@torch.compiler.disable
def exchanged(
    compute: Compute, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, n_experts: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Expert parallelism: every process has its own tokens and E / size experts, in order of rank.

    Rows go to their experts' owners with one all-to-all of uneven sizes and come back with another; the sizes go ahead
    in a small one, for which the host waits.

    Returns:
        The weighted sum of each token's experts [T, D], and how many rows each expert got from this process [E].
    """
    size, top_k = group.size(), weights_TK.shape[1]
    order_N, inverse_N, ends_E = dispatch(experts_TK, n_experts)
    load_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).long()
    arriving_E = torch.empty_like(load_E)  # by sending process, then by this process's expert
    dist.all_to_all_single(arriving_E, load_E, group=group)
    leaving, arriving = torch.stack((load_E, arriving_E)).view(2, size, -1).sum(dim=2).tolist()
    rows_ND = _Rows.apply(x_TD, order_N, inverse_N, top_k)
    rows_RD = collectives.all_to_all_single_autograd(rows_ND, arriving, leaving, group)
    own_E = torch.arange(n_experts // size, device=x_TD.device).repeat(size)
    experts_R1 = own_E.repeat_interleave(arriving_E, output_size=sum(arriving)).unsqueeze(1)
    out_RD = compute(rows_RD, weights_TK.new_ones(len(experts_R1), 1), experts_R1)
    back_ND = collectives.all_to_all_single_autograd(out_RD, leaving, arriving, group)
    back_ND = _Rows.apply(back_ND, inverse_N, order_N, 1)
    weighted_TKD = back_ND.unflatten(0, (-1, top_k)) * weights_TK.unsqueeze(2).to(back_ND.dtype)
    return weighted_TKD.sum(dim=1), load_E


@torch.compiler.disable
def own_share(
    compute: Compute, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, n_experts: int, rank: int, size: int
) -> tuple[Tensor, Tensor]:
    """Within tensor parallelism: all processes have the same tokens, and each computes its own experts' rows.

    Returns:
        This process's part of the weighted sum [T, D], to be summed over processes, and every expert's rows [E].
    """
    n_own, top_k = n_experts // size, weights_TK.shape[1]
    first = rank * n_own
    order_N, _, ends_E = dispatch(experts_TK, n_experts)
    load_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    bounds = torch.cat((ends_E.new_zeros(1), ends_E))[[first, first + n_own]].tolist()
    rows_R = order_N[bounds[0] : bounds[1]]
    experts_R1 = (experts_TK.flatten()[rows_R] - first).unsqueeze(1)
    out_RD = compute(x_TD[rows_R // top_k], weights_TK.flatten()[rows_R].unsqueeze(1), experts_R1)
    return torch.zeros_like(x_TD, dtype=out_RD.dtype).index_add(0, rows_R // top_k, out_RD), load_E
