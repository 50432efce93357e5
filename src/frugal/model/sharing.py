"""Layers that share a block's weights, and what stays their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from frugal.model.linear import Linear, linear
from frugal.model.sharing_config import SharingConfig

DELTA = ("down", "up")  # the parameters of a low-rank correction


class LowRankLinear(Linear):
    """A shared matrix plus this layer's own correction up @ down: [..., in] -> [..., out].

    `down` [rank, in] is drawn like any weight and `up` [out, rank] is zero, so training starts from plain sharing.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__(in_features, out_features)
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Both products."""
        return linear(x, self.weight) + linear(linear(x, self.down), self.up)

    def full_weight(self) -> Tensor:
        """The sum as one matrix, [out, in]."""
        return self.weight + self.up @ self.down


def add_low_rank(module: nn.Module, rank: int) -> None:
    """Give every `Linear` inside `module` a low-rank correction."""
    for name, child in list(module.named_children()):
        if type(child) is Linear:
            setattr(module, name, LowRankLinear(child.in_features, child.out_features, rank))
        else:
            add_low_rank(child, rank)


def tie_blocks(blocks: Sequence[nn.Module], layer_map: Sequence[int], own_norms: bool) -> None:
    """Make every layer use the parameters of the first layer with the same block, but for what is its own.

    A tied parameter appears under every layer's name in `state_dict`, and once in `parameters()`. Buffers (balancing
    biases, loads) are not tied.
    """
    for layer, block in enumerate(blocks):
        owner = blocks[layer_map.index(layer_map[layer])]
        if owner is block:
            continue
        for name, module in block.named_modules():
            if own_norms and isinstance(module, nn.RMSNorm):
                continue
            for key in list(module._parameters):
                if module._parameters[key] is not None and key not in DELTA:
                    setattr(module, key, getattr(owner.get_submodule(name), key))


def shared_layers(sharing: SharingConfig | None, n_layers: int) -> list[int]:
    """The layers whose block another layer uses too."""
    layer_map = sharing.layer_map(n_layers) if sharing else ()
    return [layer for layer, block in enumerate(layer_map) if layer_map.count(block) > 1]


def without_sharing(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the same function without sharing: corrections added in, every tensor with its own memory."""
    merged = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight" and f"{stem}.up" in state:
            merged[name] = tensor + state[f"{stem}.up"] @ state[f"{stem}.down"]
        elif not (leaf in DELTA and f"{stem}.weight" in state):
            merged[name] = tensor.clone()
    return merged
