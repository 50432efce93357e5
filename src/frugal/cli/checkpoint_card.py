"""What a checkpoint holds, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from frugal.training.checkpointing import read_checkpoint
from frugal.training.checksums import is_sealed
from frugal.units import short


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tensors that are one and the same memory (tied embeddings) have in common."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def checkpoint_card(path: Path) -> dict[str, Any]:
    """Step, weights, optimizer and size of a checkpoint.

    Raises:
        UserError: it is damaged or no checkpoint.
    """
    content = read_checkpoint(path)
    weights, moments = tensors_in(content["state_dict"]), tensors_in(content.get("optimizer_states"))

    def described(tensors: list[torch.Tensor]) -> str:
        own = list({_place(tensor): tensor for tensor in tensors}.values())
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in own})
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        count = sum(tensor.numel() for tensor in own)
        text = f"{short(count)} values in {len(own)} tensors, {short(size, 'B')}, {', '.join(kinds)}"
        tied = sum(tensor.numel() for tensor in tensors) - count
        return text + (f", and tied to them {short(tied)}" if tied else "")

    return {
        "file": str(path),
        "checksum": "good" if is_sealed(path) else "none",
        "size": short(sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()), "B"),
        "step": content["global_step"],
        "weights": described(weights),
        "optimizer state": described(moments),
        "callbacks": ", ".join(str(key).split("{")[0] for key in content.get("callbacks", {})),
        "written by": f"lightning {content.get('pytorch-lightning_version', 'unknown')}",
    }
