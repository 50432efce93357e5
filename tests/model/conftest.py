from dataclasses import replace

import pytest

from frugal.model.config import AttentionConfig, LatentConfig, MoEConfig, TransformerConfig


@pytest.fixture
def tiny() -> TransformerConfig:
    """Three layers, the first dense; grouped heads; eight experts of which two are active; one shared."""
    return TransformerConfig(
        vocab_size=64,
        d_model=32,
        n_layers=3,
        d_ff=48,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2),
        moe=MoEConfig(n_experts=8, top_k=2, d_expert=16, n_shared_experts=1, first_k_dense=1),
        max_seq_len=32,
        init_std=0.2,
    )


@pytest.fixture
def tiny_latent(tiny: TransformerConfig) -> TransformerConfig:
    """The same with latent attention and a latent for the queries too."""
    latent = LatentConfig(kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
    return replace(tiny, attention=AttentionConfig(n_heads=4, latent=latent))
