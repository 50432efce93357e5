"""Linear maps in float8 (E4M3 forward, E5M2 gradients; Micikevicius et al. 2022, arXiv 2209.05433), through `torchao`.

Weights, optimizer state and everything between two products stay in the run's precision; the products of attention,
dense feed-forwards and shared experts are taken in float8, with scales found anew at each one. Routed experts, routers,
output head, norms and loss stay as they are.
"""

from __future__ import annotations

import logging
import types
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from frugal.errors import UserError, require
from frugal.model.linear import Linear
from frugal.training.lora import LEFT_ALONE, named_by

log = logging.getLogger(__name__)
CAPABILITY = (8, 9)  # Ada and Hopper: the first with float8 products
PRECISIONS = ("bf16-mixed", "bf16-true")


@dataclass(frozen=True)
class Float8:
    """Take linear maps in float8; needs a CUDA device of compute capability 8.9 or more.

    It pays where matrices are wide (thousands), with `model.compile`; narrow ones only pay for the casts.

    Args:
        recipe: one scale per tensor (fastest), per row and column, or per row and column with weight gradients in the
            run's precision (closest to it).
        emulate: compute what float8 would give in the run's precision, on any device: for tests of the numbers, slower.
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    emulate: bool = False


def require_float8(wanted: Float8, precision: str, device: torch.device) -> None:
    """Refuse what this machine or this run cannot do.

    Raises:
        UserError: torchao is missing, or device or precision do not fit.
    """
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        raise UserError('model.fp8: needs torchao; pip install -e ".[lowbit]"') from None
    if wanted.emulate:
        return
    if device.type != "cuda":
        raise UserError(f"model.fp8: needs a CUDA device of compute capability 8.9, not {device.type}; set it to null")
    found = torch.cuda.get_device_capability(device)
    name, version = torch.cuda.get_device_name(device), ".".join(map(str, found))
    require(
        found >= CAPABILITY,
        f"model.fp8: {name} has compute capability {version}, float8 needs 8.9; use trainer.precision bf16-mixed",
    )
    require(precision in PRECISIONS, f"model.fp8: needs trainer.precision bf16-mixed or bf16-true, not {precision}")


def converted_modules(model: nn.Module) -> list[str]:
    """Names of the linear maps that go to float8: plain ones without a bias, all sizes multiples of 16, by name no head
    and no router.
    """
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (Linear, nn.Linear)
        and module.in_features % 16 == module.out_features % 16 == 0  # type: ignore[operator]
        and not any(named_by(pattern, name) for pattern in LEFT_ALONE)
    ]


def convert_to_float8(model: nn.Module, wanted: Float8) -> list[str]:
    """Put float8 maps in the place of the model's, over the same parameters; returns their names.

    Raises:
        UserError: no matrix can be converted.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = converted_modules(model)
    require(bool(names), "model.fp8: no matrix to convert (sizes must be multiples of 16)")
    config: Any = Float8LinearConfig.from_recipe_name(wanted.recipe)
    object.__setattr__(config, "emulate", wanted.emulate)
    plain = {name for name in names if isinstance(model.get_submodule(name), Linear)}
    convert_to_float8_training(model, module_filter_fn=lambda module, name: name in names, config=config)
    for name in plain:  # latent attention decodes with the matrix itself
        layer: Any = model.get_submodule(name)
        layer.full_weight = types.MethodType(_weight, layer)
    held = sum(model.get_parameter(f"{name}.weight").numel() for name in names)
    share = 100 * held / sum(p.numel() for p in model.parameters())
    log.info("fp8: %d matrices with %.0f%% of all parameters in float8, %s", len(names), share, wanted.recipe)
    return names


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight
