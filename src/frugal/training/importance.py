"""How much each layer or expert matters: mean squares per unit, and the routing statistics of a task.

Units are named as modules: `blocks.3`, or `blocks.3.ffn.experts.7` for one expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from frugal.model.linear import local
from frugal.model.transformer import BlockStack

Units = dict[str, list[str]]  # the parameters of each unit


def block_units(model: BlockStack) -> Units:
    """Each stored block and its parameters under all their names; layers that share a block are one unit."""
    units: Units = {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    layer_map = model.config.layer_map
    for layer, block in enumerate(layer_map):
        unit = units.setdefault(f"blocks.{layer_map.index(block)}", [])
        unit += [name for name in names if name.startswith(f"blocks.{layer}.")]
    return units


def block_mean_squares(tensors: Mapping[str, Tensor], units: Units) -> dict[str, float]:
    """Mean square over all elements of a unit's tensors, sharded or not; a unit without any is left out."""
    inside = {unit: [tensors[name] for name in names if name in tensors] for unit, names in units.items()}
    inside = {unit: members for unit, members in inside.items() if members}
    if not inside:
        return {}
    totals = torch.stack(
        [torch.stack([local(t.detach()).float().square().sum() for t in m]).sum() for m in inside.values()]
    )
    if any(hasattr(t, "to_local") for members in inside.values() for t in members):
        torch.distributed.all_reduce(totals)  # each element is on exactly one process
    sizes = [sum(t.numel() for t in members) for members in inside.values()]
    return {unit: total / size for unit, total, size in zip(inside, totals.tolist(), sizes, strict=True)}


def expert_mean_squares(tensors: Mapping[str, Tensor], stems: Iterable[str]) -> dict[str, float]:
    """The same for each routed expert of these modules, from their stacks w13 [E, 2I, D] and w2 [E, D, I]."""
    found: dict[str, float] = {}
    for stem in stems:
        stacks = [tensors[f"{stem}.{name}"] for name in ("w13", "w2") if f"{stem}.{name}" in tensors]
        if stacks:
            total_E = torch.stack([s.detach().float().square().sum(dim=(1, 2)) for s in stacks]).sum(dim=0)
            size = sum(s[0].numel() for s in stacks)
            found |= {f"{stem}.{i}": value / size for i, value in enumerate(total_E.tolist())}
    return found


@torch.no_grad()
def routing_scores(
    model: BlockStack,
    batches: Iterable[Any],
    visit: Callable[[Any], None],
    score: Literal["token", "gate"],
    context: Any = None,
) -> dict[int, Tensor]:
    """By layer, each expert's share of the token choices or of the gates' weight, summed over tokens, float64 [E].

    ESFT-Token and ESFT-Gate of Wang et al. 2024 (arXiv 2407.01906, section 3.2), up to the number of tokens; a token's
    gates are counted as shares that sum to one.

    Args:
        batches: what the model reads.
        visit: runs one of them through all blocks.
        context: entered around each forward pass (autocast).
    """
    scores: dict[int, Tensor] = {}
    handles = []

    def watch(layer: int, n_experts: int) -> Any:
        def look(module: Any, args: Any) -> None:
            weights_TK, experts_TK = args[1]
            gates_TK = weights_TK.double() / weights_TK.double().sum(dim=1, keepdim=True).clamp_min(1e-20)
            counted_TK = gates_TK if score == "gate" else torch.full_like(gates_TK, 1 / gates_TK.shape[1])
            total_E = scores.setdefault(layer, counted_TK.new_zeros(n_experts))
            total_E.index_add_(0, experts_TK.flatten(), counted_TK.flatten())

        return look

    for layer, moe in model.moe_layers().items():
        handles.append(moe.experts.register_forward_pre_hook(watch(layer, moe.config.n_experts)))
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), context or contextlib.nullcontext():
            for batch in batches:
                visit(batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return scores
