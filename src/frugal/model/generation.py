"""Sampling text, one token at a time, with a key/value cache.

Shape letters: B batch, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frugal.model.hf_model import HFModel
from frugal.model.transformer import Transformer


def distribution(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """What `sample_token` draws from, as probabilities [B, V]."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits_BV.argmax(dim=-1), logits_BV.shape[-1]).float()
    probabilities_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    sorted_BV, token_BV = probabilities_BV.sort(dim=-1, descending=True)
    # A token stays if the ones before it have not yet reached top_p; the first always stays.
    sorted_BV[sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p] = 0.0
    kept_BV = torch.zeros_like(probabilities_BV).scatter_(-1, token_BV, sorted_BV)
    return kept_BV / kept_BV.sum(dim=-1, keepdim=True)


def sample_token(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row, [B]. Temperature 0 takes the likeliest.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): only the smallest set of tokens whose probabilities
    add up to at least top_p is kept.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial(distribution(logits_BV, temperature, top_p), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: Transformer | HFModel,
    prompt_BT: Tensor,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue a prompt; returns prompt and continuation, [B, T + new].

    Generation ends after `max_new_tokens`, at the model's max_seq_len, or when every row has drawn `stop_token`
    (finished rows are padded with it). The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    room = min(max_new_tokens, model.config.max_seq_len - prompt_BT.shape[1])
    ids_BT = prompt_BT
    caches: Any = model.new_caches(prompt_BT.shape[0], prompt_BT.shape[1] + max(room, 0)) if use_cache else None
    fresh_BT = prompt_BT
    finished_B = torch.zeros(prompt_BT.shape[0], dtype=torch.bool, device=prompt_BT.device)
    for _ in range(room):
        logits_BV = model(ids_BT if caches is None else fresh_BT, caches)[:, -1]
        token_B = sample_token(logits_BV, temperature, top_p, generator)
        if stop_token is not None:
            token_B = torch.where(finished_B, stop_token, token_B)
            finished_B |= token_B == stop_token
        fresh_BT = token_B.unsqueeze(1)
        ids_BT = torch.cat((ids_BT, fresh_BT), dim=1)
        if stop_token is not None and bool(finished_B.all()):
            break
    model.train(was_training)
    return ids_BT
