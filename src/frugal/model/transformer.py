"""The blocks between an embedding and a head, the decoder on text, and all weight initialisation in one function.

Shape letters: B batch, T tokens, S tokens seen so far, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from frugal.model.attention import Attention
from frugal.model.cache import KVCache
from frugal.model.config import BlocksConfig, TransformerConfig
from frugal.model.experts import Experts
from frugal.model.latent_attention import LatentAttention
from frugal.model.linear import Linear
from frugal.model.moe import MoE, SwiGLU
from frugal.model.mtp import MTPModule
from frugal.model.ngrams import NgramEmbedding
from frugal.model.patches import PatchEmbedding
from frugal.model.rope import rotary_table
from frugal.model.router import Router
from frugal.model.sharing import LowRankLinear, add_low_rank, shared_layers, tie_blocks

Result = TypeVar("Result")


class Block(nn.Module):
    """Pre-norm block: attention, then a dense or a mixture feed-forward, each on a residual branch."""

    def __init__(self, config: BlocksConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = LatentAttention(config) if config.attention.latent else Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn: nn.Module = MoE(config) if config.is_moe(layer) else SwiGLU(config.d_model, config.d_ff)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, cache)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class BlockStack(nn.Module):
    """Embedding, blocks, norm and head: what every model here has.

    Args:
        embedding: makes the first block's input, and has a `weight`.
        rotary: cosines and sines of all positions.
    """

    embedding: nn.Module
    cos: Tensor
    sin: Tensor

    def __init__(self, config: BlocksConfig, embedding: nn.Module, rotary: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.shared_by = (0, 1)  # rank and number of the processes that share every batch (tensor parallelism)
        self.embedding = embedding
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Linear(config.d_model, config.n_outputs)
        if config.sharing and config.sharing.rank:
            for layer in shared_layers(config.sharing, config.n_layers):
                add_low_rank(self.blocks[layer], config.sharing.rank)
        self._tie()
        for name, table in zip(("cos", "sin"), rotary, strict=True):
            self.register_buffer(name, table, persistent=False)
        if self.head.weight.device.type != "meta":
            init_weights(self, config)

    def _tie(self) -> None:
        """Make one parameter of those that are the same by the config."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight  # type: ignore[assignment]
        if self.config.sharing:
            tie_blocks(self.blocks, self.config.layer_map, self.config.sharing.own_norms)  # type: ignore[arg-type]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the weights, but keep the buffers (rotary tables, biases, loads) in float32.

        In bfloat16 a bias of 0.8 could not take a step of 0.001, and a load could not be counted.
        """
        exact = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        self._tie()  # leaving the meta device makes new parameters
        for name, moved in list(self.named_buffers()):
            if name in exact and moved.dtype != torch.float32 and not moved.is_meta:
                owner = self.get_submodule(name.rpartition(".")[0])
                owner._buffers[name.rpartition(".")[2]] = exact[name].to(moved.device)
        return self

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function that uses the weights: where they are sharded, they are gathered around it."""
        return function(*args)

    def take_router_loss(self) -> Tensor | None:
        """Sum over layers of the routers' losses in the last training call, each a mean over its tokens; or None.

        A scalar in float32 to be added to the mean loss per token (the coefficients are in it already). Taking it
        lets go of it, so that no graph outlives its step.
        """
        losses = []
        for moe in self.moe_layers().values():
            if moe.router_loss is not None:
                losses.append(moe.router_loss)
                moe.router_loss = None
        return torch.stack(losses).sum() if losses else None

    def moe_layers(self) -> dict[int, MoE]:
        """The mixtures by the index of their layer; those of multi-token prediction come after the last layer."""
        return {i: block.ffn for i, block in enumerate(self.all_blocks()) if isinstance(block.ffn, MoE)}

    def all_blocks(self) -> list[Block]:
        """The layers' blocks, and any that come after them."""
        return list(self.blocks)  # type: ignore[arg-type]


class Transformer(BlockStack):
    """A causal language model: token ids [B, T] -> logits [B, T, V]."""

    config: TransformerConfig
    embedding: nn.Embedding

    def __init__(self, config: TransformerConfig) -> None:
        attention = config.attention
        rotary = rotary_table(config.rotary_dim, config.max_seq_len, attention.rope_theta, attention.rope_scaling)
        super().__init__(config, nn.Embedding(config.vocab_size, config.d_model), rotary)
        # Made and drawn last: with and without them, one seed gives the rest of the model the same weights.
        self.mtp = nn.ModuleList(MTPModule(config, k, Block) for k in range(config.n_mtp))
        if self.head.weight.device.type != "meta":
            init_weights(self.mtp, config)
        if config.ngrams:
            self.ngram_embedding = NgramEmbedding(config.ngrams, config.d_model, config.vocab_size)
            init_weights(self.ngram_embedding, config)

    def all_blocks(self) -> list[Block]:
        """The layers' blocks, and those of multi-token prediction."""
        return [*super().all_blocks(), *(module.block for module in self.mtp)]  # type: ignore[list-item]

    def hidden(self, ids_BT: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Final normalised hidden states [B, T, D]: what the head turns into logits."""
        rotary = self._rotary(caches[0].length if caches else 0, ids_BT.shape[1])
        x_BTD = self.embedding(ids_BT)
        if self.config.ngrams:
            ngrams_BTD = self._ngrams(ids_BT, caches[-1] if caches else None)
            x_BTD = x_BTD + ngrams_BTD
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotary, caches[i] if caches else None)
        if self.config.ngrams and self.config.ngrams.to_head:
            x_BTD = x_BTD + ngrams_BTD
        return self.norm(x_BTD)

    def _ngrams(self, ids_BT: Tensor, cache: KVCache | None) -> Tensor:
        """What n-grams add at these positions; the cache holds the ids of those before."""
        if cache is None:
            return self.ngram_embedding(ids_BT)
        length, orders = ids_BT.shape[1], self.ngram_embedding.config.orders
        (seen_B1S1,) = cache.append(ids_BT[:, None, :, None])
        latest_BS = seen_B1S1[:, 0, 1 - length - max(orders) :, 0]
        return self.ngram_embedding(latest_BS)[:, -length:]

    def _rotary(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[start : start + length], self.sin[start : start + length]

    def mtp_hidden(self, hidden_BTD: Tensor, ids_BT: Tensor) -> Iterator[Tensor]:
        """From the main model's hidden states, those of each further prediction, normalised for the head.

        The k-th (k = 1, 2, ...) is [B, T - k, D]: at position i it predicts token i + k + 1 from those up to i + k.
        """
        for k in range(1, len(self.mtp) + 1):
            hidden_BTD = self.mtp_step(k, hidden_BTD[:, :-1], ids_BT[:, k:])
            yield hidden_BTD

    def mtp_step(self, k: int, hidden_BTD: Tensor, ahead_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """The k-th module on hidden states [B, T, D] and the tokens k further on [B, T]; -> [B, T, D]."""
        rotary = self._rotary(cache.length if cache else 0, ahead_BT.shape[1])
        return self.mtp[k - 1](hidden_BTD, self.embedding(ahead_BT), rotary, cache)

    def forward(self, ids_BT: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Logits [B, T, V] of the next token at each position."""
        return self.head(self.hidden(ids_BT, caches))

    def new_caches(self, batch_size: int, max_len: int) -> list[KVCache]:
        """One empty cache per layer, for at most `max_len` positions; and one of token ids, where n-grams read them."""
        caches = self._caches(list(self.blocks), batch_size, max_len)
        if self.config.ngrams:
            caches.append(KVCache([(1, 1)], batch_size, max_len, self.embedding.weight.device, torch.int64))
        return caches

    def new_mtp_caches(self, batch_size: int, max_len: int) -> list[KVCache]:
        """The same for the modules that predict further ahead."""
        return self._caches([module.block for module in self.mtp], batch_size, max_len)  # type: ignore[misc]

    def _caches(self, blocks: list[nn.Module], batch_size: int, max_len: int) -> list[KVCache]:
        weight = self.embedding.weight
        layers: list[Attention | LatentAttention] = [block.attention for block in blocks]  # type: ignore[misc]
        return [layer.new_cache(batch_size, max_len, weight.device, weight.dtype) for layer in layers]


@torch.no_grad()
def init_weights(model: nn.Module, config: BlocksConfig) -> None:
    """Draw every weight: normal(0, init_std), smaller where a branch joins the residual stream; norms are one.

    The factor 1 / sqrt(2 n_layers) on those projections keeps the stream's variance independent of depth (GPT-2).
    """
    std = config.init_std
    std_out = std / math.sqrt(2 * config.n_layers)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, NgramEmbedding):
            nn.init.zeros_(module.weight)
        elif isinstance(module, PatchEmbedding):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=std)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=std)
            if module.expert_bias is not None:
                module.expert_bias.zero_()
        elif isinstance(module, Experts):
            nn.init.normal_(module.w13, std=std)
            nn.init.normal_(module.w2, std=std_out)
        if isinstance(module, LowRankLinear):
            nn.init.normal_(module.down, std=std)
            nn.init.zeros_(module.up)
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            nn.init.normal_(module.wo.weight, std=std_out)
        elif isinstance(module, SwiGLU):
            nn.init.normal_(module.w2.weight, std=std_out)
