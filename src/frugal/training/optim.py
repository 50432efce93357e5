"""Which parameters an optimizer treats how, and which of its settings come from the config."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from frugal.errors import UserError, require

# Matrices that are looked up or chosen from row by row: decayed like matrices, but not orthogonalized by Muon.
BY_ROW = ("*embedding*", "*embed_tokens*", "*wte*", "*wpe*", "*head.weight", "*router*", "*gate.weight")
# Two projections in one parameter, joined along the output dimension.
JOINED = {"*experts.w13": 2, "*experts.gate_up_proj": 2}


@dataclass(frozen=True)
class ParameterGroup:
    """Some parameters that are treated differently.

    Args:
        pattern: names of parameters or of modules that hold them, with wildcards: embedding, *.router, blocks.0.
        lr_scale: factor on the learning rate.
        weight_decay: in place of the optimizer's.
        matrix: whether Muon orthogonalizes them; null: matrices except embeddings, output head and routers.
    """

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    matrix: bool | None = None

    def __post_init__(self) -> None:
        key = f"model.parameter_groups: {self.pattern}:"
        require(bool(self.pattern), "model.parameter_groups: a pattern is empty")
        require(self.lr_scale >= 0, f"{key} lr_scale must not be negative, got {self.lr_scale}")
        require(
            self.weight_decay is None or self.weight_decay >= 0,
            f"{key} weight_decay must not be negative, got {self.weight_decay}",
        )

    def holds(self, name: str) -> bool:
        """Whether a parameter of this name belongs to it."""
        return fnmatchcase(name, self.pattern) or fnmatchcase(name, f"{self.pattern}.*")


def parameter_groups(model: nn.Module, wanted: Iterable[ParameterGroup] = ()) -> list[dict[str, Any]]:
    """Groups for a torch optimizer; every trainable parameter is in exactly one.

    A group has a `name`; vectors (norms, biases) do not decay; `matrix` and `parts` are for Muon. A parameter belongs
    to the first of `wanted` that holds it, by any of its names; `lr_scale` is left in the group for the caller.

    Raises:
        UserError: a pattern that matches no parameter.
    """
    wanted = list(wanted)
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:  # the base of adapters; what freezes for a while is not frozen yet
            continue
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    for group in wanted:
        if not any(group.holds(name) for known in names.values() for name in known):
            shown = ", ".join(known[0] for known in list(names.values())[:4])
            raise UserError(
                f"model.parameter_groups: {group.pattern} matches no parameter; they are named like {shown}"
            )
    groups: dict[str, dict[str, Any]] = {}
    for key, parameter in parameters.items():
        mine = next((group for group in wanted if any(map(group.holds, names[key]))), None)
        treatment = _default_treatment(names[key], parameter)
        if mine is not None:
            if mine.matrix is not None:
                require(
                    not mine.matrix or parameter.ndim >= 2,
                    f"model.parameter_groups: {mine.pattern}: {names[key][0]} is no matrix",
                )
                treatment["matrix"] = mine.matrix
            if mine.weight_decay is not None:
                treatment["weight_decay"] = mine.weight_decay
            treatment |= {"name": f"{treatment['name']} of {mine.pattern}", "lr_scale": mine.lr_scale}
        groups.setdefault(treatment["name"], {**treatment, "params": []})["params"].append(parameter)
    return list(groups.values())


def _default_treatment(names: list[str], parameter: nn.Parameter) -> dict[str, Any]:
    if parameter.ndim < 2:
        return {"name": "vectors", "matrix": False, "parts": 1, "weight_decay": 0.0}
    if any(fnmatchcase(name, pattern) for name in names for pattern in BY_ROW):
        return {"name": "embeddings and routers", "matrix": False, "parts": 1}
    parts = next((n for pattern, n in JOINED.items() if any(fnmatchcase(name, pattern) for name in names)), 1)
    return {"name": "matrices" if parts == 1 else "joined matrices", "matrix": True, "parts": parts}


def build_optimizer(optimizer: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer over groups as `parameter_groups` gives them.

    Args:
        optimizer: called with the groups; any torch optimizer's class with its other arguments bound.

    Raises:
        UserError: the optimizer refuses a setting.
    """
    try:
        built: torch.optim.Optimizer = optimizer(groups)
    except (ValueError, TypeError, RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"model.optimizer: {error}") from None
    for group in built.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)
        half_on_cpu = any(p.device.type == "cpu" and p.element_size() < 4 for p in group["params"])
        if isinstance(built, torch.optim.SGD) and group["fused"] and half_on_cpu:  # seen with torch 2.13
            raise UserError("model.optimizer.fused: torch's fused SGD is wrong in 16 bits on a CPU; set it to false")
    return built


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group, what the config says: the arguments of the optimizer's class, and none of its running counts."""
    known = inspect.signature(type(optimizer).__init__).parameters
    ours = {*known, "name", "matrix", "parts", "lr_scale"} - {"params"}
    return [{key: group[key] for key in group if key in ours} for group in optimizer.param_groups]


def check_resumed_optimizer(checkpoint: dict[str, Any], optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Refuse a checkpoint whose moments belong to another optimizer or to other groups.

    Raises:
        UserError: saying what differs.
    """
    ours = type(build_optimizer(optimizer, [{"params": [nn.Parameter(torch.zeros(2, 2))]}])).__name__
    advice = "keep the config of its run, or start from its weights (`frugal export`, model.init_from)"
    if checkpoint["optimizer"] != ours:
        raise UserError(f"ckpt_path: the checkpoint was trained with {checkpoint['optimizer']}, not {ours}; {advice}")
    saved = checkpoint["optimizer_states"][0]["param_groups"]
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        raise UserError(f"ckpt_path: the checkpoint has other parameter groups (model.parameter_groups); {advice}")


def use_averages(optimizers: Iterable[torch.optim.Optimizer], averages: bool) -> None:
    """Put into the model the averaged weights (to use and to save) or those that train.

    For optimizers that keep both, with the interface of Schedule-Free (Defazio et al. 2024, arXiv 2405.15682).
    """
    for optimizer in optimizers:
        switch = getattr(optimizer, "eval" if averages else "train", None)
        if callable(switch):
            switch()
