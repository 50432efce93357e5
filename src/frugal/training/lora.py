"""Low-rank adapters on a frozen base (LoRA, Hu et al. 2021, arXiv 2106.09685), through `peft`.

An adapted matrix multiplies with W + (alpha / rank) B A. W has no gradient and no optimizer state; A [rank, in] is
drawn, B [out, rank] starts at zero, so training starts from the base. In a `state_dict` W is `X.base_layer.weight`, A
and B are `X.lora_A.default.weight` and `X.lora_B.default.weight`, X being the adapted module.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from frugal.errors import UserError, require
from frugal.model.config import Adapter, Frozen

log = logging.getLogger(__name__)
ADAPTER = "default"  # what peft calls an adapter without a name
HEADS = ("head", "lm_head", "embed_out", "output", "*.lm_head")
# Not adapted unless a pattern names them: matrices that choose experts.
LEFT_ALONE = (*HEADS, "*.router", "*.gate")


@dataclass(frozen=True)
class LoRA:
    """Train low-rank adapters alone; everything else rests (but for the routers' balancing biases: expert_bias.rate).

    Args:
        rank: inner width of each adapter.
        alpha: the adapter's product is scaled by alpha / rank.
        targets: matrices that get an adapter: names of modules or of what holds them, with wildcards (blocks.0,
            *.attention, *.wq; *.q_proj in a transformers model); null: all but the output head and the routers.
        dropout: share of an adapter's inputs that is dropped in training.
        train: further parameters that train whole, named in the same way (norm, *.router).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None
    dropout: float = 0.0
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.rank > 0, f"model.lora.rank: must be positive, got {self.rank}")
        require(self.alpha > 0, f"model.lora.alpha: must be positive, got {self.alpha}")
        require(0 <= self.dropout < 1, f"model.lora.dropout: must lie in [0, 1), got {self.dropout}")
        require(self.targets != (), "model.lora.targets: an empty list adapts nothing; null adapts all matrices")

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / self.rank


def require_peft() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError('model.lora: needs peft; pip install -e ".[lora]"') from None
    return peft


def adapted_modules(model: nn.Module, targets: Iterable[str] | None) -> list[str]:
    """Names of the matrices that get an adapter, in the model's order.

    Raises:
        UserError: a pattern that names no matrix, stacked experts alone, or the output head.
    """
    matrices = [name for name, module in model.named_modules() if is_matrix(module)]
    if targets is None:
        found = {name for name in matrices if not any(named_by(pattern, name) for pattern in LEFT_ALONE)}
    else:
        found = set()
        for pattern in targets:
            hits = {name for name in matrices if named_by(pattern, name)}
            if not hits:
                stacks = [name for name, p in model.named_parameters() if p.ndim == 3 and named_by(pattern, name)]
                require(
                    not stacks,
                    f"model.lora.targets: {pattern!r} names stacked experts ({''.join(stacks[:1])}); an adapter of the "
                    "whole stack takes its full weight gradient and saves no work: use freezing.experts instead",
                )
                raise UserError(f"model.lora.targets: {pattern!r} matches no matrix; they are named like {matrices[0]}")
            found |= hits
        heads = [name for name in found if any(named_by(pattern, name) for pattern in HEADS)]
        require(not heads, f"model.lora.targets: {''.join(heads[:1])} is the output head; name it in model.lora.train")
    return [name for name in matrices if name in found]


def is_matrix(module: nn.Module) -> bool:
    """Whether it is a linear map (GPT-2 keeps its own in a Conv1D of transformers)."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether it keeps its matrix as [in, out]."""
    return type(module).__name__ == "Conv1D"


def named_by(pattern: str, name: str) -> bool:
    """Whether a pattern names this module or parameter, or what holds it; `lm.` in front may be left out."""
    known = (name, name.removeprefix("lm."))
    return any(fnmatchcase(name, wanted) for name in known for wanted in (pattern, f"{pattern}.*"))


def add_adapters(model: nn.Module, lora: LoRA) -> Frozen:
    """Freeze the model and give its matrices adapters, in place; returns what rests and what is added, for the counts.

    Raises:
        UserError: peft is missing, or a pattern matches nothing.
    """
    peft = require_peft()
    targets = adapted_modules(model, lora.targets)
    whole = _whole(model, lora.train)
    transposed = any(is_transposed(model.get_submodule(name)) for name in targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, fan_in_fan_out=transposed
    )
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    adapters, resting = [], set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(".lora_" in name or id(parameter) in whole)
        if not parameter.requires_grad:
            resting.add(name.replace(".base_layer.", "."))
    for name in targets:
        layer: Any = model.get_submodule(name)
        adapters.append(Adapter(name, lora.rank, layer.in_features, layer.out_features))
        if hasattr(layer.base_layer, "full_weight"):  # latent attention decodes with the matrix itself
            layer.full_weight = types.MethodType(_full_weight, layer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    log.info(
        "lora: %d adapters; %d of %d parameters train (%.2f%%)", len(targets), trained, total, 100 * trained / total
    )
    return Frozen(frozenset(resting), adapters=tuple(adapters))


def _whole(model: nn.Module, patterns: Iterable[str]) -> set[int]:
    found: set[int] = set()
    for pattern in patterns:
        hits = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if named_by(pattern, name)}
        require(bool(hits), f"model.lora.train: {pattern!r} matches no parameter")
        found |= hits
    return found


def _full_weight(layer: Any) -> Tensor:
    weight: Tensor = layer.base_layer.full_weight() + layer.get_delta_weight(ADAPTER)
    return weight


def merged(state: Mapping[str, Tensor], scale: float, transposed: Collection[str] = ()) -> dict[str, Tensor]:
    """The `state_dict` of the same function without adapters: W + scale B A in the place of the three; needs no peft.

    Args:
        state: of a model with adapters.
        scale: `LoRA.scale`.
        transposed: modules that keep their matrix as [in, out].
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, base, leaf = name.rpartition(".base_layer.")
        if not base:
            if ".lora_" not in name:
                plain[name] = tensor
            continue
        if leaf == "weight":
            a, b = (state[f"{stem}.lora_{x}.{ADAPTER}.weight"].float() for x in "AB")
            delta = scale * (b @ a)
            tensor = (tensor.float() + (delta.T if stem in transposed else delta)).to(tensor.dtype)
        plain[f"{stem}.{leaf}"] = tensor
    return plain


def plain_weights(checkpoint: Mapping[str, Any], transposed: Collection[str] = ()) -> dict[str, Tensor]:
    """The model's `state_dict` in a checkpoint of a run, adapters merged in."""
    stem = "model."
    state = {k.removeprefix(stem): v for k, v in checkpoint["state_dict"].items() if k.startswith(stem)}
    lora = checkpoint.get("lora")
    return merged(state, LoRA(**lora).scale, transposed) if lora else state
