"""Counts from the config alone, held against built models and against PyTorch's own counter."""

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from frugal.errors import UserError
from frugal.model.config import (
    AttentionConfig,
    LatentConfig,
    MoEConfig,
    TransformerConfig,
    YarnConfig,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    state_memory,
)
from frugal.model.transformer import Transformer

LATENT = LatentConfig(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
CHANGES = [
    {},
    {"moe": None},
    {"tie_embeddings": True},
    {"attention": AttentionConfig(n_heads=4, head_dim=16, qk_norm="head")},
    {"attention": AttentionConfig(n_heads=4, n_kv_heads=1, qk_norm="full")},
    {"moe": MoEConfig(n_experts=4, top_k=1, d_expert=24)},
    {"moe": MoEConfig(n_experts=4, top_k=2, d_expert=24, n_shared_experts=2, d_shared_expert=8, expert_bias=False)},
    {"attention": AttentionConfig(n_heads=4, latent=LATENT)},
    {"attention": AttentionConfig(n_heads=3, latent=replace(LATENT, q_lora_rank=20))},
]


def size_of(model: Transformer) -> int:
    """Parameters, and the routers' biases, which training keeps as buffers."""
    biases = (name for name in model.state_dict() if name.endswith("expert_bias"))
    return sum(p.numel() for p in model.parameters()) + sum(model.state_dict()[name].numel() for name in biases)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_counts_equal_the_built_model(tiny: TransformerConfig, changes: dict) -> None:
    config = replace(tiny, **changes)
    with torch.device("meta"):
        model = Transformer(config)
    counts = count_parameters(config)
    assert counts.total == size_of(model)
    idle = 0
    for moe in model.moe_layers().values():
        assert config.moe
        idle += sum(p.numel() for p in moe.experts.parameters()) * (1 - config.moe.top_k / config.moe.n_experts)
    assert counts.active == counts.total - idle
    assert counts.active_without_embeddings == counts.active - sum(
        p.numel() for p in {model.embedding.weight, model.head.weight}
    )


@pytest.mark.parametrize("changes", [*CHANGES[:3], *CHANGES[-2:]], ids=str)
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
    qk, v = (10, 10) if config.attention.latent else (config.head_dim, config.head_dim)
    scores = 3 * config.n_layers * 2 * config.attention.n_heads * (qk + v) * (seq_len + 1) / 2
    assert matmuls / (batch * seq_len) + grouped == pytest.approx(ours.training - scores, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, *CHANGES[-3:]], ids=str)
def test_cache_bytes_equal_the_buffers(tiny: TransformerConfig, changes: dict) -> None:
    config = replace(tiny, **changes)
    caches = Transformer(config).new_caches(batch_size=3, max_len=7)
    assert sum(cache.nbytes for cache in caches) == 3 * 7 * kv_cache_bytes_per_token(config, bytes_per_element=4)


def test_state_memory_equals_what_training_keeps(tiny: TransformerConfig) -> None:
    model = Transformer(tiny)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(32).unsqueeze(0)).sum().backward()
    optimizer.step()
    memory = state_memory(tiny)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert memory.weights == 4 * size_of(model)
    assert memory.gradients == sum(g.nbytes for g in grads)
    assert memory.optimizer == sum(m.nbytes for m in moments)
    assert memory.total == 16 * count_parameters(tiny).total - 12 * 2 * 8  # two layers' biases are not trained


@pytest.mark.parametrize("yarn", [None, YarnConfig(factor=4.0, original_max_seq_len=8, mscale=1.0)])
def test_config_survives_a_checkpoint(tiny_latent: TransformerConfig, yarn: YarnConfig | None) -> None:
    config = replace(tiny_latent, attention=replace(tiny_latent.attention, rope_scaling=yarn))
    assert TransformerConfig.from_dict(asdict(config)) == config


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


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: AttentionConfig(n_heads=4, n_kv_heads=2, latent=LATENT), r"attention\.n_kv_heads.*null, got 2"),
        (lambda: AttentionConfig(n_heads=4, qk_norm="head", latent=LATENT), r"attention\.qk_norm.*none, got head"),
        (lambda: LatentConfig(kv_lora_rank=0), r"latent\.kv_lora_rank"),
        (lambda: LatentConfig(kv_lora_rank=4, qk_rope_head_dim=3), r"latent\.qk_rope_head_dim.*even"),
        (lambda: YarnConfig(factor=0.5, original_max_seq_len=8), r"rope_scaling\.factor"),
        (lambda: MoEConfig(8, 2, 4, n_group=3), r"moe\.n_group: 3 does not divide n_experts \(8\)"),
        (lambda: MoEConfig(8, 2, 4, n_group=4, topk_group=5), r"moe\.topk_group"),
        (lambda: MoEConfig(8, 3, 4, n_group=4, topk_group=1), r"moe\.topk_group: 1 groups of 2 .* top_k \(3\)"),
        (lambda: MoEConfig(8, 2, 4, n_group=8, topk_group=2), r"moe\.group_score"),
        (lambda: MoEConfig(8, 2, 4, z_loss_coef=-1), r"moe\.z_loss_coef"),
    ],
)
def test_impossible_combinations_name_their_key(make: Callable[[], object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()
