"""Embeddings of the last few tokens together, looked up by hash (see `NgramConfig`).

Shape letters: B batch, T tokens, O orders, H hashes, C = D / H columns of a table, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frugal.model.ngram_config import NgramConfig

# Finalizer of SplitMix64 (Steele et al. 2014) as signed 64-bit integers, whose products wrap around.
GOLDEN, MIX1, MIX2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def ngram_slots(ids_BT: Tensor, config: NgramConfig, vocab_size: int) -> Tensor:
    """The row of each position's n-grams in each table, int64 [B, T, O, H] in [0, n_slots).

    An integer function of the last n tokens alone; positions before the first token count as a token of their own.
    """
    base = vocab_size + 1
    seeds_H = torch.arange(config.n_hashes, device=ids_BT.device)
    found = []
    for order in config.orders:
        key_BT = ids_BT
        for back in range(1, order):
            before_BT = torch.full_like(ids_BT, vocab_size)
            before_BT[:, back:] = ids_BT[:, :-back]
            key_BT = key_BT * base + before_BT
        mixed_BTH = (key_BT.unsqueeze(-1) + 1) * GOLDEN + (seeds_H * len(config.orders) + order) * MIX1
        for factor in (MIX1, MIX2):
            mixed_BTH = (mixed_BTH ^ (mixed_BTH >> 30)) * factor
        found.append((mixed_BTH ^ (mixed_BTH >> 31)).remainder(config.n_slots))
    return torch.stack(found, dim=2)


class NgramEmbedding(nn.Module):
    """Token ids [B, T] -> what their n-grams add to the residual stream [B, T, D]; zero at the start."""

    def __init__(self, config: NgramConfig, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.weight = nn.Parameter(torch.empty(config.n_tables * config.n_slots, d_model // config.n_hashes))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Look up each table's part and join them; the orders add up."""
        slots_BTOH = ngram_slots(ids_BT, self.config, self.vocab_size)
        tables_OH = torch.arange(self.config.n_tables, device=ids_BT.device).view(slots_BTOH.shape[2:])
        rows_BTOHC = nn.functional.embedding(slots_BTOH + tables_OH * self.config.n_slots, self.weight)
        return rows_BTOHC.flatten(3).sum(dim=2)
