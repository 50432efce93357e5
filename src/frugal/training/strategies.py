"""FSDP2 with tensor or expert parallelism, as a Lightning strategy."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torchmetrics import Metric

from frugal.errors import require
from frugal.model.config import TransformerConfig
from frugal.model.parallelize import DATA, EXPERT, ParallelSizes, device_mesh, parallelize, sharded_modules
from frugal.model.transformer import Transformer
from frugal.training.checkpointing import read_checkpoint
from frugal.training.muon import Muon
from frugal.training.sharded import (
    distribute_like,
    empty_optimizer_state,
    is_sharded,
    load_sharded,
    named_optimizer_state,
    optimizer_tensors,
    read_meta,
    save_sharded,
    stored_tensors,
)

# Those of torch are elementwise, so that a shard is updated as it would be within the whole; ours gathers matrices.
OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, Muon)


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer state sharded over all processes (ZeRO stage 3, Rajbhandari et al. 2020).

    On CUDA with NCCL, on a CPU with gloo. Gradients are summed over processes, never averaged: the module divides by
    the number of valid tokens itself. The micro-batches of a step but the last are not communicated.

    Args:
        data_parallel_size: groups of processes along the data dimension; auto: what the other sizes leave.
        tensor_parallel_size: processes that share a batch and split heads, hidden units and experts.
        expert_parallel_size: processes that split the routed experts and send each other's tokens to them.
        reshard_after_forward: gather a block's weights again for the backward pass rather than keep them.
        cpu_offload: keep shards and optimizer state in the host's memory and step there; CUDA only.
        save_distributed_checkpoint: write checkpoints as folders of shards; false gathers them into one file.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
    ) -> None:
        for name, size in (
            ("data_parallel_size", data_parallel_size),
            ("tensor_parallel_size", tensor_parallel_size),
            ("expert_parallel_size", expert_parallel_size),
        ):
            require(size == "auto" or size >= 1, f"trainer.strategy.{name}: must be at least 1, got {size}")  # type: ignore[operator]
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint)
        self.expert_parallel_size = expert_parallel_size
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload
        self._to_load: Path | dict[str, Any] | None = None

    # --- what is possible

    def sizes(self, processes: int) -> ParallelSizes:
        """The mesh for so many processes.

        Raises:
            UserError: the sizes do not multiply to it.
        """
        tensor, expert = self._tensor_parallel_size, self.expert_parallel_size
        assert isinstance(tensor, int)
        wanted = self._data_parallel_size
        data = wanted if isinstance(wanted, int) else max(processes // (tensor * expert), 1)
        require(
            data * tensor * expert == processes,
            f"trainer.strategy: data_parallel_size {data} x tensor_parallel_size {tensor} x expert_parallel_size "
            f"{expert} is {data * tensor * expert}, but trainer.devices x num_nodes is {processes}",
        )
        return ParallelSizes(data, tensor, expert)

    def check(self, module: Any, processes: int, accelerator: str) -> None:
        """Refuse, before any data is read, what cannot run.

        Raises:
            UserError: naming the key.
        """
        require(
            isinstance(getattr(module, "config", None), TransformerConfig),
            f"trainer.strategy: FSDP2Strategy shards our language model only, not {type(module).__name__}; use ddp",
        )
        self.sizes(processes).check(module.config)
        require(not self.cpu_offload or accelerator == "cuda", "trainer.strategy.cpu_offload: needs a CUDA device")
        optimizer = module.optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
        require(
            type(optimizer) in OPTIMIZERS,
            f"model.optimizer: {type(optimizer).__name__} does not work on sharded weights; use Muon or "
            "torch.optim.AdamW, Adam or SGD with this trainer.strategy",
        )

    # --- setting up

    def setup_environment(self) -> None:
        """Start the process group and lay out the mesh."""
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        self._device_mesh = device_mesh(self.sizes(self.world_size), self.root_device.type)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the data is this process's: processes that split matrices see the same batches."""
        if EXPERT in (self.device_mesh.mesh_dim_names or ()):
            return {"num_replicas": self.world_size, "rank": self.global_rank}
        data = self.device_mesh[DATA]
        return {"num_replicas": data.size(), "rank": data.get_local_rank()}

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the model that `configure_model` built."""
        model = self.lightning_module.model  # type: ignore[union-attr]
        assert isinstance(model, Transformer)
        if not any(True for _ in sharded_modules(model)):
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = self.broadcast_tensor(tensor.data)
            parallelize(model, self.device_mesh, self.reshard_after_forward, self.cpu_offload)
        super().setup(trainer)

    def broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """The first process's values: without a seed every process draws its own weights."""
        moved = tensor.to(self.root_device)
        torch.distributed.broadcast(moved, src=0)
        return moved.to(tensor.device)

    def model_to_device(self) -> None:
        """Move what is not sharded (buffers, metrics); shards are where they belong."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.lightning_module.modules():  # type: ignore[union-attr]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.root_device)
            if isinstance(module, Metric):  # its sums are no buffers
                module.to(self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Keep the gradients of a micro-batch here: the step's last one sums them over processes."""
        modules = list(sharded_modules(self.lightning_module))  # type: ignore[arg-type]
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)

    # --- checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for the optimizer's state after the module has looked at the checkpoint."""
        return True

    def _reshard(self) -> None:
        """Let go of gathered weights (an evaluation keeps the last ones): names and states belong to the shards."""
        for module in sharded_modules(self.lightning_module):  # type: ignore[arg-type]
            module.reshard()

    def on_validation_end(self) -> None:
        """The next step begins with shards."""
        self._reshard()

    def _names(self) -> dict[Tensor, str]:
        self._reshard()
        return {p: name for name, p in self.lightning_module.named_parameters()}  # type: ignore[union-attr]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights and buffers; shards, or whole ones on the first process."""
        self._reshard()
        return self._gathered(self.lightning_module.state_dict())  # type: ignore[union-attr]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State by parameters' names; in one file, by their numbers, as a single process has it."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        named = named_optimizer_state(optimizer, self._names())
        if self._save_distributed_checkpoint:
            return named
        whole = {name: self._gathered(values) for name, values in named["state"].items()}
        return {**optimizer.state_dict(), "state": dict(enumerate_state(named["param_groups"], whole))}

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        if self._save_distributed_checkpoint:
            return dict(tensors)
        whole = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.is_global_zero:
                whole[name] = full.cpu()
        return whole

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder of shards, or one file from the first process."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            self.barrier()
            return
        tensors = {f"state_dict.{name}": tensor for name, tensor in checkpoint.pop("state_dict").items()}
        groups = []
        for number, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            tensors |= optimizer_tensors(number, optimizer["state"])
            groups.append({"state": {}, "param_groups": optimizer["param_groups"]})
        meta = {**checkpoint, "state_dict": {}, "optimizer_states": groups}
        save_sharded(path, tensors, meta, f"step-{checkpoint['global_step']}")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read all but the tensors; those are loaded once the module has accepted the checkpoint."""
        path = Path(self.broadcast(checkpoint_path))
        self._to_load = path if is_sharded(path) else read_checkpoint(path)
        return read_meta(path) if isinstance(self._to_load, Path) else dict(self._to_load)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fill in this process's shards."""
        ours = self.lightning_module.state_dict()  # type: ignore[union-attr]
        if isinstance(self._to_load, Path):
            load_sharded(self._to_load, {f"state_dict.{name}": tensor for name, tensor in ours.items()})
        else:
            for name, tensor in ours.items():
                tensor.copy_(distribute_like(checkpoint["state_dict"][name], tensor))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Fill in the moments of this process's shards; a parameter that has none yet gets none."""
        names = self._names()
        parameters = {name: p for p, name in names.items()}
        for number, optimizer in enumerate(self.optimizers):
            if isinstance(self._to_load, Path):
                state = empty_optimizer_state(number, parameters, stored_tensors(self._to_load))
                load_sharded(self._to_load, optimizer_tensors(number, state))
            else:
                saved = checkpoint["optimizer_states"][number]
                order = [names[p] for group in optimizer.param_groups for p in group["params"]]
                state = {
                    order[i]: {k: distribute_like(v, parameters[order[i]]) if v.ndim else v for k, v in values.items()}
                    for i, values in saved["state"].items()
                }
            for name, values in state.items():
                optimizer.state[parameters[name]] = values
        self._to_load = None


def enumerate_state(groups: list[dict[str, Any]], state: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """State by the parameters' numbers instead of their names."""
    order = [name for group in groups for name in group["params"]]
    return [(i, state[name]) for i, name in enumerate(order) if name in state]
