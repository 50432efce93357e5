"""Grouped-query attention with rotary embeddings.

Shape letters: B batch, T tokens of this call, S tokens seen so far (cache included), H query heads, G key/value
heads, C width of a head, D d_model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.cache import KVCache, causal_mask
from frugal.model.config import BlocksConfig
from frugal.model.linear import Linear
from frugal.model.rope import rotated


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), optionally with QK-norm (Henry et al. 2020)."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        attention, d_head = config.attention, config.head_dim
        self.n_heads, self.n_kv_heads, self.head_dim = attention.n_heads, attention.kv_heads, d_head
        self.qk_norm, self.causal = attention.qk_norm, attention.causal
        d_q, d_kv = self.n_heads * d_head, self.n_kv_heads * d_head
        self.wq = Linear(config.d_model, d_q)
        self.wk = Linear(config.d_model, d_kv)
        self.wv = Linear(config.d_model, d_kv)
        self.wo = Linear(d_q, config.d_model)
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = nn.RMSNorm(d_head if per_head else d_q, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(d_head if per_head else d_kv, eps=config.norm_eps)

    def _heads(self, x_BTD: Tensor, norm: nn.Module | None) -> Tensor:
        """[B, T, heads * C] -> [B, heads, T, C], normalised before or after the split."""
        if norm is not None and self.qk_norm == "full":
            x_BTD = norm(x_BTD)
        x_BTHC = x_BTD.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.qk_norm == "head":
            x_BTHC = norm(x_BTHC)
        return x_BTHC.transpose(1, 2)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None) -> Tensor:
        """Attend from each position to itself and all earlier ones, or to all; [B, T, D] -> [B, T, D].

        `rotary` holds the cosines and sines of exactly these T positions, or is None where positions enter otherwise.
        With a cache (for causal attention), earlier positions come from it.
        """
        normed = self.qk_norm != "none"
        q_BHTC = rotated(self._heads(self.wq(x_BTD), self.q_norm if normed else None), rotary)
        k_BGTC = rotated(self._heads(self.wk(x_BTD), self.k_norm if normed else None), rotary)
        v_BGTC = self._heads(self.wv(x_BTD), None)
        mask_TS = None
        causal = self.causal
        if cache is not None:
            k_BGTC, v_BGTC = cache.append(k_BGTC, v_BGTC)
            new, seen = q_BHTC.shape[2], k_BGTC.shape[2]
            causal = new == seen
            mask_TS = causal_mask(new, seen, x_BTD.device)
        if self.n_kv_heads != self.n_heads:
            repeats = self.n_heads // self.n_kv_heads
            k_BGTC, v_BGTC = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTC, v_BGTC))
        out_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, attn_mask=mask_TS, is_causal=causal)
        return self.wo(out_BHTC.transpose(1, 2).flatten(2))

    def new_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache of keys and values, each [B, G, max_len, C]."""
        return KVCache([(self.n_kv_heads, self.head_dim)] * 2, batch_size, max_len, device, dtype)
