import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from frugal.model.config import AttentionConfig, TransformerConfig
from frugal.model.generation import generate, sample_token
from frugal.model.transformer import Transformer


def test_no_position_sees_a_later_one(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny).eval()
    ids = torch.randint(0, 64, (2, 20))
    changed = ids.clone()
    changed[:, 12:] = torch.randint(0, 64, (2, 8))
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


def test_rotary_attention_depends_on_distance_only(tiny: TransformerConfig) -> None:
    """A dense model without absolute positions gives a repeated window the same logits wherever it starts."""
    torch.manual_seed(0)
    model = Transformer(replace(tiny, n_layers=1, moe=None)).eval()
    ids = torch.randint(0, 64, (1, 10))
    shifted = model.cos[5:15], model.sin[5:15]
    x = model.embedding(ids)
    torch.testing.assert_close(
        model.blocks[0](x, (model.cos[:10], model.sin[:10])), model.blocks[0](x, shifted), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(n_heads=4),
        AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm="head"),
        AttentionConfig(n_heads=4, n_kv_heads=1, qk_norm="full"),
    ],
    ids=str,
)
def test_generation_with_the_cache_equals_generation_without(
    tiny: TransformerConfig, attention: AttentionConfig
) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(tiny, attention=attention))
    prompt = torch.randint(0, 64, (3, 5))
    for temperature in (0.0, 1.0):
        cached, plain = (
            generate(
                model, prompt, 20, temperature, 0.9, generator=torch.Generator().manual_seed(1), use_cache=use_cache
            )
            for use_cache in (True, False)
        )
        assert cached.tolist() == plain.tolist() and cached.shape == (3, 25)
    assert model.training  # left as it was


def test_chunks_through_the_cache_equal_one_pass(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny).eval()
    ids = torch.randint(0, 64, (2, 16))
    caches = model.new_caches(2, 16)
    pieces = [model(ids[:, a:b], caches) for a, b in ((0, 6), (6, 7), (7, 16))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-5)


def test_generation_stops_at_the_end_token_and_at_the_longest_sequence(tiny: TransformerConfig) -> None:
    model = Transformer(tiny)
    assert generate(model, torch.zeros(1, 30, dtype=torch.long), 100).shape == (1, 32)
    with torch.no_grad():
        model.head.weight.zero_()  # every logit is equal, so the likeliest token is the first: 0
    out = generate(model, torch.full((2, 3), 7), 10, temperature=0, stop_token=0)
    assert out.tolist() == [[7, 7, 7, 0]] * 2


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(logits, 1.0, 0.7, generator)
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)
    assert sample_token(logits, 1.0, 1e-9, generator).unique().tolist() == [0]


@pytest.mark.slow
def test_overfits_twenty_sequences(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(tiny, init_std=0.05))
    ids = torch.randint(0, 64, (20, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(300):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Sequences may begin alike, so the first target is partly unpredictable: leave it out.
    nll = F.cross_entropy(model(ids[:, :-1])[:, 2:].flatten(0, 1), ids[:, 3:].flatten())
    assert nll < 0.02


def test_buffers_stay_in_float32_when_the_weights_are_cast(tiny: TransformerConfig) -> None:
    model = Transformer(tiny)
    router = model.moe_layers()[1].router
    router.expert_bias.fill_(0.8)
    model = model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert router.expert_bias[0].item() == pytest.approx(0.8, abs=1e-7)
    assert torch.equal(model.cos, Transformer(tiny).cos)
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


def test_the_router_decides_in_float32_under_autocast(tiny: TransformerConfig) -> None:
    torch.manual_seed(0)
    moe = Transformer(tiny).moe_layers()[1]
    x = torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, experts = moe.router(x)[:2]
        out = moe(x[None])
    plain_weights, plain_experts = moe.router(x)[:2]
    assert weights.dtype == torch.float32 and torch.equal(experts, plain_experts)
    assert torch.equal(weights, plain_weights)
    assert out.dtype == torch.bfloat16  # while the experts compute in bfloat16


def test_branches_into_the_residual_stream_start_smaller(tiny: TransformerConfig) -> None:
    block = Transformer(replace(tiny, d_model=128, n_layers=8, init_std=0.1)).blocks[0]
    assert block.attention.wq.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert block.attention.wo.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)


def test_rotary_angles_by_hand(tiny: TransformerConfig) -> None:
    model = Transformer(tiny)
    frequency = 10_000 ** (-2 / 8)  # the second of four pairs of a head of width 8
    assert model.cos[5, 1].item() == pytest.approx(math.cos(5 * frequency), abs=1e-6)
    assert model.sin[7, 0].item() == pytest.approx(math.sin(7.0), abs=1e-6)
