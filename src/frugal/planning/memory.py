"""Peak memory of training, from the config alone: weights, gradients, optimizer state, activations.

Activations are counted as what our own model keeps for its backward pass (`tests/planning/test_memory.py` holds the
count against autograd's). Counted in elements and bytes per device; sequences are never split over devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from frugal.errors import UserError
from frugal.model.config import TransformerConfig, count_matrices, count_parameters, state_memory

Strategy = Literal["replicated", "sharded", "expert"]
# Bytes of a weight and of its gradient, of a matrix product's operand, and of the residual stream.
PRECISIONS = {
    "32-true": (4, 4, 4), "tf32": (4, 4, 4), "16-mixed": (4, 2, 4), "bf16-mixed": (4, 2, 4), "bf16-true": (2, 2, 2)
}  # fmt: skip
# Optimizer state per parameter: how many numbers as large as the weight, by class. What is not listed counts as AdamW.
MOMENTS = {
    "SGD": 1.0,  # momentum
    "Adam": 2.0,
    "AdamW": 2.0,
    "AdamWScheduleFree": 2.0,  # second moment, and the point that is averaged
    "AdamW8bit": 0.5 + 2 / 64,  # a byte each, and a float32 scale for each block of 256
    "Adafactor": 0.0,  # a row and a column of each matrix
    "SOAP": 4.0,  # both moments, and about as much again for square preconditioners
}
LOSS_CHUNK = {"cpu": 512, "cuda": 4096}  # frugal.training.losses


@dataclass(frozen=True)
class Load:
    """What one device has to hold while it trains.

    Args:
        micro_batch: sequences per micro-batch and device.
        seq_len: tokens per sequence.
        eval_batch: sequences per validation batch and device.
        accumulate: micro-batches per step.
        precision: as `trainer.precision` has it.
        optimizer: name of its class.
        device: cpu or cuda: which kernels keep what.
        loss_chunk: positions whose logits exist at once; 0: all; None: the device's default.
        checkpointing: keep only each layer's input and compute the rest again in the backward pass.
        compiled: blocks compiled, where pointwise results are computed again instead of kept.
        strategy: replicated keeps the whole state on every device (DDP); sharded keeps a part of it (FSDP),
            and expert, too, but splits the routed experts over as many devices as divide their number, where they stay
            (FSDP with expert parallelism).
        devices: over how many.
    """

    micro_batch: int
    seq_len: int
    eval_batch: int = 0
    accumulate: int = 1
    precision: str = "32-true"
    optimizer: str = "AdamW"
    device: Literal["cpu", "cuda"] = "cuda"
    loss_chunk: int | None = None
    checkpointing: bool = False
    compiled: bool = False
    strategy: Strategy = "replicated"
    devices: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `peak` is the larger one of a training step's and a validation's."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float
    validation: float

    @property
    def state(self) -> float:
        """What is there all the time once training has begun."""
        return self.weights + self.gradients + self.optimizer

    @property
    def training(self) -> float:
        """At the end of a forward pass; the gradients of the step before are freed just after it."""
        return self.state + self.activations + self.logits + self.gathered

    @property
    def peak(self) -> float:
        """The most at any time."""
        return max(self.training, self.state + self.gathered + self.validation)


def bytes_of(precision: str) -> tuple[int, int, int]:
    """Bytes of a weight, of an operand, of the residual stream."""
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision} is not planned for; use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def layer_elements(config: TransformerConfig, layer: int, load: Load) -> tuple[float, float]:
    """What one layer keeps per token: operands of matrix products, and full-precision numbers (norms, router)."""
    attention, d = config.attention, config.d_model
    heads = attention.n_heads
    cpu, fused = load.device == "cpu", load.compiled or load.device == "cuda"
    _, operand, stream = bytes_of(load.precision)
    casts = operand < stream and not load.compiled  # autocast gives each product a copy of its input
    norm = d + 1 if fused else 2 * d + 1  # input and scale; the plain kernel keeps the normalised input too
    operands, exact = 2.0 * d, 2.0 * norm  # each norm's output feeds matrix products
    if latent := attention.latent:
        d_qk, d_v = latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim
        low = [latent.kv_lora_rank, *([latent.q_lora_rank] if latent.q_lora_rank else [])]
        operands += casts * d
        operands += sum(low)  # the low-rank norms' outputs
        exact += sum(r + 1 if fused else 2 * r + 1 for r in low)
        scores = heads * (2 * d_qk + d_v)
    else:
        d_qk = d_v = config.head_dim
        operands += casts * 2 * d
        scores = heads * 3 * d_qk
        if attention.qk_norm != "none":
            exact += (heads + attention.kv_heads) * d_qk * (1 if fused else 2)
    operands += scores + heads * d_v  # queries, keys (repeated for every head), values, output
    if cpu and not load.compiled:
        operands += heads * d_v  # the output again, in the layout of the next product
    exact += heads  # log-sum-exp of each row
    swiglu = 3 if load.compiled else 4  # gate, up, their product; plain kernels keep the activated gate too
    if not config.is_moe(layer):
        return operands + swiglu * config.d_ff + casts * d, exact
    moe = config.moe
    assert moe is not None
    operands += moe.top_k * 2 * moe.d_expert + swiglu * moe.shared_width
    operands += load.compiled * moe.top_k * d  # the rows by expert, which plain kernels gather again
    operands += casts * (2 * d if moe.shared_width else 0)
    exact += casts * d  # the router's own input
    # Scores, chosen weights before and after their sum, and three 8-byte indices per chosen expert.
    exact += moe.n_experts + moe.top_k * (1 + moe.normalize_weights) + moe.normalize_weights + 6 * moe.top_k
    return operands, exact


def expert_ranks(config: TransformerConfig, devices: int) -> int:
    """Over how many of the devices the routed experts lie: as many as divide their number."""
    return math.gcd(devices, config.moe.n_experts) if config.moe else 1


def training_memory(config: TransformerConfig, load: Load) -> Memory:
    """Peak memory of one device.

    Left out: what libraries allocate for themselves (on CUDA the context and workspaces, about 1 GiB), fragments of the
    allocator, buffers of the data loader.
    """
    weight, operand, stream = bytes_of(load.precision)
    state = state_memory(config, weight, weight, 0)
    parts = 1 if load.strategy == "replicated" else load.devices
    trained = state.gradients / weight
    if load.optimizer == "Muon":  # a momentum for matrices, AdamW for what is looked up or multiplied row by row
        moments = 2 * trained - count_matrices(config)
    else:
        moments = MOMENTS.get(load.optimizer, 2.0) * trained
    tokens = load.micro_batch * load.seq_len
    per_layer = [
        tokens * (operand * operands + 4 * exact + (stream - 4) * 2 * config.d_model)
        for operands, exact in (layer_elements(config, layer, load) for layer in range(config.n_layers))
    ]
    if config.n_mtp:  # each module is a layer of the last kind, two norms and a projection
        extra = tokens * (operand * 2 + 4 * 4) * config.d_model
        per_layer += [per_layer[-1] + extra] * config.n_mtp
    if load.checkpointing:
        activations = tokens * stream * config.d_model * len(per_layer) + max(per_layer)
    else:
        activations = sum(per_layer)
    activations += tokens * config.d_model * (2 * stream + 4)  # the final norm, and its gradient
    if config.ngrams:  # which rows were looked up
        activations += 8.0 * tokens * config.ngrams.n_tables
    blocks, head = _block_weights(config), config.n_outputs * config.d_model
    gathered_blocks = blocks
    if load.strategy == "expert" and config.moe:  # rows travel to the experts, the experts stay
        experts = 3 * config.moe.n_experts * config.d_model * config.moe.d_expert
        ranks = expert_ranks(config, load.devices)
        here = experts // ranks
        # Where more devices than that share each part out, the part is gathered.
        stay = experts - here if ranks < load.devices else experts
        gathered_blocks = [block - stay * config.is_moe(i) for i, block in enumerate(blocks)]
        blocks = [block - (experts - here) * config.is_moe(i) for i, block in enumerate(blocks)]
        activations += 2.0 * operand * tokens * config.moe.top_k * config.d_model
    if operand < weight:  # each use of a matrix keeps a 16-bit copy for the backward pass, of gathered ones too
        activations += operand * ((max(blocks) if load.checkpointing else sum(blocks)) + head)
    # A block and the next one, whole, as weights are stored; and all the time what lies around them: tables and head.
    gathered = weight * (2.0 * max(gathered_blocks) + _looked_up(config) + head) if parts > 1 else 0.0
    return Memory(
        weights=state.weights / parts,
        gradients=state.gradients / parts,
        optimizer=weight * moments / parts,
        activations=activations,
        logits=_logits(config, load, operand),
        gathered=gathered,
        # The logits, their float32 copy or log-probabilities, and one more while the loss is taken.
        validation=load.eval_batch * load.seq_len * (config.vocab_size * (8 if operand == 4 else 8 + operand)),
    )


def _logits(config: TransformerConfig, load: Load, operand: int) -> float:
    """Logits and their gradient, and the head's own gradient, which is summed up in float32 beside the parameter's."""
    tokens = load.micro_batch * load.seq_len
    chunk = LOSS_CHUNK[load.device] if load.loss_chunk is None else load.loss_chunk
    if chunk == 0:
        return tokens * config.vocab_size * (operand + 8.0)
    # Three chunks at once: the last one's logits and gradient while the next logits are computed.
    head = 2 * 4 * config.vocab_size * config.d_model
    exact = 0.0 if load.compiled else 4.0  # one kernel needs no float32 copy
    return min(chunk, tokens) * config.vocab_size * (exact + 2 * operand) + head


def _looked_up(config: TransformerConfig) -> int:
    """Weights that no product reads: the input's, but for a table that is the head, too."""
    return config.input_parameters - (config.n_outputs * config.d_model if config.tie_embeddings else 0)


def _block_weights(config: TransformerConfig) -> list[int]:
    """Weights of each layer's block (a shared one at each of its layers), and of those that predict further tokens."""
    bare = count_parameters(replace(config, n_layers=1, sharing=None, n_mtp=0, moe=None)).total
    table = _looked_up(config) + config.n_outputs * config.d_model + config.d_model
    dense = bare - table
    if config.moe is None:
        return [dense] * (config.n_layers + config.n_mtp)
    mixed = replace(config.moe, first_k_dense=0)
    one = count_parameters(replace(config, n_layers=1, sharing=None, n_mtp=0, moe=mixed)).total - table
    return [one if config.is_moe(layer) else dense for layer in range(config.n_layers)] + [one] * config.n_mtp
