"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, section 2.1.1).

Shape letters: B batch, T tokens of this call, S tokens seen so far (cache included), H heads, D d_model, R width of the
keys' and values' latent, N part of a query/key head without position, P its rotated part, V width of a value head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frugal.model.cache import KVCache, causal_mask
from frugal.model.config import BlocksConfig
from frugal.model.linear import Linear
from frugal.model.rope import rotated

LATENT_NORM_EPS = 1e-6  # of the latents' own norms in every published model, whatever the other norms use


class LatentAttention(nn.Module):
    """Attention whose keys and values are made from one latent per token.

    Generation caches that latent and the one rotated key that all heads share, R + P numbers per token and layer
    instead of H (N + P + V).
    """

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        attention = config.attention
        latent = attention.latent
        assert latent is not None
        self.n_heads, self.kv_rank, self.causal = attention.n_heads, latent.kv_lora_rank, attention.causal
        self.nope, self.rope, self.v_head_dim = latent.qk_nope_head_dim, latent.qk_rope_head_dim, latent.v_head_dim
        yarn = attention.rope_scaling
        self.scale = (yarn.softmax_scale if yarn else 1.0) / math.sqrt(self.nope + self.rope)
        d_q = self.n_heads * (self.nope + self.rope)
        self.q_rank = latent.q_lora_rank
        if self.q_rank is None:
            self.wq = Linear(config.d_model, d_q)
        else:
            self.wq_down = Linear(config.d_model, self.q_rank)
            self.q_norm = nn.RMSNorm(self.q_rank, eps=LATENT_NORM_EPS)
            self.wq_up = Linear(self.q_rank, d_q)
        self.wkv_down = Linear(config.d_model, self.kv_rank + self.rope)
        self.kv_norm = nn.RMSNorm(self.kv_rank, eps=LATENT_NORM_EPS)
        self.wkv_up = Linear(self.kv_rank, self.n_heads * (self.nope + self.v_head_dim))
        self.wo = Linear(self.n_heads * self.v_head_dim, config.d_model)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None) -> Tensor:
        """Attend from each position to itself and all earlier ones, or to all; [B, T, D] -> [B, T, D].

        `rotary` holds the cosines and sines of exactly these T positions, or is None where positions enter otherwise.
        With a cache (for causal attention), earlier positions come from it.
        """
        q_BTE = self.wq(x_BTD) if self.q_rank is None else self.wq_up(self.q_norm(self.wq_down(x_BTD)))
        q_BHTE = q_BTE.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        q_BHTN, q_BHTP = q_BHTE.split((self.nope, self.rope), dim=-1)
        q_BHTP = rotated(q_BHTP, rotary)
        latent_BTR, k_BTP = self.wkv_down(x_BTD).split((self.kv_rank, self.rope), dim=-1)
        latent_B1SR = self.kv_norm(latent_BTR).unsqueeze(1)
        k_B1SP = rotated(k_BTP.unsqueeze(1), rotary)
        if cache is not None:
            latent_B1SR, k_B1SP = cache.append(latent_B1SR, k_B1SP)
        new, seen = q_BHTE.shape[2], latent_B1SR.shape[2]
        if new == seen:
            out_BHTV = self._expanded(q_BHTN, q_BHTP, latent_B1SR, k_B1SP)
        else:
            out_BHTV = self._absorbed(q_BHTN, q_BHTP, latent_B1SR, k_B1SP)
        return self.wo(out_BHTV.transpose(1, 2).flatten(2))

    def _expanded(self, q_BHTN: Tensor, q_BHTP: Tensor, latent_B1SR: Tensor, k_B1SP: Tensor) -> Tensor:
        """Make every head's keys and values, as in training: cheapest where T = S."""
        kv_BSHE = self.wkv_up(latent_B1SR.squeeze(1)).unflatten(-1, (self.n_heads, -1))
        k_BHSN, v_BHSV = kv_BSHE.transpose(1, 2).split((self.nope, self.v_head_dim), dim=-1)
        k_BHSE = torch.cat((k_BHSN, k_B1SP.expand(-1, self.n_heads, -1, -1)), dim=-1)
        q_BHTE = torch.cat((q_BHTN, q_BHTP), dim=-1)
        return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSV, is_causal=self.causal, scale=self.scale)

    def _absorbed(self, q_BHTN: Tensor, q_BHTP: Tensor, latent_B1SR: Tensor, k_B1SP: Tensor) -> Tensor:
        """Attend to the latents themselves: q (W_k c) = (W_k^T q) c, and the sum over c goes through W_v afterwards.

        Never makes the S keys and values of all heads (DeepSeek-V2, section 2.1.2, "absorbed").
        """
        w_HER = self.wkv_up.full_weight().unflatten(0, (self.n_heads, -1))
        w_k_HNR, w_v_HVR = w_HER.split((self.nope, self.v_head_dim), dim=1)
        q_BHTQ = torch.cat((q_BHTN @ w_k_HNR.to(q_BHTN.dtype), q_BHTP), dim=-1)
        k_BHSQ = torch.cat((latent_B1SR, k_B1SP), dim=-1).expand(-1, self.n_heads, -1, -1)
        v_BHSR = latent_B1SR.expand(-1, self.n_heads, -1, -1)
        mask_TS = causal_mask(q_BHTN.shape[2], latent_B1SR.shape[2], q_BHTN.device)
        out_BHTR = F.scaled_dot_product_attention(q_BHTQ, k_BHSQ, v_BHSR, attn_mask=mask_TS, scale=self.scale)
        return out_BHTR @ w_v_HVR.transpose(1, 2).to(out_BHTR.dtype)

    def new_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache of latents [B, 1, max_len, R] and rotated keys [B, 1, max_len, P]."""
        return KVCache([(1, self.kv_rank), (1, self.rope)], batch_size, max_len, device, dtype)
