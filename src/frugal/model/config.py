"""The model's shape, and everything that can be counted from it without building it.

Defaults here are neutral (a technique is off); `configs/base.yaml` holds the choices of the embedded run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from frugal.errors import require
from frugal.model.attention_config import AttentionConfig, LatentConfig, YarnConfig
from frugal.model.counts import (
    Counts,
    Flops,
    StateMemory,
    count_matrices,
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    muon_flops,
    orthogonalize_flops,
    state_memory,
)
from frugal.model.frozen_counts import Adapter, Frozen
from frugal.model.ngram_config import NgramConfig
from frugal.model.sharing_config import SharingConfig

__all__ = [
    "Adapter",
    "AttentionConfig",
    "BlocksConfig",
    "Counts",
    "Flops",
    "Frozen",
    "LatentConfig",
    "MoEConfig",
    "NgramConfig",
    "SharingConfig",
    "StateMemory",
    "TransformerConfig",
    "YarnConfig",
    "count_matrices",
    "count_parameters",
    "flops_per_token",
    "kv_cache_bytes_per_token",
    "muon_flops",
    "orthogonalize_flops",
    "state_memory",
]


@dataclass(frozen=True)
class MoEConfig:
    """Fine-grained routed experts beside shared ones (DeepSeekMoE, Dai et al. 2024).

    Args:
        n_experts: routed experts per layer.
        top_k: routed experts that each token uses.
        d_expert: hidden width of one expert.
        n_shared_experts: experts that every token uses (built as one SwiGLU of that many times their width).
        d_shared_expert: hidden width of one shared expert; null means d_expert.
        first_k_dense: the first layers keep a dense feed-forward.
        score: how router logits become scores (sigmoid as in DeepSeek-V3, softmax as in OLMoE and Qwen3).
        normalize_weights: make the chosen experts' weights sum to one.
        routed_scaling: factor on the routed experts' weights.
        expert_bias: give each expert a bias on the choice, which balances the load without a loss (its rate is
            expert_bias.rate); published softmax routers have none.
        n_group: the experts lie in this many equal groups, and a token may use only the best topk_group of them
            (DeepSeek-V3, section 2.1.2, to bound the machines a token visits); 1 is off.
        topk_group: groups that each token may use.
        group_score: how a group is scored: by the sum of its two best experts (DeepSeek-V3) or its best (DeepSeek-V2).
        sequence_loss_coef: weight of the balance loss within each sequence (DeepSeek-V3, eq. 17-20); 0 is off.
        global_loss_coef: weight of the balance loss over all tokens of the optimizer step on this device (Fedus et
            al. 2021; Qiu et al. 2025); 0 is off.
        z_loss_coef: weight of the squared log-partition of the router's logits (Zoph et al. 2022, eq. 5); 0 is off.
    """

    n_experts: int
    top_k: int
    d_expert: int
    n_shared_experts: int = 0
    d_shared_expert: int | None = None
    first_k_dense: int = 0
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_weights: bool = True
    routed_scaling: float = 1.0
    expert_bias: bool = True
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["top2", "max"] = "top2"
    sequence_loss_coef: float = 0.0
    global_loss_coef: float = 0.0
    z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        key = "model.transformer.moe"
        require(self.n_experts > 0, f"{key}.n_experts: must be positive, got {self.n_experts}")
        require(
            0 < self.top_k <= self.n_experts,
            f"{key}.top_k: must lie between 1 and n_experts ({self.n_experts}), got {self.top_k}",
        )
        require(self.d_expert > 0, f"{key}.d_expert: must be positive, got {self.d_expert}")
        require(self.n_shared_experts >= 0, f"{key}.n_shared_experts: must not be negative")
        require(self.first_k_dense >= 0, f"{key}.first_k_dense: must not be negative")
        require(
            self.d_shared_expert is None or self.d_shared_expert > 0, f"{key}.d_shared_expert: must be positive or null"
        )
        require(
            self.n_group > 0 and self.n_experts % self.n_group == 0,
            f"{key}.n_group: {self.n_group} does not divide n_experts ({self.n_experts})",
        )
        per_group = self.n_experts // self.n_group
        require(
            0 < self.topk_group <= self.n_group,
            f"{key}.topk_group: must lie between 1 and n_group ({self.n_group}), got {self.topk_group}",
        )
        require(
            self.top_k <= self.topk_group * per_group,
            f"{key}.topk_group: {self.topk_group} groups of {per_group} experts are fewer than top_k ({self.top_k})",
        )
        require(
            self.n_group == 1 or self.group_score == "max" or per_group > 1,
            f"{key}.group_score: top2 needs at least two experts per group",
        )
        for name in ("sequence_loss_coef", "global_loss_coef", "z_loss_coef"):
            require(getattr(self, name) >= 0, f"{key}.{name}: must not be negative, got {getattr(self, name)}")

    @property
    def has_router_loss(self) -> bool:
        """Whether any loss on the router is switched on."""
        return bool(self.sequence_loss_coef or self.global_loss_coef or self.z_loss_coef)

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts together."""
        return self.n_shared_experts * (self.d_shared_expert or self.d_expert)


@dataclass(frozen=True)
class BlocksConfig:
    """A stack of blocks, whatever goes in and comes out; with `moe` left out, every feed-forward is dense.

    Args:
        d_model: width of the residual stream.
        n_layers: layers that a token passes; with `sharing`, several of them use one block.
        d_ff: hidden width of a dense SwiGLU feed-forward.
        attention: the attention's shape.
        moe: the mixture's shape, or null for a dense model.
        sharing: which layers share their weights; null: none do.
        norm_eps: epsilon of every RMSNorm.
        init_std: standard deviation of the initial weights; projections back into the residual stream get
            init_std / sqrt(2 n_layers) (GPT-2), where shared layers count each time they are applied.
    """

    d_model: int
    n_layers: int
    d_ff: int
    attention: AttentionConfig
    moe: MoEConfig | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.02
    sharing: SharingConfig | None = None

    def __post_init__(self) -> None:
        key = "model.transformer"
        for name in ("d_model", "n_layers", "d_ff"):
            require(getattr(self, name) > 0, f"{key}.{name}: must be positive, got {getattr(self, name)}")
        for name in ("norm_eps", "init_std"):
            require(getattr(self, name) >= 0, f"{key}.{name}: must not be negative, got {getattr(self, name)}")
        require(
            self.moe is None or self.moe.first_k_dense < self.n_layers,
            f"{key}.moe.first_k_dense: leaves none of the {self.n_layers} layers to the experts; set moe to null",
        )
        first: dict[int, int] = {}
        for layer, block in enumerate(self.layer_map):
            other = first.setdefault(block, layer)
            require(
                self.is_moe(layer) == self.is_moe(other),
                f"{key}.sharing: layers {other} and {layer} share a block, but moe.first_k_dense makes only the first "
                "dense; add to the prelude",
            )
        if self.attention.latent:
            return
        heads = self.attention.n_heads
        require(
            self.attention.head_dim is not None or self.d_model % heads == 0,
            f"{key}.d_model: {self.d_model} is no multiple of attention.n_heads ({heads}); set attention.head_dim",
        )
        require(self.head_dim % 2 == 0, f"{key}.attention.head_dim: must be even for rotary embeddings")

    # --- what goes in and comes out, as a subclass has it

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence."""
        raise NotImplementedError

    @property
    def n_outputs(self) -> int:
        """Rows of the output head."""
        raise NotImplementedError

    @property
    def input_parameters(self) -> int:
        """Weights below the first block."""
        raise NotImplementedError

    @property
    def input_names(self) -> tuple[str, ...]:
        """How those are called in the model's `state_dict()`."""
        return ("embedding.weight",)

    @property
    def idle_input_parameters(self) -> int:
        """Those of them that one token does not use."""
        return 0

    @property
    def input_width(self) -> int:
        """Numbers of one token that a matrix projects into the residual stream; 0: tokens are looked up."""
        return 0

    @property
    def tie_embeddings(self) -> bool:
        """Whether the embedding is the output head too."""
        return False

    @property
    def n_mtp(self) -> int:
        """Modules of multi-token prediction."""
        return 0

    def ends_per_token(self, seq_len: int) -> tuple[float, float]:
        """Of a sequence's tokens, the shares that the input matrix makes and that the head reads."""
        return 1.0, 1.0

    # --- what follows from the fields

    @property
    def head_dim(self) -> int:
        """Width of one grouped-query head after the default is filled in (latent heads have their own widths)."""
        return self.attention.head_dim or self.d_model // self.attention.n_heads

    @property
    def rotary_dim(self) -> int:
        """How much of each query and key head is rotated."""
        return self.attention.latent.qk_rope_head_dim if self.attention.latent else self.head_dim

    @property
    def layer_map(self) -> tuple[int, ...]:
        """The block that each layer uses; without sharing, layer i uses block i."""
        return self.sharing.layer_map(self.n_layers) if self.sharing else tuple(range(self.n_layers))

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture."""
        return self.moe is not None and layer >= self.moe.first_k_dense

    @property
    def n_moe_layers(self) -> int:
        """Layers whose feed-forward is a mixture."""
        return max(self.n_layers - self.moe.first_k_dense, 0) if self.moe else 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a config from `dataclasses.asdict`, as checkpoints store it."""
        values = dict(values)
        attention = dict(values["attention"])
        for name, kind in (("latent", LatentConfig), ("rope_scaling", YarnConfig)):
            if attention.get(name):
                attention[name] = kind(**attention[name])
        values["attention"] = AttentionConfig(**attention)
        if values.get("moe"):
            values["moe"] = MoEConfig(**values["moe"])
        if values.get("sharing"):
            sharing = dict(values["sharing"])
            sharing["layers"] = tuple(sharing["layers"]) if sharing["layers"] else None
            values["sharing"] = SharingConfig(**sharing)
        return cls(**values)


@dataclass(frozen=True)
class TransformerConfig(BlocksConfig):
    """A decoder-only transformer on text.

    Args:
        vocab_size: rows of the embedding; linked to data.tokenizer.vocab_size.
        max_seq_len: longest sequence; linked to data.seq_len.
        tie_embeddings: use the embedding as the output head too.
        n_mtp: modules that predict further tokens ahead in training, and draft them in generation (DeepSeek-V3,
            section 2.2); 0 is off.
        ngrams: embeddings of the last few tokens together; null: of single tokens alone.
    """

    vocab_size: int = field(kw_only=True)
    max_seq_len: int = field(default=2048, kw_only=True)
    tie_embeddings: bool = field(default=False, kw_only=True)
    n_mtp: int = field(default=0, kw_only=True)
    ngrams: NgramConfig | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        key = "model.transformer"
        for name in ("vocab_size", "max_seq_len"):
            require(getattr(self, name) > 0, f"{key}.{name}: must be positive, got {getattr(self, name)}")
        require(self.n_mtp >= 0, f"{key}.n_mtp: must not be negative, got {self.n_mtp}")
        super().__post_init__()
        require(
            self.n_mtp < self.max_seq_len,
            f"{key}.n_mtp: {self.n_mtp} tokens ahead do not fit into {self.max_seq_len}",
        )
        require(
            self.attention.causal, f"{key}.attention.causal: a language model that sees later tokens sees its answers"
        )
        require(
            self.ngrams is None or self.d_model % self.ngrams.n_hashes == 0,
            f"{key}.ngrams.n_hashes: {self.ngrams and self.ngrams.n_hashes} does not divide d_model ({self.d_model})",
        )

    @property
    def n_outputs(self) -> int:
        """One per token of the vocabulary."""
        return self.vocab_size

    @property
    def input_parameters(self) -> int:
        """The embedding's, and those of n-grams."""
        return self.vocab_size * self.d_model + (self.ngrams.parameters(self.d_model) if self.ngrams else 0)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The embedding, and that of n-grams."""
        return ("embedding.weight", "ngram_embedding.weight") if self.ngrams else ("embedding.weight",)

    @property
    def idle_input_parameters(self) -> int:
        """All rows of the n-grams' tables but those that one token uses."""
        return self.ngrams.parameters(self.d_model) - len(self.ngrams.orders) * self.d_model if self.ngrams else 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a config from `dataclasses.asdict`."""
        values = dict(values)
        if values.get("ngrams"):
            values["ngrams"] = NgramConfig(**{**values["ngrams"], "orders": tuple(values["ngrams"]["orders"])})
        return super().from_dict(values)
