"""How the model is spread over a mesh of processes: FSDP2, tensor parallelism, expert parallelism.

One rule makes all of them add up. Every process computes a gradient of its own, and the true one is the sum over all
processes: a weight that all processes use whole is sharded over the whole mesh, and FSDP's reduce-scatter is that sum.
So nothing is averaged and nothing is counted twice, provided that every position's loss is taken on one process only;
processes that share a batch (tensor parallelism, `Transformer.shared_by`) take the loss of different positions. A
weight that a process uses a part of (a column or row of an attention or feed-forward matrix, some of the experts) is a
DTensor over that dimension of the mesh, and FSDP shards it further over the data dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as register_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp_common
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from frugal.errors import require
from frugal.model.attention import Attention
from frugal.model.config import TransformerConfig
from frugal.model.moe import MoE, SwiGLU
from frugal.model.transformer import Block, Transformer

DATA, TENSOR, EXPERT = "data_parallel", "tensor_parallel", "expert_parallel"
SEVERAL_MESHES = hasattr(fsdp_common, "ShardPlacementResult")  # torch 2.11 shards all weights of a model over one
COLUMNS = ("wq", "wq_up", "wk", "wv", "wkv_up")  # of either attention: their outputs belong to heads


@dataclass(frozen=True)
class ParallelSizes:
    """Processes along each dimension of the mesh.

    Args:
        data: groups that see different data; with expert parallelism every process sees data of its own.
        tensor: processes that share a batch and split the matrices.
        expert: processes that split the experts.
    """

    data: int
    tensor: int = 1
    expert: int = 1

    def check(self, config: TransformerConfig) -> None:
        """Refuse what cannot be split.

        Raises:
            UserError: naming the key.
        """
        key = "trainer.strategy"
        require(
            self.tensor == 1 or self.expert == 1,
            f"{key}.tensor_parallel_size: cannot be combined with expert_parallel_size (within a tensor-parallel group "
            "the experts are split already)",
        )
        if self.tensor == self.expert == 1:
            return
        name = "tensor_parallel_size" if self.tensor > 1 else "expert_parallel_size"
        size = self.tensor * self.expert
        require(config.sharing is None, f"{key}.{name}: does not work with model.transformer.sharing; use 1")
        require(self.expert == 1 or config.moe is not None, f"{key}.{name}: the model has no experts; use 1")
        divided = {"moe.n_experts": config.moe.n_experts} if config.moe else {}
        shared_out = {"d_model": config.d_model}
        if config.moe:
            shared_out["moe.d_expert"] = 2 * config.moe.d_expert
        if self.tensor > 1:
            attention = config.attention
            require(attention.qk_norm != "full", f"{key}.{name}: does not work with attention.qk_norm full; use head")
            divided |= {"d_ff": config.d_ff, "attention.n_heads": attention.n_heads}
            if attention.latent is None:
                divided["attention.n_kv_heads"] = attention.kv_heads
            else:
                shared_out["attention.latent.kv_lora_rank"] = attention.latent.kv_lora_rank
                shared_out["attention.latent.q_lora_rank"] = attention.latent.q_lora_rank or 0
            if config.moe and config.moe.shared_width:
                divided["moe.d_shared_expert"] = config.moe.shared_width
        for what, number in divided.items():
            require(
                number % size == 0,
                f"{key}.{name}: {size} does not divide model.transformer.{what} ({number})",
            )
        for what, number in shared_out.items():
            require(
                number % self.data == 0,
                f"{key}.data_parallel_size: {self.data} does not divide model.transformer.{what} ({number})",
            )
        require(
            SEVERAL_MESHES,
            f"{key}.{name}: torch {torch.__version__} shards all weights over one mesh; needs torch 2.13, or use 1",
        )


def device_mesh(sizes: ParallelSizes, device_type: str) -> DeviceMesh:
    """The mesh of all processes: data, and the dimension that splits matrices or experts (of size 1 without)."""
    inner, size = (EXPERT, sizes.expert) if sizes.expert > 1 else (TENSOR, sizes.tensor)
    return dist.init_device_mesh(device_type, (sizes.data, size), mesh_dim_names=(DATA, inner))


def parallelize(
    model: Transformer, mesh: DeviceMesh, reshard_after_forward: bool = True, cpu_offload: bool = False
) -> None:
    """Spread a built model over the mesh, in place; every process must have built the same weights.

    Training and evaluation go through `model(...)` or `model.run(...)`, which gather the weights that they need.

    Args:
        mesh: as `device_mesh` makes it.
        reshard_after_forward: free a block's gathered weights after its forward pass and gather them again for the
            backward pass: least memory; without it, a third less communication.
        cpu_offload: keep shards, gradients and optimizer state in the host's memory.

    Raises:
        UserError: the model cannot be split like this.
    """
    assert mesh.mesh_dim_names is not None
    inner = mesh[mesh.mesh_dim_names[1]]
    tensor, expert = (inner.size(), 1) if mesh.mesh_dim_names[1] == TENSOR else (1, inner.size())
    ParallelSizes(mesh[DATA].size(), tensor, expert).check(model.config)
    if inner.size() > 1:
        for block in model.all_blocks():
            if tensor > 1:
                _split_matrices(block, inner)
            if isinstance(block.ffn, MoE):
                _split_experts(block.ffn, inner, same_tokens=tensor > 1)
    if tensor > 1:
        model.shared_by = (inner.get_local_rank(), tensor)
    everyone = mesh._flatten("everyone")
    over_data = fsdp_common.FSDPMeshInfo(mesh=mesh[DATA], shard_mesh_dim=0)

    def placement(parameter: nn.Parameter) -> Any:
        if not isinstance(parameter, DTensor):
            return None
        (placed,) = parameter.placements
        # Along the other dimension, so that every process's part is one block of the whole.
        return fsdp_common.ShardPlacementResult(Shard(1 if placed.is_shard(0) else 0), over_data)

    options: dict[str, Any] = {
        "mesh": everyone,
        "reshard_after_forward": reshard_after_forward,
        "shard_placement_fn": placement,
        # What is stored in 16 bits is still summed in 32.
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for block in _unshared_blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in sharded_modules(model):
        # Sums: torch's own divisions would average over each mesh by itself.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_forward_method(model, "run")


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that gather their weights."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _unshared_blocks(model: Transformer) -> list[Block]:
    """Blocks with weights of their own; those that layers share are gathered once, with the embedding and the head."""
    uses: dict[int, int] = {}
    for block in model.all_blocks():
        for parameter in block.parameters():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [b for b in model.all_blocks() if all(uses[id(parameter)] == 1 for parameter in b.parameters())]


def _split(module: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    parameter = getattr(module, name)
    part = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)
    setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _split_matrices(block: Block, mesh: DeviceMesh) -> None:
    """Heads and hidden units over processes, as Megatron-LM does (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

    Attention and feed-forward each end in one sum over the processes; its backward pass is another.
    """
    size = mesh.size()
    attention = block.attention
    for name in COLUMNS:
        if (module := getattr(attention, name, None)) is not None:
            _split(module, "weight", mesh, 0)
    _split(attention.wo, "weight", mesh, 1)
    attention.n_heads //= size
    if isinstance(attention, Attention):
        attention.n_kv_heads //= size
    for dense in (m for m in block.modules() if isinstance(m, SwiGLU)):
        _split(dense.w1, "weight", mesh, 0)
        _split(dense.w3, "weight", mesh, 0)
        _split(dense.w2, "weight", mesh, 1)
    group = mesh.get_group()

    def summed(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return all_reduce(out, group=group)

    block.attention.register_forward_hook(summed)
    block.ffn.register_forward_hook(summed)


def _split_experts(moe: MoE, mesh: DeviceMesh, same_tokens: bool) -> None:
    experts = moe.experts
    for name in ("w13", "w2"):
        _split(experts, name, mesh, 0)
    experts.mesh, experts.same_tokens = mesh, same_tokens
