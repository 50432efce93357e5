"""The attention's shape: grouped-query or latent, its rotary embeddings and their extension to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from frugal.errors import require


@dataclass(frozen=True)
class YarnConfig:
    """A longer context by YaRN (Peng et al. 2023, arXiv 2309.00071), with DeepSeek's two extra exponents.

    Args:
        factor: how many times longer than the original context.
        original_max_seq_len: context before the extension, in tokens.
        beta_fast: frequencies that turn more often than this in the original context stay as they are.
        beta_slow: frequencies that turn less often than this are divided by factor.
        mscale: with mscale_all_dim, weight of the temperature correction on the rotated part (DeepSeek).
        mscale_all_dim: weight of the temperature correction on the whole head; in latent attention it scales the
            softmax, since only a part of each head is rotated (DeepSeek). 0 is off.
        attention_factor: factor on the rotated queries and keys; null derives it from factor and the two above.
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        key = "model.transformer.attention.rope_scaling"
        require(self.factor >= 1, f"{key}.factor: must be at least 1, got {self.factor}")
        require(self.original_max_seq_len > 0, f"{key}.original_max_seq_len: must be positive")
        require(
            self.beta_fast >= self.beta_slow > 0,
            f"{key}.beta_fast: must be at least beta_slow ({self.beta_slow}), both positive, got {self.beta_fast}",
        )

    def _temperature(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def rotary_scale(self) -> float:
        """Factor on cosines and sines: 0.1 ln(factor) + 1 (eq. 15 there) unless the exponents say otherwise."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def softmax_scale(self) -> float:
        """Factor on latent attention's logits, on top of 1 / sqrt(width)."""
        return self._temperature(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from a small latent.

    Args:
        kv_lora_rank: width of the latent from which all heads' keys and values are made.
        q_lora_rank: width of the queries' own latent; null projects queries directly.
        qk_nope_head_dim: part of a query/key head without position.
        qk_rope_head_dim: rotated part of a query/key head; the key's is shared by all heads.
        v_head_dim: width of a value head.
    """

    kv_lora_rank: int
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    def __post_init__(self) -> None:
        key = "model.transformer.attention.latent"
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            require(getattr(self, name) > 0, f"{key}.{name}: must be positive, got {getattr(self, name)}")
        require(self.q_lora_rank is None or self.q_lora_rank > 0, f"{key}.q_lora_rank: must be positive or null")
        require(self.qk_rope_head_dim % 2 == 0, f"{key}.qk_rope_head_dim: must be even for rotary embeddings")


@dataclass(frozen=True)
class AttentionConfig:
    """Attention with rotary embeddings (Su et al. 2021): grouped-query (Ainslie et al. 2023) or latent.

    Args:
        n_heads: query heads.
        n_kv_heads: key/value heads, each shared by n_heads / n_kv_heads query heads; null means n_heads.
        head_dim: width of one head; null means d_model / n_heads.
        qk_norm: RMS-normalise queries and keys: none, per head, or over all heads at once (full).
        rope_theta: base of the rotary frequencies.
        rope_scaling: YaRN, for contexts longer than the model was trained on; null is off.
        latent: multi-head latent attention instead of grouped-query attention; it sets its own head widths.
        causal: each position sees itself and those before it; false: all of the sequence.
    """

    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    rope_theta: float = 10_000.0
    rope_scaling: YarnConfig | None = None
    latent: LatentConfig | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        key = "model.transformer.attention"
        require(self.n_heads > 0, f"{key}.n_heads: must be positive, got {self.n_heads}")
        for name in ("n_kv_heads", "head_dim"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{key}.{name}: must be positive, got {value}")
        require(self.rope_theta > 0, f"{key}.rope_theta: must be positive, got {self.rope_theta}")
        require(
            self.n_heads % self.kv_heads == 0,
            f"{key}.n_kv_heads: {self.kv_heads} does not divide n_heads ({self.n_heads})",
        )
        if self.latent:
            # An overlay on a grouped-query config keeps that config's keys: say which one to reset.
            for name, neutral in (("n_kv_heads", None), ("head_dim", None), ("qk_norm", "none")):
                value = getattr(self, name)
                require(
                    value == neutral,
                    f"{key}.{name}: means nothing beside {key}.latent; set it to {neutral or 'null'}, got {value}",
                )

    @property
    def kv_heads(self) -> int:
        """Key/value heads after the default is filled in."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def seen(self, seq_len: int) -> float:
        """Positions that one of a sequence attends to, on average."""
        return (seq_len + 1) / 2 if self.causal else seq_len
