from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.model.cache import KVCache
from frugal.model.config import TransformerConfig, YarnConfig
from frugal.model.generation import generate
from frugal.model.latent_attention import LatentAttention
from frugal.model.rope import apply_rotary, rotary_table
from frugal.model.transformer import Transformer

YARN = YarnConfig(factor=4.0, original_max_seq_len=8, mscale=1.0, mscale_all_dim=0.7)


def variants(config: TransformerConfig) -> list[TransformerConfig]:
    attention = config.attention
    assert attention.latent
    no_query_latent = replace(attention, latent=replace(attention.latent, q_lora_rank=None))
    return [replace(config, attention=a) for a in (attention, no_query_latent, replace(attention, rope_scaling=YARN))]


def one_head_at_a_time(layer: LatentAttention, x_BTD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The oracle: DeepSeek-V2's equations 37-47, head by head and with a plain softmax."""
    q = layer.wq(x_BTD) if layer.q_rank is None else layer.wq_up(layer.q_norm(layer.wq_down(x_BTD)))
    latent, k_rope = layer.wkv_down(x_BTD).split((layer.kv_rank, layer.rope), dim=-1)
    kv = layer.wkv_up(layer.kv_norm(latent))
    k_rope = apply_rotary(k_rope, *rotary)
    future = torch.ones(x_BTD.shape[1], x_BTD.shape[1], dtype=torch.bool).triu(1)
    outs = []
    for q_head, kv_head in zip(q.chunk(layer.n_heads, -1), kv.chunk(layer.n_heads, -1), strict=True):
        q_nope, q_rope = q_head.split((layer.nope, layer.rope), dim=-1)
        k_nope, v = kv_head.split((layer.nope, layer.v_head_dim), dim=-1)
        logits = q_nope @ k_nope.mT + apply_rotary(q_rope, *rotary) @ k_rope.mT
        outs.append((logits * layer.scale).masked_fill(future, float("-inf")).softmax(-1) @ v)
    return layer.wo(torch.cat(outs, dim=-1))


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_equals_one_head_at_a_time(tiny_latent: TransformerConfig, variant: int) -> None:
    torch.manual_seed(0)
    config = variants(tiny_latent)[variant]
    layer = LatentAttention(config)
    x = torch.randn(2, 11, 32)
    rotary = rotary_table(4, 11, 10_000.0, config.attention.rope_scaling)
    torch.testing.assert_close(layer(x, rotary), one_head_at_a_time(layer, x, rotary), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_chunks_through_the_cache_equal_one_pass(tiny_latent: TransformerConfig, variant: int) -> None:
    """The first piece expands keys and values, the later ones attend to the latents: two algorithms, one result."""
    torch.manual_seed(0)
    model = Transformer(variants(tiny_latent)[variant]).eval()
    ids = torch.randint(0, 64, (2, 16))
    caches = model.new_caches(2, 16)
    pieces = [model(ids[:, a:b], caches) for a, b in ((0, 6), (6, 7), (7, 16))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_generation_with_the_cache_equals_generation_without(tiny_latent: TransformerConfig, variant: int) -> None:
    torch.manual_seed(0)
    model = Transformer(variants(tiny_latent)[variant])
    prompt = torch.randint(0, 64, (3, 5))
    for temperature in (0.0, 1.0):
        cached, plain = (
            generate(model, prompt, 27, temperature, 0.9, generator=torch.Generator().manual_seed(1), use_cache=cache)
            for cache in (True, False)
        )
        assert cached.tolist() == plain.tolist() and cached.shape == (3, 32)


def test_the_cache_holds_only_the_latent_and_one_rotary_key(tiny_latent: TransformerConfig) -> None:
    model = Transformer(tiny_latent)
    (cache, *_) = caches = model.new_caches(batch_size=2, max_len=9)
    assert [tuple(buffer.shape) for buffer in cache.buffers] == [(2, 1, 9, 12), (2, 1, 9, 4)]
    ids = torch.randint(0, 64, (2, 9))
    model(ids, caches)
    block = model.blocks[0]
    latent = block.attention.wkv_down(block.attention_norm(model.embedding(ids)))[..., :12]
    torch.testing.assert_close(cache.buffers[0][:, 0], F.rms_norm(latent, (12,), eps=1e-6))


def test_yarn_changes_what_a_long_context_says(tiny_latent: TransformerConfig) -> None:
    torch.manual_seed(0)
    config = variants(tiny_latent)[2]
    scaled, plain = Transformer(config).eval(), Transformer(tiny_latent).eval()
    plain.load_state_dict(scaled.state_dict())
    ids = torch.randint(0, 64, (1, 20))
    assert (scaled(ids) - plain(ids)).abs().max() > 1e-3


def test_a_cache_follows_its_tensors() -> None:
    cache = KVCache([(2, 4)], 1, 8, torch.device("cpu"), torch.float32)
    (stored,) = cache.append(torch.zeros(1, 2, 3, 4, device="meta"))
    assert stored.device.type == "meta" and stored.shape == (1, 2, 3, 4)
