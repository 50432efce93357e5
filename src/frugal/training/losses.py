"""Losses that return a sum and how many tokens it sums over: the mean is taken once, over the whole step.

Shape letters: B batch, T tokens, N = B * T positions, D d_model, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.data.batches import IGNORE
from frugal.model.linear import linear, product_nt, product_tn


def next_token_nll(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, float32, [B, T]; zero where the label is -100."""
    with torch.autocast(logits_BTV.device.type, enabled=False):
        nll = F.cross_entropy(
            logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="none"
        )
    return nll.view_as(labels_BT)


def summed_nll(
    hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, chunk: int | None = None, fuse: bool = False
) -> Tensor:
    """Sum over valid positions of the negative log-likelihood in nats: the first of `sum_and_nll`."""
    return sum_and_nll(hidden_BTD, head_VD, labels_BT, chunk, fuse)[0]


def sum_and_nll(
    hidden_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, chunk: int | None = None, fuse: bool = False
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats, from hidden states and the output head: its sum, and each position's.

    The sum is over valid positions; each position's, float32 [B, T], is zero where the label is -100 and carries no
    gradient.

    The logits of only `chunk` positions exist at a time: each chunk's gradient is taken on the spot, in the forward
    pass, so nothing is computed twice (as Liger Kernel does; Hsu et al. 2024, arXiv 2410.10989).

    Args:
        chunk: positions at once; null chooses by device; 0 is the plain way, all logits kept for the backward pass.
        fuse: compile the passes over a chunk's logits into one kernel.
    """
    if hasattr(head_VD, "full_tensor"):  # sharded: gather it, differentiably
        head_VD = head_VD.full_tensor()
    if chunk == 0:
        nll_BT = next_token_nll(linear(hidden_BTD, head_VD), labels_BT)
        return nll_BT.sum(), nll_BT.detach()
    device = hidden_BTD.device.type
    if chunk is None:
        chunk = 512 if device == "cpu" else 4096
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_BTD, head_VD = hidden_BTD.to(dtype), head_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        nats, nll_N = _ChunkedNLL.apply(hidden_BTD.flatten(0, 1), head_VD, labels_BT.flatten(), chunk, fuse)
    return nats, nll_N.view_as(labels_BT)


def _nll_and_gradient(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's loss (float32) and its gradient by the logits, softmax minus one-hot, in the logits' type."""
    logits_NV32 = logits_NV.float()
    valid_N1 = (labels_N != IGNORE).unsqueeze(1)
    target_N1 = labels_N.clamp_min(0).unsqueeze(1)
    log_sum_N1 = torch.logsumexp(logits_NV32, dim=1, keepdim=True)
    nll_N1 = (log_sum_N1 - logits_NV32.gather(1, target_N1)) * valid_N1
    classes_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    gradient_NV = ((logits_NV32 - log_sum_N1).exp() - (classes_V == target_N1).float()) * valid_N1
    return nll_N1, gradient_NV.to(logits_NV.dtype)


def _nll_and_gradient_in_place(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The same for eager mode, with as few passes over the logits as plain operators allow."""
    valid_N1 = (labels_N != IGNORE).unsqueeze(1)
    target_N1 = labels_N.clamp_min(0).unsqueeze(1)
    log_p_NV = torch.log_softmax(logits_NV, dim=1, dtype=torch.float32)
    nll_N1 = -(log_p_NV.gather(1, target_N1) * valid_N1)
    gradient_NV = log_p_NV.exp_()
    gradient_NV.scatter_add_(1, target_N1, -torch.ones_like(target_N1, dtype=torch.float32))
    if logits_NV.device.type != "cpu" or not bool(valid_N1.all()):  # asking is cheap on the CPU only
        gradient_NV *= valid_N1
    return nll_N1, gradient_NV.to(logits_NV.dtype)


@cache
def _fused() -> Any:
    """The first of the two compiled, made at first use: loading the compiler takes a sixth of a run's start."""
    return torch.compile(_nll_and_gradient, dynamic=False)


class _ChunkedNLL(torch.autograd.Function):
    """Loss of the head in chunks, gradients taken in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, chunk: int, fuse: bool
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        nats = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        nll_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # The head's gradient is summed up transposed: the products then copy the narrow hidden states, not the logits.
        grad_head_DV = head_VD.new_zeros(head_VD.shape[::-1], dtype=torch.float32) if needs_head else None
        step = _fused() if fuse else _nll_and_gradient_in_place
        for start in range(0, len(labels_N), chunk):
            rows = slice(start, start + chunk)
            logits_NV = product_nt(hidden_ND[rows], head_VD)
            nll_N1, gradient_NV = step(logits_NV, labels_N[rows])
            nll_N[rows] = nll_N1.squeeze(1)
            nats += nll_N1.sum()
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = product_nt(gradient_NV, head_VD.t())
            if grad_head_DV is not None:
                grad_head_DV += product_tn(hidden_ND[rows], gradient_NV)
        ctx.save_for_backward(grad_hidden_ND, grad_head_DV)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        return nats, nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_head_DV = ctx.saved_tensors
        scale = grads[0]
        grad_hidden = None if grad_hidden_ND is None else (grad_hidden_ND * scale).to(grad_hidden_ND.dtype)
        grad_head = None if grad_head_DV is None else (grad_head_DV * scale).t().contiguous().to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None
