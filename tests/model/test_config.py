"""Counts from the config alone, held against built models and against PyTorch's own counter."""

from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from frugal.errors import UserError
from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig, count_parameters, flops_per_token
from frugal.model.transformer import Transformer

CHANGES = [
    {},
    {"moe": None},
    {"tie_embeddings": True},
    {"attention": AttentionConfig(n_heads=4, head_dim=16, qk_norm="head")},
    {"attention": AttentionConfig(n_heads=4, n_kv_heads=1, qk_norm="full")},
    {"moe": MoEConfig(n_experts=4, top_k=1, d_expert=24)},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_counts_equal_the_built_model(tiny: TransformerConfig, changes: dict) -> None:
    config = replace(tiny, **changes)
    with torch.device("meta"):
        model = Transformer(config)
    counts = count_parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    idle = 0
    for moe in model.moe_layers().values():
        assert config.moe
        idle += sum(p.numel() for p in moe.experts.parameters()) * (1 - config.moe.top_k / config.moe.n_experts)
    assert counts.active == counts.total - idle
    assert counts.active_without_embeddings == counts.active - sum(
        p.numel() for p in {model.embedding.weight, model.head.weight}
    )


@pytest.mark.parametrize("changes", [{}, {"moe": None}, {"tie_embeddings": True}], ids=str)
def test_flops_equal_the_counter_apart_from_attention(tiny: TransformerConfig, changes: dict) -> None:
    """PyTorch's counter does not know causality nor our grouped function, so both are put right by formula."""
    config = replace(tiny, **changes)
    model = Transformer(config)
    batch, seq_len = 2, 32
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 64, (batch, seq_len))).sum().backward()
    by_module = counter.get_flop_counts()["Global"]
    matmuls = sum(v for op, v in by_module.items() if "attention" not in str(op))
    grouped = 0
    if config.moe and not any("grouped" in str(op) for op in by_module):
        grouped = config.n_moe_layers * config.moe.top_k * 3 * 2 * config.d_model * config.moe.d_expert * 3
    ours = flops_per_token(config, seq_len)
    scores = 3 * config.n_layers * 4 * config.attention.n_heads * config.head_dim * (seq_len + 1) / 2
    assert matmuls / (batch * seq_len) + grouped == pytest.approx(ours.training - scores, rel=1e-6)


def test_config_survives_a_checkpoint(tiny: TransformerConfig) -> None:
    assert TransformerConfig.from_dict(asdict(tiny)) == tiny


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_model": 30}, "d_model"),
        ({"d_model": 12}, "head_dim"),
        ({"n_layers": -1}, "n_layers"),
    ],
)
def test_impossible_shapes_name_their_key(tiny: TransformerConfig, changes: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        replace(tiny, **changes)


def test_kv_heads_must_divide() -> None:
    with pytest.raises(UserError, match="n_kv_heads"):
        AttentionConfig(n_heads=4, n_kv_heads=3)
