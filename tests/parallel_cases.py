"""What tests/model/test_parallelize.py does in every process: sharded models against whole ones, and what they send."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frugal.model.config import AttentionConfig, LatentConfig, MoEConfig, SharingConfig, TransformerConfig
from frugal.model.parallelize import ParallelSizes, device_mesh, parallelize, sharded_modules
from frugal.model.recompute import recompute_blocks
from frugal.model.transformer import Transformer
from frugal.training.losses import sum_and_nll
from frugal.training.muon import Muon
from frugal.training.optim import parameter_groups

MOE = MoEConfig(8, 2, 16, n_shared_experts=1, first_k_dense=1, z_loss_coef=0.01, sequence_loss_coef=0.01)
GQA = AttentionConfig(n_heads=4, n_kv_heads=4, qk_norm="head")
MLA = AttentionConfig(
    n_heads=4,
    latent=LatentConfig(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
)


def shape(**changes: Any) -> TransformerConfig:
    values = {"vocab_size": 64, "d_model": 16, "n_layers": 3, "d_ff": 32, "attention": GQA, "moe": MOE}
    return TransformerConfig(**{**values, "max_seq_len": 16, "init_std": 0.1, **changes})


CASES: dict[str, tuple[TransformerConfig, dict[str, Any]]] = {
    "grouped-query, tied": (shape(tie_embeddings=True), {}),
    "latent": (shape(attention=MLA), {}),
    "no resharding": (shape(), {"reshard_after_forward": False}),
    "recomputed": (shape(), {"recompute": True}),
    "two tokens ahead": (shape(n_mtp=1), {}),
    "dense": (shape(moe=None), {}),
    "shared layers": (shape(moe=None, n_layers=4, sharing=SharingConfig(n_blocks=2)), {}),
}


def loss_of(model: Transformer, ids_BT: Tensor, labels_BT: Tensor, positions: int) -> Tensor:
    """As the LightningModule takes it: this process's part of the mean over all positions, router losses included."""
    rank, size = model.shared_by

    def losses() -> Tensor:
        hidden = model.hidden(ids_BT)
        mine, labels = (x.tensor_split(size, dim=1)[rank] for x in (hidden, labels_BT))
        nats = sum_and_nll(mine, model.head.weight, labels, 8)[0]
        for ahead in model.mtp_hidden(hidden, ids_BT):
            mine, labels = (x.tensor_split(size, dim=1)[rank] for x in (ahead, labels_BT[:, 1:]))
            nats = nats + 0.3 * sum_and_nll(mine, model.head.weight, labels, 8)[0]
        return nats

    nats = model.run(losses)
    loss = nats / positions
    router_loss = model.take_router_loss()
    return loss if router_loss is None else loss + router_loss * (labels_BT.numel() / positions / size)


class Sent(TorchDispatchMode):
    """Adds up what this process sends, by collective, as rings do."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce", "all_to_all"), 0.0)

    def average_rows(self) -> None:
        """How many rows arrive where depends on routing and remainders; the mean over processes does not."""
        rows = torch.tensor(self.bytes["all_to_all"])
        dist.all_reduce(rows)
        self.bytes["all_to_all"] = float(rows) / dist.get_world_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for kind, pieces, payload, factor in (
            ("all_gather", ("allgather_base",), lambda: args[0], 1),
            ("reduce_scatter", ("reduce_scatter_base",), lambda: args[1], 1),
            ("all_reduce", ("c10d.allreduce_",), lambda: args[0][0], 2),
            ("all_to_all", ("all_to_all_single",), lambda: args[0], 1),
            ("all_to_all", ("alltoall_base",), lambda: args[1], 1),
        ):
            if any(piece in name for piece in pieces) and (tensor := payload()).is_floating_point():
                group = next(a for a in args if isinstance(a, (torch.ScriptObject, str)))
                size = len(dist.get_process_group_ranks(unboxed(group)))
                self.bytes[kind] += factor * tensor.numel() * tensor.element_size() * (size - 1) / size
        return func(*args, **(kwargs or {}))


def unboxed(group: Any) -> Any:
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)
    return dist.ProcessGroup.unbox(group)


@contextmanager
def unsynchronized(model: Transformer, enabled: bool) -> Iterator[None]:
    for module in sharded_modules(model):
        module.set_requires_gradient_sync(not enabled, recurse=False)
    yield
    for module in sharded_modules(model):
        module.set_requires_gradient_sync(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(config: TransformerConfig, sizes: ParallelSizes, recompute: bool = False, **options: Any) -> dict[str, Any]:
    """Two micro-batches on the sharded model and on a whole one; the largest differences, and what was sent."""
    torch.manual_seed(0)
    one = Transformer(config)
    model = copy.deepcopy(one)
    mesh = device_mesh(sizes, "cpu")
    if recompute:
        recompute_blocks(model)
    parallelize(model, mesh, **options)
    ranks = sizes.data * sizes.expert
    rank = mesh["data_parallel"].get_local_rank() if sizes.tensor > 1 else dist.get_rank()
    data = torch.randint(config.vocab_size, (2, 2 * ranks, config.max_seq_len + 1))
    positions = data[:, :, 1:].numel()
    losses, sent = [], Sent()
    for number, batch in enumerate(data):
        mine = batch[2 * rank : 2 * rank + 2]
        for part in batch.split(2):  # router losses are means over a process's own sequences
            loss_of(one, part[:, :-1], part[:, 1:], positions).backward()
        with sent, unsynchronized(model, number == 0):
            loss = loss_of(model, mine[:, :-1], mine[:, 1:], positions)
            loss.backward()
        losses.append(loss.detach())
    sent.average_rows()
    found: dict[str, Any] = {"sent": sent.bytes}
    pairs = list(zip(one.named_parameters(), model.named_parameters(), strict=True))
    found["gradients"] = max(
        float((whole(q.grad) - p.grad).norm() / p.grad.norm().clamp_min(1e-12)) for (_, p), (_, q) in pairs
    )
    found["muon"] = step_with_muon(one, model)
    one.eval(), model.eval()
    with torch.no_grad():
        found["logits"] = float((one(data[0, :1, :-1]) - model(data[0, :1, :-1])).abs().max())
    return found


def step_with_muon(one: Transformer, model: Transformer) -> dict[str, Any]:
    """One step on both; the largest difference of a weight, and what was sent."""
    sent, optimizers = Sent(), [Muon(parameter_groups(m), lr=0.01, eps=1e-4) for m in (one, model)]
    optimizers[0].step()
    with sent:
        optimizers[1].step()
    sent.average_rows()
    pairs = zip(one.parameters(), model.parameters(), strict=True)
    return {"weights": max(float((whole(q) - p).abs().max()) for p, q in pairs), "sent": sent.bytes["all_to_all"]}


def placed_anyhow() -> float:
    """Muon on matrices and stacks that are cut in any way, unevenly too: the largest difference of a weight."""
    n = dist.get_world_size()
    flat, square = dist.init_device_mesh("cpu", (n,)), dist.init_device_mesh("cpu", (2, n // 2))
    shapes = [((10, 6), 1), ((6, 10), 1), ((12, 7), 2), ((3, 10, 7), 1), ((5, 6, 4), 2), ((3, 9), 1), ((3, 9), 1)]
    cases = [
        (shape, parts, mesh, places)
        for shape, parts in shapes
        for mesh, places in (
            *((flat, [Shard(dim)]) for dim in range(len(shape))),
            *((square, [Shard(a), Shard(b)]) for a in range(len(shape)) for b in range(len(shape))),
            (square, [Replicate(), Shard(1)]),
        )
    ]
    torch.manual_seed(0)
    ones = [nn.Parameter(torch.randn(shape)) for shape, *_ in cases]
    spread = [nn.Parameter(distribute_tensor(p.detach(), *case[2:])) for p, case in zip(ones, cases, strict=True)]
    groups = ([{"params": [p], "parts": case[1]} for p, case in zip(of, cases, strict=True)] for of in (ones, spread))
    optimizers = [Muon(group, lr=0.1) for group in groups]
    for _ in range(2):
        for p, q, case in zip(ones, spread, cases, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = distribute_tensor(p.grad, *case[2:])
        for optimizer in optimizers:
            optimizer.step()
    return max(float((q.full_tensor() - p).abs().max()) for p, q in zip(ones, spread, strict=True))


def copied(config: TransformerConfig) -> dict[str, Any]:
    """The same under DDP: what its buckets sum up."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Transformer(config))
    summed = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads the annotations
        summed.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    ids = torch.randint(config.vocab_size, (2, 8))
    with model.no_sync():
        model(ids).logsumexp(-1).sum().backward()
    model(ids).logsumexp(-1).sum().backward()
    n = dist.get_world_size()
    return {"sent": {"all_reduce": 2 * sum(summed) * (n - 1) / n}}


def meshes_of(n: int) -> dict[str, ParallelSizes]:
    meshes = {
        "data": ParallelSizes(n),
        "tensor": ParallelSizes(n // 2, tensor=2),
        "expert": ParallelSizes(n // 2, 1, 2),
    }
    return meshes | ({"tensor 4": ParallelSizes(1, 4), "expert 4": ParallelSizes(1, 1, 4)} if n == 4 else {})


def cases_of(n: int) -> dict[str, tuple[TransformerConfig, ParallelSizes, dict[str, Any]]]:
    found = {}
    for case, (config, options) in CASES.items():
        for name, sizes in meshes_of(n).items():
            if not ((case == "shared layers" and name != "data") or (sizes.expert > 1 and config.moe is None)):
                found[f"{case}, {name}"] = (config, sizes, options)
    return found


def check() -> None:
    """Every case under every mesh of this many processes; writes `cases.json`."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["RANKS"]))
    cases = cases_of(dist.get_world_size())
    found = {name: compare(config, sizes, **options) for name, (config, sizes, options) in cases.items()}
    found["ddp"] = copied(CASES["dense"][0])
    found["muon"] = {"weights": placed_anyhow()}
    if dist.get_rank() == 0:
        Path("cases.json").write_text(json.dumps(found))
