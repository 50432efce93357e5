"""Muon for matrices, AdamW for everything else, in one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from frugal.model.config import orthogonalize_flops
from frugal.model.linear import local
from frugal.training.clipping import gradients
from frugal.training.exchange import layout

# The quintic of Jordan et al. 2024: steep at zero, so that small singular values grow fast; the others end up in
# about [0.7, 1.2], which is near enough to one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(x_NRC: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Bring all singular values of each matrix of a batch near one: U S V^T becomes about U V^T.

    A Newton-Schulz iteration: matrix products alone, on the shorter side. In bfloat16 on CUDA, in float32 elsewhere.

    Args:
        x_NRC: N matrices [R, C].
        steps: iterations; five suffice for a condition number of about a thousand.

    Returns:
        [N, R, C] in the input's dtype. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if tall else x_NRC
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(x_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    A parameter of three dimensions is a stack of matrices, one of each expert: all matrices of one shape, over all
    layers and experts, are orthogonalized in one batch. Groups with `matrix: False` (embeddings, router, vectors) are
    left to AdamW with the same settings. A group's `parts` says of how many matrices of equal size its parameters are
    joined along the output dimension, as gate and up projection are.

    Of weights that are sharded over processes each shard has its own momentum; a matrix is put together and
    orthogonalized on one process of those that have parts of it.

    Args:
        params: groups of parameters, as `frugal.training.optim.parameter_groups` makes them.
        lr: learning rate of matrices.
        weight_decay: decoupled decay, of both kinds.
        momentum: decay of the gradient's average.
        nesterov: look one step ahead.
        ns_steps: iterations of the orthogonalization.
        adjust_lr: match_rms_adamw scales an update to the size of AdamW's, 0.2 sqrt(max(rows, columns)), so that
            AdamW's learning rate and decay fit (Liu et al. 2025, arXiv 2502.16982); original scales by
            sqrt(max(1, rows / columns)).
        adamw_lr: learning rate of all the rest; null is the same as lr.
        betas: AdamW's, for the rest.
        eps: AdamW's, for the rest.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("adamw_lr", adamw_lr or 0.0), ("eps", eps)):
            if value < 0:
                raise ValueError(f"Invalid {name}: {value}")
        if not all(0 <= beta < 1 for beta in (momentum, *betas)):
            raise ValueError(f"Invalid momentum or betas: {momentum}, {betas}")
        if ns_steps < 1:
            raise ValueError(f"Invalid ns_steps: {ns_steps}")
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps,
            "adjust_lr": adjust_lr, "betas": tuple(betas), "eps": eps, "matrix": None, "parts": 1,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            if group["matrix"] is None:
                group["matrix"] = all(p.ndim >= 2 for p in group["params"])
            if not group["matrix"] and adamw_lr is not None:
                group["lr"] *= adamw_lr / lr

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Matrices of one shape and the same settings, whatever group they are in.
        batches: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if not group["matrix"]:
                self._adamw(group, params)
                continue
            for p, update in zip(params, self._momentum(group, params), strict=True):
                rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
                local(p).mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * _scale(rows, columns, group["adjust_lr"])
                key = (rows, columns, group["ns_steps"], p.device, p.dtype, layout(p, rows))
                batches[key].append((local(p), update, rate))
        for (rows, columns, steps, device, _, where), members in batches.items():
            stacks = [where.stack(update) for _, update, _ in members]
            whole = where.gather(torch.cat(stacks))
            done = orthogonalize(whole.view(-1, rows, columns), steps).reshape(whole.shape)
            back = where.scatter(done, sum(map(len, stacks))).to(device)
            for (part, _, rate), piece in zip(members, back.split([len(stack) for stack in stacks]), strict=True):
                part.add_(piece.reshape(part.shape), alpha=-rate)
        return loss

    def _momentum(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        grads = gradients(params)
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        if not group["nesterov"]:
            return buffers
        return list(torch._foreach_lerp(grads, buffers, group["momentum"]))

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if "step" not in self.state[p]:
                self.state[p] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            [local(p) for p in params],
            gradients(params),
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def flops(self) -> int:
        """FLOPs of a step's orthogonalizations, of the parameters that train now; all else is next to nothing."""
        total = 0
        for group in self.param_groups:
            for p in group["params"] if group["matrix"] else ():
                if p.requires_grad:
                    rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
                    count = p.numel() // (rows * columns)
                    total += count * orthogonalize_flops(rows, columns, group["ns_steps"])
        return total


def _scale(rows: int, columns: int, adjust_lr: str) -> float:
    if adjust_lr == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
