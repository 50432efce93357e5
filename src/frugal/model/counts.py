"""What a transformer costs, counted from its config alone: parameters, FLOPs, cache and training state.

Imports neither torch nor the model; tests hold every figure against built models and published ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

from frugal.model.frozen_counts import Frozen, adapter_flops_per_token, backward_flops_per_token

if TYPE_CHECKING:
    from frugal.model.config import BlocksConfig


@dataclass(frozen=True)
class Counts:
    """Parameters of a transformer.

    `total` counts every stored parameter once. `active` counts what one token uses, once however many layers share
    it, in the field's three conventions: with all embeddings, without the input embedding, and without both embedding
    and output head. `applied` is the first of these with a shared block counted at every layer that uses it, which is
    what compute follows; without sharing it equals `active`. `mtp` counts the modules of multi-token prediction, which
    none of the others includes, without the embedding and the head that they share.
    """

    total: int
    active: int
    active_without_input_embedding: int
    active_without_embeddings: int
    applied: int
    mtp: int = 0


def _linears(config: BlocksConfig, is_moe: bool) -> tuple[list[tuple[int, int]], int]:
    """(inputs, outputs) of every matrix of a layer that all tokens use, but the router; and its norms' weights."""
    attention, d = config.attention, config.d_model
    heads = attention.n_heads
    if latent := attention.latent:
        d_q = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        rank = latent.q_lora_rank
        matrices = [(d, rank), (rank, d_q)] if rank else [(d, d_q)]
        matrices += [
            (d, latent.kv_lora_rank + latent.qk_rope_head_dim),
            (latent.kv_lora_rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim)),
            (heads * latent.v_head_dim, d),
        ]
        norms = (rank or 0) + latent.kv_lora_rank
    else:
        d_q, d_kv = heads * config.head_dim, attention.kv_heads * config.head_dim
        matrices = [(d, d_q), (d, d_kv), (d, d_kv), (d_q, d)]
        norms = {"none": 0, "head": 2 * config.head_dim, "full": d_q + d_kv}[attention.qk_norm]
    width = config.moe.shared_width if config.moe and is_moe else config.d_ff
    if width:
        matrices += [(d, width), (d, width), (width, d)]
    return matrices, norms + 2 * d


@dataclass
class _Tally:
    """Weights without embeddings that multiply a token, norms' weights, routers' biases, and idle experts' weights."""

    matrices: int = 0
    norms: int = 0
    biases: int = 0
    idle: int = 0

    @property
    def stored(self) -> int:
        """All of them."""
        return self.matrices + self.norms + self.biases + self.idle


def _tally(config: BlocksConfig, unique: bool) -> _Tally:
    """Add up the layers as applied, or each stored parameter once."""
    tally, sharing, layer_map = _Tally(norms=config.d_model), config.sharing, config.layer_map
    for layer, block in enumerate(layer_map):
        matrices, norms = _linears(config, config.is_moe(layer))
        uses = layer_map.count(block)
        stored = not unique or layer_map.index(block) == layer
        if stored or (sharing and sharing.own_norms):
            tally.norms += norms
        if stored:
            tally.matrices += sum(i * o for i, o in matrices)
        if sharing and uses > 1:
            tally.matrices += sharing.rank * sum(i + o for i, o in matrices)
        if (moe := config.moe) and config.is_moe(layer):
            tally.biases += moe.n_experts * moe.expert_bias  # every layer's own
            if stored:
                expert = 3 * config.d_model * moe.d_expert
                # A token may choose other experts each time the block is applied.
                used = min(moe.n_experts, moe.top_k * uses) if unique else moe.top_k
                tally.matrices += moe.n_experts * config.d_model + used * expert
                tally.idle += (moe.n_experts - used) * expert
    return tally


def count_parameters(config: BlocksConfig) -> Counts:
    """Count parameters, the routers' balancing biases among them, as DeepSeek-V3's published total does."""
    stored, applied = _tally(config, unique=True), _tally(config, unique=False)
    body = stored.matrices + stored.norms + stored.biases
    head = config.n_outputs * config.d_model
    idle = config.idle_input_parameters
    tables = config.input_parameters - idle + (0 if config.tie_embeddings else head)
    return Counts(
        total=body + tables + stored.idle + idle,
        active=body + tables,
        # A tied table still works as the head, so only its role as a look-up is left out.
        active_without_input_embedding=body + head,
        active_without_embeddings=body,
        applied=applied.matrices + applied.norms + applied.biases + tables,
        mtp=_mtp_tally(config).stored,
    )


def matrix_shapes(config: BlocksConfig) -> Counter[tuple[int, int]]:
    """(inputs, outputs) of each matrix that Muon orthogonalizes: all but embeddings, output head and routers."""
    found: Counter[tuple[int, int]] = Counter()

    def add_layer(is_moe: bool) -> None:
        found.update(_linears(config, is_moe)[0])
        if config.moe and is_moe:
            found[config.d_model, config.moe.d_expert] += 2 * config.moe.n_experts
            found[config.moe.d_expert, config.d_model] += config.moe.n_experts

    for layer, block in enumerate(config.layer_map):
        if config.layer_map.index(block) == layer:
            add_layer(config.is_moe(layer))
        if (sharing := config.sharing) and sharing.rank and config.layer_map.count(block) > 1:
            for i, o in _linears(config, config.is_moe(layer))[0]:
                found.update([(i, sharing.rank), (sharing.rank, o)])
    for _ in range(config.n_mtp):
        add_layer(config.moe is not None)
        found[2 * config.d_model, config.d_model] += 1
    return found


def count_matrices(config: BlocksConfig) -> int:
    """Weights of the matrices that Muon orthogonalizes."""
    return sum(inputs * outputs * n for (inputs, outputs), n in matrix_shapes(config).items())


def orthogonalize_flops(rows: int, columns: int, steps: int = 5) -> int:
    """FLOPs of `frugal.training.muon.orthogonalize` for one matrix: three products an iteration."""
    short, long = min(rows, columns), max(rows, columns)
    return steps * (4 * short * short * long + 2 * short**3)


def muon_flops(config: BlocksConfig, steps: int = 5) -> int:
    """FLOPs of Muon's orthogonalizations in a step, of so many iterations each, with nothing frozen."""
    return sum(n * orthogonalize_flops(*shape, steps) for shape, n in matrix_shapes(config).items())


def _mtp_tally(config: BlocksConfig) -> _Tally:
    """Of all modules of multi-token prediction together."""
    if not config.n_mtp:
        return _Tally()
    moe = replace(config.moe, first_k_dense=0) if config.moe else None  # behind the last layer all are mixtures
    one = replace(config, n_layers=1, sharing=None, moe=moe)
    tally = _tally(one, unique=True)  # its one final norm is the module's
    tally.matrices += 2 * config.d_model**2
    tally.norms += 2 * config.d_model
    return _Tally(*(config.n_mtp * value for value in astuple(tally)))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token at one sequence length (a multiply-add counts as two).

    `mtp` is what multi-token prediction adds to a training step, forward and backward.
    """

    forward: float
    backward: float
    mtp: float = 0.0

    @property
    def training(self) -> float:
        """A whole training step: forward, backward, multi-token prediction."""
        return self.forward + self.backward + self.mtp


def flops_per_token(config: BlocksConfig, seq_len: int, frozen: Frozen | None = None) -> Flops:
    """FLOPs of one token in a training step, matrix products only.

    Every weight that multiplies a token costs 2 FLOPs forward and 4 backward (gradients of input and of weight):
    2 N and 4 N with N the applied parameters without the input embedding (Kaplan et al. 2020, section 2.1), less the
    norms, which are no matrix products. Attention adds, per layer and token, the products of queries with keys and of
    probabilities with values over the positions that it sees, (seq_len + 1) / 2 on average if it is causal: 2 n_heads
    (d_qk + d_v) per position forward and twice that backward (Dao 2023 counts the causal half likewise). In this
    convention DeepSeek-V3 costs 250 GFLOPs per token at 4,096 tokens, the figure of its authors (Zhao et al. 2025,
    arXiv 2505.09343, table 2).

    Args:
        frozen: what the step leaves alone, the backward pass then costs only what is left of it; and adapters.
    """
    attention, d_head = config.attention, config.head_dim
    latent = attention.latent
    widths = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim if latent else 2 * d_head

    made, read = config.ends_per_token(seq_len)

    def of(layers: int, matrices: int, positions: int) -> float:
        scores = layers * 2 * attention.n_heads * widths * attention.seen(positions)
        return 2 * (matrices + read * config.n_outputs * config.d_model) + scores

    forward = of(config.n_layers, _tally(config, unique=False).matrices, seq_len)
    forward += 2 * made * config.input_width * config.d_model
    each = _mtp_tally(config).matrices // max(config.n_mtp, 1)
    # The k-th module has no answer for the last k positions.
    lengths = [max(seq_len - k, 0) for k in range(1, config.n_mtp + 1)]
    mtp = sum(of(1, each, length) * length / seq_len for length in lengths)
    if frozen or config.input_width:  # no gradient goes into what comes from outside
        backward = backward_flops_per_token(config, seq_len, frozen or Frozen())
    else:
        backward = 2 * forward, 2 * mtp
    adapters = adapter_flops_per_token(config, seq_len, frozen) if frozen else (0.0, 0.0)
    return Flops(forward=forward + adapters[0], backward=backward[0], mtp=mtp + adapters[1] + backward[1])


def kv_cache_bytes_per_token(config: BlocksConfig, bytes_per_element: int = 2) -> int:
    """Bytes that one token of context occupies in the cache during generation, all layers together.

    Grouped-query attention keeps keys and values of its kv heads; latent attention keeps one latent and one rotary
    key for all heads (DeepSeek-V2, section 2.1.2): 70,272 bytes for DeepSeek-V3 in bfloat16.
    """
    if latent := config.attention.latent:
        elements = latent.kv_lora_rank + latent.qk_rope_head_dim
    else:
        elements = 2 * config.attention.kv_heads * config.head_dim
    return config.n_layers * elements * bytes_per_element


@dataclass(frozen=True)
class StateMemory:
    """Bytes that training keeps for the whole run, before any sharding and without activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.weights + self.gradients + self.optimizer


def state_memory(
    config: BlocksConfig, weight_bytes: int = 4, gradient_bytes: int = 4, moment_bytes: int = 4
) -> StateMemory:
    """Memory of weights, gradients and AdamW's two moments; the defaults are float32 throughout.

    The routers' biases have no gradient and no moments; everything else takes 16 bytes by default.
    """
    counts = count_parameters(config)
    total = counts.total + counts.mtp
    trained = total - _tally(config, unique=True).biases - _mtp_tally(config).biases
    return StateMemory(total * weight_bytes, trained * gradient_bytes, 2 * trained * moment_bytes)
