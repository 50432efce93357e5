"""The transformer's shape, and everything that can be counted from it without building it.

Defaults here are neutral (a technique is off); `configs/base.yaml` holds the choices of the embedded run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from frugal.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (Ainslie et al. 2023) with rotary embeddings (Su et al. 2021).

    Args:
        n_heads: query heads.
        n_kv_heads: key/value heads, each shared by n_heads / n_kv_heads query heads; null means n_heads.
        head_dim: width of one head; null means d_model / n_heads.
        qk_norm: RMS-normalise queries and keys: none, per head, or over all heads at once (full).
        rope_theta: base of the rotary frequencies.
    """

    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        key = "model.transformer.attention"
        _require(self.n_heads > 0, f"{key}.n_heads: must be positive, got {self.n_heads}")
        _require(
            self.n_heads % self.kv_heads == 0,
            f"{key}.n_kv_heads: {self.kv_heads} does not divide n_heads ({self.n_heads})",
        )

    @property
    def kv_heads(self) -> int:
        """Key/value heads after the default is filled in."""
        return self.n_heads if self.n_kv_heads is None else max(self.n_kv_heads, 1)


@dataclass(frozen=True)
class MoEConfig:
    """Fine-grained routed experts beside shared ones (DeepSeekMoE, Dai et al. 2024).

    Args:
        n_experts: routed experts per layer.
        top_k: routed experts that each token uses.
        d_expert: hidden width of one expert.
        n_shared_experts: experts that every token uses (built as one SwiGLU of that many times d_expert).
        first_k_dense: the first layers keep a dense feed-forward.
        score: how router logits become scores (sigmoid as in DeepSeek-V3, softmax as in OLMoE and Qwen3).
        normalize_weights: make the chosen experts' weights sum to one.
        routed_scaling: factor on the routed experts' weights.
    """

    n_experts: int
    top_k: int
    d_expert: int
    n_shared_experts: int = 0
    first_k_dense: int = 0
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_weights: bool = True
    routed_scaling: float = 1.0

    def __post_init__(self) -> None:
        key = "model.transformer.moe"
        _require(self.n_experts > 0, f"{key}.n_experts: must be positive, got {self.n_experts}")
        _require(
            0 < self.top_k <= self.n_experts,
            f"{key}.top_k: must lie between 1 and n_experts ({self.n_experts}), got {self.top_k}",
        )
        _require(self.d_expert > 0, f"{key}.d_expert: must be positive, got {self.d_expert}")
        _require(self.n_shared_experts >= 0, f"{key}.n_shared_experts: must not be negative")
        _require(self.first_k_dense >= 0, f"{key}.first_k_dense: must not be negative")


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer; with `moe` left out, every feed-forward is dense.

    Args:
        vocab_size: rows of the embedding; linked to data.tokenizer.vocab_size.
        d_model: width of the residual stream.
        n_layers: blocks.
        d_ff: hidden width of a dense SwiGLU feed-forward.
        attention: the attention's shape.
        moe: the mixture's shape, or null for a dense model.
        max_seq_len: longest sequence; linked to data.seq_len.
        tie_embeddings: use the embedding as the output head too.
        norm_eps: epsilon of every RMSNorm.
        init_std: standard deviation of the initial weights; projections back into the residual stream get
            init_std / sqrt(2 n_layers) (GPT-2).
    """

    vocab_size: int
    d_model: int
    n_layers: int
    d_ff: int
    attention: AttentionConfig
    moe: MoEConfig | None = None
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        key = "model.transformer"
        for name in ("vocab_size", "d_model", "n_layers", "d_ff", "max_seq_len"):
            _require(getattr(self, name) > 0, f"{key}.{name}: must be positive, got {getattr(self, name)}")
        heads = self.attention.n_heads
        _require(
            self.attention.head_dim is not None or self.d_model % heads == 0,
            f"{key}.d_model: {self.d_model} is no multiple of attention.n_heads ({heads}); set attention.head_dim",
        )
        _require(self.head_dim % 2 == 0, f"{key}.attention.head_dim: must be even for rotary embeddings")

    @property
    def head_dim(self) -> int:
        """Width of one attention head after the default is filled in."""
        return self.attention.head_dim or self.d_model // self.attention.n_heads

    @property
    def n_moe_layers(self) -> int:
        """Blocks whose feed-forward is a mixture."""
        return max(self.n_layers - self.moe.first_k_dense, 0) if self.moe else 0

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TransformerConfig:
        """Rebuild a config from `dataclasses.asdict`, as checkpoints store it."""
        values = dict(values)
        values["attention"] = AttentionConfig(**values["attention"])
        if values.get("moe"):
            values["moe"] = MoEConfig(**values["moe"])
        return TransformerConfig(**values)


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


def _attention_parameters(config: TransformerConfig) -> int:
    attention, d_head = config.attention, config.head_dim
    d_q, d_kv = attention.n_heads * d_head, attention.kv_heads * d_head
    norms = {"none": 0, "head": 2 * d_head, "full": d_q + d_kv}[attention.qk_norm]
    return config.d_model * (d_q + 2 * d_kv) + d_q * config.d_model + norms


def count_parameters(config: TransformerConfig) -> Counts:
    """Count parameters from the config alone; tests hold it against built models."""
    d = config.d_model
    norms = 2 * d
    dense = 3 * d * config.d_ff
    total = active = config.n_layers * (_attention_parameters(config) + norms) + d
    total += (config.n_layers - config.n_moe_layers) * dense
    active += (config.n_layers - config.n_moe_layers) * dense
    if config.moe:
        moe = config.moe
        expert = 3 * d * moe.d_expert
        common = moe.n_shared_experts * expert + moe.n_experts * d  # shared experts and router
        total += config.n_moe_layers * (common + moe.n_experts * expert)
        active += config.n_moe_layers * (common + moe.top_k * expert)
    embedding = config.vocab_size * d
    head = 0 if config.tie_embeddings else embedding
    return Counts(
        total=total + embedding + head,
        active=active + embedding + head,
        # A tied table still works as the head, so only its role as a look-up is left out.
        active_without_input_embedding=active + embedding,
        active_without_embeddings=active,
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
    keys and of probabilities with values over (seq_len + 1) / 2 positions on average: 4 n_heads head_dim per
    position forward and twice that backward (Dao 2023 counts the causal half likewise).
    """
    attention, d_head = config.attention, config.head_dim
    norm_per_layer = 2 * config.d_model + {"none": 0, "head": 2 * d_head}.get(
        attention.qk_norm, (attention.n_heads + attention.kv_heads) * d_head
    )
    weights = (
        count_parameters(config).active_without_input_embedding - config.n_layers * norm_per_layer - config.d_model
    )
    scores = config.n_layers * 4 * attention.n_heads * d_head * (seq_len + 1) / 2
    forward = 2 * weights + scores
    return Flops(forward=forward, backward=2 * forward)
