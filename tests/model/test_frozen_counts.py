"""FLOPs of partly frozen models, held against PyTorch's own counter on the real forward and backward pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from frugal.model.config import (
    AttentionConfig,
    Frozen,
    LatentConfig,
    NgramConfig,
    SharingConfig,
    TransformerConfig,
    flops_per_token,
)
from frugal.model.experts import TrainedExperts
from frugal.model.transformer import Transformer
from frugal.training.losses import summed_nll

BATCH, SEQ = 2, 32
LATENT = LatentConfig(kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
PATTERNS = {
    "nothing": (),
    "prefix with embedding": ("embedding.", "blocks.0.", "blocks.1."),
    "prefix without embedding": ("blocks.0.", "blocks.1."),
    "suffix": ("blocks.1.", "blocks.2.", "norm.", "head."),
    "alternate": ("blocks.1.",),
    "experts only": ("embedding.", "head.", "norm.", "attention", "ffn_norm", "router", "shared", "w1.", "w2.w", "w3."),
    "all but experts": ("experts.w13", "experts.w2"),
    "one matrix": ("blocks.2.attention.wk.", "embedding."),
    "all but queries' norms and the head": ("embedding.", "blocks", "norm."),
}


SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def causal(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The causal half of one call's two products forward."""
    batch, heads, length, width = query
    return batch * heads * length * (length + 1) * (width + value[-1])


def causal_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * causal(query, key, value)


def counted(model: Transformer, ids: torch.Tensor, chunk: int) -> float:
    """FLOPs per token, attention's kernel counted by the two formulas above."""
    mapping = {SDPA: causal, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        hidden = model.hidden(ids)
        loss = summed_nll(hidden, model.head.weight, ids, chunk)
        for k, ahead in enumerate(model.mtp_hidden(hidden, ids), start=1):
            loss = loss + summed_nll(ahead, model.head.weight, ids[:, k:], chunk)
        loss.backward()
    assert any("attention" in str(op) for op in counter.get_flop_counts()["Global"])
    return counter.get_total_flops() / ids.numel()


CHANGES: list[dict] = [
    {},
    {"tie_embeddings": True},
    {"attention": AttentionConfig(n_heads=4, n_kv_heads=1, qk_norm="head")},
    {"attention": AttentionConfig(n_heads=4, latent=LATENT)},
    {"moe": None},
    {"n_mtp": 2},
    {"n_mtp": 1, "tie_embeddings": True, "ngrams": NgramConfig(n_slots=64)},
    {"n_layers": 4, "sharing": SharingConfig(layers=(0, 1, 1, 2), rank=3)},
]
# A dense model has no experts to train alone.
CASES = [(c, p) for c in CHANGES for p in PATTERNS if not (p == "experts only" and c == {"moe": None})]


@pytest.mark.parametrize(("changes", "pattern"), CASES, ids=str)
def test_frozen_flops_equal_the_counter(tiny: TransformerConfig, changes: dict, pattern: str) -> None:
    config = replace(tiny, **changes)
    model = Transformer(config)
    names = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for name in names if any(part in name for part in PATTERNS[pattern])}
    if config.tie_embeddings and ("head.weight" in frozen) and "embedding.weight" not in frozen:
        frozen -= {"head.weight"}
    aliases: dict[int, set[str]] = {}
    for name, p in names.items():
        aliases.setdefault(id(p), set()).add(name)
    if config.sharing:  # a shared block is frozen whole or not at all
        frozen = {name for name in frozen if aliases[id(names[name])] <= frozen}
    for name, p in names.items():
        p.requires_grad_(not aliases[id(p)] <= frozen)
        assert p.requires_grad == (name not in frozen) or config.tie_embeddings
    if config.tie_embeddings and "embedding.weight" in frozen and "head.weight" not in frozen:
        model.embedding.register_forward_hook(lambda module, args, out: out.detach())
    ours = flops_per_token(config, SEQ, Frozen(frozenset(frozen)))
    assert counted(model, torch.randint(0, 64, (BATCH, SEQ)), 16) == pytest.approx(ours.training, rel=1e-6)
    everything = flops_per_token(config, SEQ)
    assert ours.forward == everything.forward and ours.training <= everything.training


def test_only_the_trained_experts_rows_cost_a_weight_gradient(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    model, plain = Transformer(tiny), Transformer(tiny)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, 64, (BATCH, SEQ))
    full = counted(plain, ids, 0)
    shares = []
    model.train()
    for layer, moe in model.moe_layers().items():
        index = torch.tensor([1, 6] if layer == 1 else [0, 2, 7])
        stack = moe.experts
        leaves = [nn.Parameter(w.detach()[index].clone()) for w in (stack.w13, stack.w2)]
        stack.requires_grad_(False)
        stack.trained = TrainedExperts(index, *leaves)
    some = counted(model, ids, 0)
    for layer, moe in model.moe_layers().items():
        trained = moe.experts.trained
        assert trained is not None
        theirs = plain.moe_layers()[layer].experts
        torch.testing.assert_close(trained.w13_SHD.grad, theirs.w13.grad[trained.index_S], rtol=0, atol=0)
        torch.testing.assert_close(trained.w2_SDI.grad, theirs.w2.grad[trained.index_S], rtol=0, atol=0)
        assert moe.experts.w13.grad is None
        shares.append((layer, (moe.load[trained.index_S].sum() / moe.load.sum()).item()))
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, dict(plain.named_parameters())[name].grad, rtol=0, atol=0)
    saved = (
        flops_per_token(tiny, SEQ).training - flops_per_token(tiny, SEQ, Frozen(trained_rows=tuple(shares))).training
    )
    assert saved > 0 and full - some == pytest.approx(saved, rel=1e-5)
