"""Train some experts of a stack: their slices become parameters of their own in the optimizer.

The slices take the stack's place in its parameter group, with their part of its optimizer state, so the other experts
have no gradient, no decay, no update, and (if they never trained) no state. Widening puts everything back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from frugal.model.experts import Experts, TrainedExperts
from frugal.model.transformer import Transformer

Narrowed = dict[int, tuple[int, ...]]  # by layer, the experts that train


def _per_expert(value: Any, n_experts: int) -> bool:
    """Whether an optimizer's state entry has one slice per expert (moments), not one value for all (step counts)."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == n_experts


class ExpertSlices:
    """Which experts of which layers train alone, and the resting part of their optimizer state.

    Under Adam the step count of a stack is one number: after a thaw, the bias correction of an expert that rested
    counts its layer's steps. Moments and weights are untouched by the rest.
    """

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        self.stacks: dict[int, Experts] = {layer: moe.experts for layer, moe in model.moe_layers().items()}
        self.optimizer = optimizer
        self.narrowed: Narrowed = {}
        self._resting: dict[tuple[int, str], dict[str, Tensor]] = {}
        optimizer.register_step_post_hook(lambda *_: self.write_back())

    def set(self, wanted: Mapping[int, tuple[int, ...]]) -> None:
        """Make exactly these layers train exactly these experts; all others train their whole stacks."""
        for layer in self.stacks:
            if self.narrowed.get(layer) != wanted.get(layer):
                if layer in self.narrowed:
                    self._widen(layer)
                if layer in wanted:
                    self._narrow(layer, wanted[layer])

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the trained slices into the stacks, after an optimizer step."""
        for layer in self.narrowed:
            stack = self.stacks[layer]
            assert stack.trained is not None
            stack.w13.index_copy_(0, stack.trained.index_S, stack.trained.w13_SHD)
            stack.w2.index_copy_(0, stack.trained.index_S, stack.trained.w2_SDI)

    def slices(self) -> list[Tensor]:
        """The leaves that train in place of stacks."""
        trained = [stack.trained for stack in self.stacks.values() if stack.trained is not None]
        return [leaf for t in trained for leaf in (t.w13_SHD, t.w2_SDI)]

    def _swap(self, old: Tensor, new: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]

    @torch.no_grad()
    def _narrow(self, layer: int, experts: tuple[int, ...], adopt: bool = False) -> None:
        stack = self.stacks[layer]
        index_S = torch.tensor(experts, device=stack.w13.device)
        leaves = []
        for name in ("w13", "w2"):
            full = getattr(stack, name)
            leaf = nn.Parameter(full[index_S].clone())
            state = self.optimizer.state.pop(full, {})
            if state and not adopt:
                self._resting[layer, name] = {k: v for k, v in state.items() if _per_expert(v, len(full))}
                state = {k: v[index_S].clone() if _per_expert(v, len(full)) else v for k, v in state.items()}
            if state:
                self.optimizer.state[leaf] = state
            self._swap(full, leaf)
            full.requires_grad_(False)
            full.grad = None
            leaves.append(leaf)
        stack.trained = TrainedExperts(index_S, *leaves)
        self.narrowed[layer] = experts

    @torch.no_grad()
    def _widen(self, layer: int) -> None:
        stack = self.stacks[layer]
        assert stack.trained is not None
        index_S = stack.trained.index_S
        for name, leaf in (("w13", stack.trained.w13_SHD), ("w2", stack.trained.w2_SDI)):
            full = getattr(stack, name)
            resting = self._resting.pop((layer, name), {})
            state = self.optimizer.state.pop(leaf, {})
            for key, value in state.items():
                if _per_expert(value, len(index_S)):
                    whole = resting.get(key)
                    if whole is None:
                        whole = value.new_zeros(len(full), *value.shape[1:])
                    state[key] = whole.index_copy_(0, index_S, value)
            if state:
                self.optimizer.state[full] = state
            self._swap(leaf, full)
            full.requires_grad_(True)
        stack.trained = None
        del self.narrowed[layer]

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Which slices train, and the moments that rest; the optimizer's own state holds those of the slices."""
        resting = {f"{layer}.{name}": state for (layer, name), state in self._resting.items()}
        return {"narrowed": {layer: list(experts) for layer, experts in self.narrowed.items()}, "resting": resting}

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds, whose optimizer state has just been loaded onto the stacks."""
        for key, moments in state["resting"].items():
            layer, _, name = key.partition(".")
            device = self.stacks[int(layer)].w13.device
            self._resting[int(layer), name] = {k: v.to(device) for k, v in moments.items()}
        for layer, experts in state["narrowed"].items():
            self._narrow(int(layer), tuple(experts), adopt=True)
