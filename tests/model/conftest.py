import pytest

from frugal.model.config import AttentionConfig, MoEConfig, TransformerConfig


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
