"""Bytes that each process sends in an optimizer step, from the config alone, by strategy.

Counted as rings send them: an all-gather or a reduce-scatter of S bytes over n processes sends S (n - 1) / n from each,
an all-reduce twice as much. Padding to equal shards, buffers and single numbers (losses, norms, loads) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from frugal.errors import require
from frugal.model.config import TransformerConfig, count_matrices, count_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends, by collective."""

    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_reduce: float = 0.0
    all_to_all: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.all_to_all


def _weights(config: TransformerConfig) -> int:
    """All weights; the routers' balancing biases are none."""
    counts = count_parameters(config)
    routers = (config.n_moe_layers + config.n_mtp) * config.moe.n_experts if config.moe else 0
    return counts.total + counts.mtp - (routers if config.moe and config.moe.expert_bias else 0)


def _experts(config: TransformerConfig) -> int:
    """Weights of all routed experts, of those that layers share once."""
    if config.moe is None:
        return 0
    stored = {block for layer, block in enumerate(config.layer_map) if config.is_moe(layer)}
    return (len(stored) + config.n_mtp) * config.moe.n_experts * 3 * config.d_model * config.moe.d_expert


def _split_matrices(config: TransformerConfig) -> int:
    """Weights besides the routed experts that tensor parallelism splits."""
    attention, d = config.attention, config.d_model
    if latent := attention.latent:
        d_q = attention.n_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        mixed = (latent.q_lora_rank or d) * d_q
        mixed += latent.kv_lora_rank * attention.n_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        mixed += attention.n_heads * latent.v_head_dim * d
    else:
        mixed = 2 * d * (attention.n_heads + attention.kv_heads) * config.head_dim
    n_moe = config.n_moe_layers + (config.n_mtp if config.moe else 0)
    n_all = config.n_layers + config.n_mtp
    shared = config.moe.shared_width if config.moe else 0
    return n_all * mixed + 3 * d * ((n_all - n_moe) * config.d_ff + n_moe * shared)


def bytes_per_step(
    config: TransformerConfig,
    strategy: Literal["single", "ddp", "fsdp2"],
    tokens: int,
    data: int = 1,
    tensor: int = 1,
    expert: int = 1,
    accumulate: int = 1,
    reshard_after_forward: bool = True,
    recompute: bool = False,
    muon: bool = False,
    weight_bytes: int = 4,
    gradient_bytes: int = 4,
    activation_bytes: int = 4,
) -> Traffic:
    """What each process sends in one optimizer step, with nothing frozen and an even load of the experts.

    With W = data x tensor x expert processes, P weights of which S are split over t = tensor x expert, A micro-batches
    of `tokens` tokens each on a process, width D, L layers of which M have experts:

        ddp            all-reduce      2 (W-1)/W P
        fsdp2          all-gather      A g ((W-1)/W (P - S) + (data-1)/data S/t), g = 2, or 1 without resharding
                       reduce-scatter  the same once, in the gradients' type
        x tensor       all-reduce      A 4 L 2 (t-1)/t tokens D: after attention and feed-forward, and backward
        x expert       all-to-all      A 4 M (t-1)/t tokens top_k D: there and back, and backward
        Muon, fsdp2    all-to-all      2/W (c weights of each matrix), there and back: c = (data-1)/data of one of the
                                       S, (t-1)/t besides if tensor splits it, (W-1)/W of any other; without tensor and
                                       expert parallelism 0 of experts, which lie whole on the processes

    Args:
        tokens: of one micro-batch on one process (processes of a tensor-parallel group have the same ones).
        data, tensor, expert: processes along each dimension.
        accumulate: micro-batches of a step.
        reshard_after_forward: as in FSDP2Strategy.
        recompute: activation checkpointing: the second forward pass exchanges rows again, and sums attention again.
        muon: the optimizer is Muon, which gathers each sharded matrix on one process.
        weight_bytes, gradient_bytes, activation_bytes: size of one number; 2 for bfloat16.

    Raises:
        UserError: sizes that do not fit the strategy.
    """
    require(min(data, tensor, expert, accumulate) >= 1, "parallel sizes: must be at least 1")
    require(tensor == 1 or expert == 1, "tensor and expert parallelism cannot be combined")
    require(strategy == "fsdp2" or tensor == expert == 1, f"{strategy}: has no tensor or expert parallelism")
    if strategy == "single":
        return Traffic()
    weights = _weights(config)
    if strategy == "ddp":
        return Traffic(all_reduce=2 * _others(data) * weights * gradient_bytes)
    inner = tensor * expert
    matrices = _split_matrices(config) if tensor > 1 else 0
    split = _experts(config) + matrices
    moved = _others(data * inner) * (weights - split) + _others(data) * split / inner
    gathers = accumulate * (2 if reshard_after_forward else 1)
    blocks, mixtures = config.n_layers + config.n_mtp, config.n_moe_layers + (config.n_mtp if config.moe else 0)
    rows = accumulate * 4 * tokens * config.d_model * activation_bytes
    top_k = config.moe.top_k if config.moe else 0
    gathered = _others(data * inner) * (count_matrices(config) - split) + _others(tensor) * matrices
    if inner > 1:
        gathered += _others(data) * split
    return Traffic(
        all_gather=gathers * moved * weight_bytes,
        reduce_scatter=moved * gradient_bytes,
        all_reduce=blocks * rows * 2 * _others(tensor) * (1.25 if recompute else 1),
        all_to_all=mixtures * rows * top_k * _others(expert) * (1.5 if recompute else 1)
        + muon * 2 * gathered / (data * inner) * weight_bytes,
    )


def _others(n: int) -> float:
    """The share of a ring's data that one of n processes sends."""
    return (n - 1) / n
