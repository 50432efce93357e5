"""Depth against width: shapes of one family that cost the same, counted without building them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from frugal.errors import UserError, require
from frugal.model.config import (
    MoEConfig,
    TransformerConfig,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    state_memory,
)
from frugal.planning.offers import step_floor
from frugal.units import short

Kind = Literal["params", "active", "flops"]
MAX_WIDTH = 65_536
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Budget:
    """What all shapes of a list have in common.

    Args:
        kind: stored parameters, parameters active per token, or training FLOPs per token.
        value: how much of it.
    """

    kind: Kind
    value: float

    @staticmethod
    def parse(text: str, base: TransformerConfig, seq_len: int) -> Budget:
        """`params`, `active` and `flops` mean as much as the base has; 100M, 1.5B or 2GFLOP say it outright."""
        for kind in get_args(Kind):
            if text == kind:
                return Budget(kind, cost(base, kind, seq_len))
        found = re.fullmatch(r"([0-9.]+)\s*([KMBGT]?)\s*(FLOPs?)?", text.replace(",", "").strip(), re.IGNORECASE)
        try:
            value = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
        except ValueError:
            value = 0.0
        require(
            value > 0,
            f"budget: {text!r} is none of params, active, flops, a number of parameters (100M) or of training FLOPs "
            "per token (2GFLOP)",
        )
        return Budget("flops" if found and found[3] else "params", value)


def cost(config: TransformerConfig, kind: Kind, seq_len: int) -> float:
    """What one shape costs in the budget's terms."""
    if kind == "flops":
        return flops_per_token(config, seq_len).training
    counts = count_parameters(config)
    return counts.total if kind == "params" else counts.active


def _multiple(value: float) -> int:
    """The nearest width that hardware likes: a multiple of 8, of 64 from 512 on."""
    step = 64 if value >= 512 else 8
    return max(step, round(value / step) * step)


def _with_heads(base: TransformerConfig, heads: int, n_layers: int) -> TransformerConfig:
    """The base with another number of heads of the same width, another depth, and all else in proportion."""
    attention, scale = base.attention, heads / base.attention.n_heads
    latent = attention.latent
    if latent:
        q_rank = latent.q_lora_rank and _multiple(latent.q_lora_rank * scale)
        latent = replace(latent, kv_lora_rank=_multiple(latent.kv_lora_rank * scale), q_lora_rank=q_rank)
    kv = attention.n_kv_heads and round(attention.n_kv_heads * scale)
    attention = replace(attention, n_heads=heads, n_kv_heads=kv, latent=latent)
    d_model = round(base.d_model * scale)
    return _with_width(replace(base, d_model=d_model, attention=attention, n_layers=n_layers), base, scale)


def _with_width(config: TransformerConfig, base: TransformerConfig, scale: float) -> TransformerConfig:
    """The same with feed-forwards, dense and experts', `scale` times as wide as the base's."""
    moe: MoEConfig | None = base.moe
    if moe:
        shared = moe.d_shared_expert and _multiple(moe.d_shared_expert * scale)
        moe = replace(moe, d_expert=_multiple(moe.d_expert * scale), d_shared_expert=shared)
    return replace(config, d_ff=_multiple(base.d_ff * scale), moe=moe)


def _nearest(values: Callable[[int], float], target: float, low: int, high: int) -> int:
    """The integer in [low, high] at which a growing function comes closest to the target."""
    first, last = low, high
    while low < high:
        middle = (low + high) // 2
        if values(middle) < target:
            low = middle + 1
        else:
            high = middle
    return min((n for n in (low - 1, low) if first <= n <= last), key=lambda n: abs(values(n) - target))


def shape_of_depth(base: TransformerConfig, n_layers: int, budget: Budget, seq_len: int) -> TransformerConfig | None:
    """The shape of this depth that meets the budget, or None where the depth is impossible for this family.

    Heads keep their width, so the model's width is a multiple of it: the nearest one, after which the feed-forwards
    take up the rest, at half to twice the base's proportion to the width.
    """
    n_heads, kv_heads = base.attention.n_heads, base.attention.kv_heads
    most = max(n_heads, round(MAX_WIDTH * n_heads / base.d_model))
    # Only numbers of heads that keep the width per head and the heads per key/value head.
    heads = [h for h in range(1, most + 1) if base.d_model * h % n_heads == kv_heads * h % n_heads == 0]
    try:
        at = _nearest(
            lambda i: cost(_with_heads(base, heads[i], n_layers), budget.kind, seq_len), budget.value, 0, len(heads) - 1
        )
        wide = _with_heads(base, heads[at], n_layers)
    except UserError:
        return None
    scale = wide.d_model / base.d_model
    fine = max(1, (base.moe.d_expert if base.moe else base.d_ff) * wide.d_model // base.d_model)
    step = _nearest(
        lambda i: cost(_with_width(wide, base, scale * i / fine), budget.kind, seq_len),
        budget.value,
        max(1, fine // 2),
        2 * fine,
    )
    return _with_width(wide, base, scale * step / fine)


def equal_shapes(base: TransformerConfig, budget: Budget, seq_len: int, tolerance: float) -> list[TransformerConfig]:
    """Shapes from shallow and wide to deep and narrow, the base itself among them where it meets the budget.

    Args:
        seq_len: tokens per sequence at which attention's FLOPs are counted.
        tolerance: largest relative distance from the budget.

    Raises:
        UserError: no shape of this family meets the budget.
    """
    require(
        base.sharing is None or base.sharing.layers is None,
        "shapes: model.transformer.sharing.layers fixes the depth; use n_blocks",
    )

    def misses(config: TransformerConfig) -> float:
        return abs(cost(config, budget.kind, seq_len) / budget.value - 1)

    found: dict[int, TransformerConfig] = {}
    # Quarter octaves around the base's depth, from a quarter of it to four times it.
    for n_layers in sorted({max(1, round(base.n_layers * 2 ** (i / 4))) for i in range(-8, 9)}):
        config = shape_of_depth(base, n_layers, budget, seq_len)
        if n_layers == base.n_layers and misses(base) < 1e-9:
            config = base
        if config and misses(config) <= tolerance:
            found[n_layers] = config
    if not found:
        raise UserError(
            f"budget: no shape of this family comes within {tolerance:.0%} of {budget.value:.4g} "
            f"{'FLOPs per token' if budget.kind == 'flops' else 'parameters'}; raise --tolerance or the budget"
        )
    return [found[n_layers] for n_layers in sorted(found)]


def shape_row(
    config: TransformerConfig,
    budget: Budget,
    seq_len: int,
    flops_per_second: float | None,
    tokens_per_step: int,
    launched: bool = False,
) -> dict[str, Any]:
    """Everything about one shape as plain numbers.

    `step_seconds` is training FLOPs over `flops_per_second`, what the device achieves; None if that is unknown. With
    `launched` it is no less than what launching the kernels of one micro-batch takes, which grows with the depth.
    """
    counts, flops = count_parameters(config), flops_per_token(config, seq_len)
    seconds = flops.training * tokens_per_step / flops_per_second if flops_per_second else None
    if seconds is not None and launched:
        seconds = max(seconds, step_floor(config))
    return {
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "aspect": config.d_model / config.n_layers,
        "n_heads": config.attention.n_heads,
        "n_kv_heads": config.attention.kv_heads,
        "d_ff": config.d_ff,
        "d_expert": config.moe.d_expert if config.moe else None,
        "parameters": counts.total,
        "active": counts.active,
        "applied": counts.applied,
        "training_flops_per_token": flops.training,
        "kv_cache_bytes_per_token_bfloat16": kv_cache_bytes_per_token(config),
        "state_bytes": state_memory(config).total,
        "step_seconds": seconds,
        "off_budget": cost(config, budget.kind, seq_len) / budget.value - 1,
    }


def shapes_table(rows: list[dict[str, Any]], base: TransformerConfig) -> str:
    """The rows for the eye; the base is marked."""
    heads = ["layers", "d_model", "aspect", "heads", "kv", "d_ff", "d_expert", "params", "active", "applied"]
    heads += ["FLOP/token", "KV B/token", "state", "step", "off"]
    table = [heads]
    d_expert = base.moe.d_expert if base.moe else None
    for row in rows:
        seconds = row["step_seconds"]
        mine = (base.n_layers, base.d_model, base.d_ff, d_expert)
        is_base = (row["n_layers"], row["d_model"], row["d_ff"], row["d_expert"]) == mine
        table.append(
            [
                f"{row['n_layers']}{'*' if is_base else ''}",
                *(str(row[key]) for key in ("d_model",)),
                f"{row['aspect']:.1f}",
                *(str(row[key]) for key in ("n_heads", "n_kv_heads", "d_ff")),
                str(row["d_expert"] or "-"),
                *(short(row[key]) for key in ("parameters", "active", "applied", "training_flops_per_token")),
                f"{row['kv_cache_bytes_per_token_bfloat16']:,}",
                short(row["state_bytes"], "B"),
                "-" if seconds is None else f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s",
                f"{row['off_budget']:+.1%}",
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
