"""Backward FLOPs of a transformer of which some parts are frozen, counted from its config alone.

Walks the layers as autograd does: a product's gradient by its weight is taken where the weight trains, its gradient by
its input where anything below trains. Imports neither torch nor the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from frugal.model.config import BlocksConfig


class Adapter(NamedTuple):
    """A trained low-rank product beside a matrix [d_out, d_in], and the module that it is beside."""

    module: str
    rank: int
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Frozen:
    """What a training step leaves alone.

    Args:
        names: frozen parameters, named as in `Transformer.state_dict()`. With tied embeddings `embedding.weight`
            alone means that the look-up passes no gradient on while the head trains the shared weight.
        trained_rows: by layer, the share of its routed rows that go to experts that train; layers that are not listed
            train all or (by name) none.
        adapters: low-rank products that train in the place of what is frozen.
    """

    names: frozenset[str] = frozenset()
    trained_rows: tuple[tuple[int, float], ...] = ()
    adapters: tuple[Adapter, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.trained_rows or self.adapters)


class _Walk:
    """Adds up one token's backward products while it follows whether gradients flow."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen, self.flops = frozen, 0.0
        self.adapters = {adapter.module: adapter.rank for adapter in frozen.adapters}

    def trains(self, name: str) -> bool:
        return name not in self.frozen.names

    def linear(self, stem: str, flows: bool, d_in: int, d_out: int, rank: int = 0, share: float = 1.0) -> bool:
        """Count a matrix and its low-rank correction; returns whether its output carries a gradient.

        `share` of the tokens go through the matrix.
        """
        trains = self.trains(f"{stem}.weight")
        self.flops += 2 * d_in * d_out * (trains + flows) * share
        if rank:
            down, up = self.trains(f"{stem}.down"), self.trains(f"{stem}.up")
            self.flops += 2 * d_in * rank * (down + flows) + 2 * rank * d_out * (up + (down or flows))
            trains = trains or down or up
        if added := self.adapters.get(stem):
            self.flops += 2 * added * (d_in * (1 + flows) + 2 * d_out) * share
            trains = True
        return flows or trains


def backward_flops_per_token(config: BlocksConfig, seq_len: int, frozen: Frozen) -> tuple[float, float]:
    """FLOPs of one token's backward pass, in the convention of `flops_per_token`; and of multi-token prediction's.

    Attention's own products are one kernel, which takes all its gradients as soon as one of queries, keys and values
    needs one.
    """
    walk, d, layer_map = _Walk(frozen), config.d_model, config.layer_map
    made, read = config.ends_per_token(seq_len)
    walk.linear("embedding", False, config.input_width, d, share=made)
    embedded = flows = any(map(walk.trains, config.input_names))
    for layer in range(config.n_layers):
        shared = layer_map.count(layer_map[layer]) > 1
        rank = config.sharing.rank if config.sharing and shared else 0
        flows = _block(walk, config, layer, flows, rank, seq_len)
    flows |= walk.trains("norm.weight")
    walk.linear("head", flows, d, config.n_outputs, share=read)
    main, extra = walk.flops, 0.0
    for k in range(config.n_mtp):
        walk.flops = 0.0
        stem, length = f"mtp.{k}", max(seq_len - k - 1, 0)
        joined = flows or embedded or any(walk.trains(f"{stem}.{w}_norm.weight") for w in ("hidden", "embedding"))
        flows = walk.linear(f"{stem}.proj", joined, 2 * d, d)
        flows = _block(walk, config, config.n_layers + k, flows, 0, length)
        flows |= walk.trains(f"{stem}.norm.weight")
        walk.linear("head", flows, d, config.n_outputs)
        extra += walk.flops * length / seq_len
    return main, extra


def adapter_flops_per_token(config: BlocksConfig, seq_len: int, frozen: Frozen) -> tuple[float, float]:
    """FLOPs of one token's forward pass through the adapters; and through those of multi-token prediction."""
    main = extra = 0.0
    for adapter in frozen.adapters:
        flops = 2 * adapter.rank * (adapter.d_in + adapter.d_out)
        place, number = adapter.module.split(".")[:2]
        if place == "mtp":
            extra += flops * max(seq_len - int(number) - 1, 0) / seq_len
        else:
            main += flops
    return main, extra


def block_name(layer: int, n_layers: int) -> str:
    """The module of a layer; those of multi-token prediction come after the last layer."""
    return f"blocks.{layer}" if layer < n_layers else f"mtp.{layer - n_layers}.block"


def _block(walk: _Walk, config: BlocksConfig, layer: int, flows: bool, rank: int, seq_len: int) -> bool:
    d, block = config.d_model, block_name(layer, config.n_layers)
    flows |= _attention(walk, config, block, flows, rank, seq_len)
    normed = flows or walk.trains(f"{block}.ffn_norm.weight")
    ffn = f"{block}.ffn"
    if not config.is_moe(layer):
        return _swiglu(walk, ffn, normed, d, config.d_ff, rank) or flows
    moe = config.moe
    assert moe is not None
    router = walk.linear(f"{ffn}.router", normed, d, moe.n_experts)
    rows = dict(walk.frozen.trained_rows).get(layer, 1.0)
    w13, w2 = walk.trains(f"{ffn}.experts.w13"), walk.trains(f"{ffn}.experts.w2")
    matrix = 2 * d * moe.d_expert * moe.top_k
    walk.flops += matrix * ((w2 + 2 * w13) * rows + (normed or w13 or router) + 2 * normed)
    if moe.shared_width:
        router |= _swiglu(walk, f"{ffn}.shared_experts", normed, d, moe.shared_width, rank)
    return flows or router or w13 or w2


def _swiglu(walk: _Walk, stem: str, flows: bool, d: int, width: int, rank: int) -> bool:
    gate = walk.linear(f"{stem}.w1", flows, d, width, rank)
    up = walk.linear(f"{stem}.w3", flows, d, width, rank)
    return walk.linear(f"{stem}.w2", gate or up, width, d, rank)


def _attention(walk: _Walk, config: BlocksConfig, block: str, flows: bool, rank: int, seq_len: int) -> bool:
    attention, d, stem = config.attention, config.d_model, f"{block}.attention"
    heads = attention.n_heads
    flows |= walk.trains(f"{block}.attention_norm.weight")
    if latent := attention.latent:
        d_q, q_rank = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim), latent.q_lora_rank
        if q_rank:
            down = walk.linear(f"{stem}.wq_down", flows, d, q_rank, rank)
            q = walk.linear(f"{stem}.wq_up", down or walk.trains(f"{stem}.q_norm.weight"), q_rank, d_q, rank)
        else:
            q = walk.linear(f"{stem}.wq", flows, d, d_q, rank)
        low = walk.linear(f"{stem}.wkv_down", flows, d, latent.kv_lora_rank + latent.qk_rope_head_dim, rank)
        d_kv = heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        kv = walk.linear(
            f"{stem}.wkv_up", low or walk.trains(f"{stem}.kv_norm.weight"), latent.kv_lora_rank, d_kv, rank
        )
        attends, d_out = q or low or kv, heads * latent.v_head_dim
        widths = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    else:
        d_q, d_kv = heads * config.head_dim, attention.kv_heads * config.head_dim
        qkv = [walk.linear(f"{stem}.{w}", flows, d, o, rank) for w, o in (("wq", d_q), ("wk", d_kv), ("wv", d_kv))]
        norms = attention.qk_norm != "none" and any(walk.trains(f"{stem}.{w}_norm.weight") for w in "qk")
        attends, d_out, widths = any(qkv) or norms, d_q, 2 * config.head_dim
    if attends:
        walk.flops += 4 * heads * widths * attention.seen(seq_len)
    return walk.linear(f"{stem}.wo", attends, d_out, d, rank)
