"""What a transformer costs, counted from its config alone: parameters, FLOPs, cache and training state.

Imports neither torch nor the model; tests hold every figure against built models and published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frugal.model.config import TransformerConfig


@dataclass(frozen=True)
class Counts:
    """Parameters of a transformer.

    `active` counts what one token uses, in the field's three conventions: with all embeddings, without the input
    embedding, and without both embedding and output head.
    """

    total: int
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int


def _attention_parameters(config: TransformerConfig) -> tuple[int, int]:
    """Weights of one layer's projections, and of its norms."""
    attention, d = config.attention, config.d_model
    heads = attention.n_heads
    if latent := attention.latent:
        d_q = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        q = latent.q_lora_rank * (d + d_q) if latent.q_lora_rank else d * d_q
        kv_down = d * (latent.kv_lora_rank + latent.qk_rope_head_dim)
        kv_up = latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        return q + kv_down + kv_up + heads * latent.v_head_dim * d, (latent.q_lora_rank or 0) + latent.kv_lora_rank
    d_q, d_kv = heads * config.head_dim, attention.kv_heads * config.head_dim
    norms = {"none": 0, "head": 2 * config.head_dim, "full": d_q + d_kv}[attention.qk_norm]
    return 2 * d * (d_q + d_kv), norms


def _by_kind(config: TransformerConfig) -> tuple[int, int, int, int]:
    """Active weights without embeddings that multiply, norms' weights, routers' biases, and idle experts' weights."""
    d, layers = config.d_model, config.n_layers
    projections, attention_norms = _attention_parameters(config)
    matrices = layers * projections + (layers - config.n_moe_layers) * 3 * d * config.d_ff
    norms = layers * (attention_norms + 2 * d) + d
    idle = biases = 0
    if moe := config.moe:
        expert = 3 * d * moe.d_expert
        router_and_shared = moe.n_experts * d + 3 * d * moe.shared_width
        matrices += config.n_moe_layers * (router_and_shared + moe.top_k * expert)
        idle = config.n_moe_layers * (moe.n_experts - moe.top_k) * expert
        biases = config.n_moe_layers * moe.n_experts * moe.expert_bias
    return matrices, norms, biases, idle


def count_parameters(config: TransformerConfig) -> Counts:
    """Count parameters, the routers' balancing biases among them, as DeepSeek-V3's published total does."""
    matrices, norms, biases, idle = _by_kind(config)
    body = matrices + norms + biases
    embedding = config.vocab_size * config.d_model
    active = body + embedding * (1 if config.tie_embeddings else 2)
    return Counts(
        total=active + idle,
        active=active,
        # A tied table still works as the head, so only its role as a look-up is left out.
        active_without_input_embedding=body + embedding,
        active_without_embeddings=body,
    )


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token at one sequence length (a multiply-add counts as two)."""

    forward: float
    backward: float

    @property
    def training(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


def flops_per_token(config: TransformerConfig, seq_len: int) -> Flops:
    """FLOPs of one token in a training step, matrix products only.

    Every weight that multiplies a token costs 2 FLOPs forward and 4 backward (gradients of input and of weight):
    2 N and 4 N with N the active parameters without the input embedding (Kaplan et al. 2020, section 2.1), less the
    norms, which are no matrix products. Causal attention adds, per layer and token, the products of queries with
    keys and of probabilities with values over (seq_len + 1) / 2 positions on average: 2 n_heads (d_qk + d_v) per
    position forward and twice that backward (Dao 2023 counts the causal half likewise). In this convention DeepSeek-V3
    costs 250 GFLOPs per token at 4,096 tokens, the figure of its authors (Zhao et al. 2025, arXiv 2505.09343, table 2).
    """
    attention, d_head = config.attention, config.head_dim
    matrices, *_ = _by_kind(config)
    latent = attention.latent
    widths = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim if latent else 2 * d_head
    scores = config.n_layers * 2 * attention.n_heads * widths * (seq_len + 1) / 2
    forward = 2 * (matrices + config.vocab_size * config.d_model) + scores
    return Flops(forward=forward, backward=2 * forward)


def kv_cache_bytes_per_token(config: TransformerConfig, bytes_per_element: int = 2) -> int:
    """Bytes that one token of context occupies in the cache during generation, all layers together.

    Grouped-query attention keeps keys and values of its kv heads; latent attention keeps one latent and one rotary
    key for all heads (DeepSeek-V2, section 2.1.2): 70,272 bytes for DeepSeek-V3 in bfloat16.
    """
    if latent := config.attention.latent:
        elements = latent.kv_lora_rank + latent.qk_rope_head_dim
    else:
        elements = 2 * config.attention.kv_heads * config.head_dim
    return config.n_layers * elements * bytes_per_element


@dataclass(frozen=True)
class StateMemory:
    """Bytes that training keeps for the whole run, before any sharding and without activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.weights + self.gradients + self.optimizer


def state_memory(
    config: TransformerConfig, weight_bytes: int = 4, gradient_bytes: int = 4, moment_bytes: int = 4
) -> StateMemory:
    """Memory of weights, gradients and AdamW's two moments; the defaults are float32 throughout.

    The routers' biases have no gradient and no moments; everything else takes 16 bytes by default.
    """
    total = count_parameters(config).total
    trained = total - _by_kind(config)[2]
    return StateMemory(total * weight_bytes, trained * gradient_bytes, 2 * trained * moment_bytes)
