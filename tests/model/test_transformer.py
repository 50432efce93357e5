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
