"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Shape letters: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from frugal.model.cache import KVCache
from frugal.model.config import TransformerConfig
from frugal.model.linear import Linear

MakeBlock = Callable[[TransformerConfig, int], nn.Module]


class MTPModule(nn.Module):
    """One step further ahead: from what was known at position i and the token k after it to a guess at token k + 1.

    The module k = 1, 2, ... joins the hidden state of the module before it (of the main model for k = 1) with the
    embedding of token i + k, both normalised, projects them to D and passes them through a block of its own. Embedding
    and output head are the main model's. Position i keeps its own rotary angle.
    """

    def __init__(self, config: TransformerConfig, depth: int, make_block: MakeBlock) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.embedding_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.proj = Linear(2 * config.d_model, config.d_model)
        self.block = make_block(config, config.n_layers + depth)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        embedded_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states and the embeddings of the tokens k further on, [B, T, D] each -> [B, T, D], normalised."""
        joined_BTE = torch.cat((self.hidden_norm(hidden_BTD), self.embedding_norm(embedded_BTD)), dim=-1)
        return self.norm(self.block(self.proj(joined_BTE), rotary, cache))
