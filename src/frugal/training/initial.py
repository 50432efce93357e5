"""Weights that a new run starts from: of a checkpoint of ours, or of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from frugal.errors import UserError
from frugal.model.config import TransformerConfig
from frugal.model.hf import from_hf, read_hf_shape
from frugal.training.checkpointing import checkpoint_file, read_checkpoint
from frugal.training.lora import plain_weights


def _read(source: str) -> dict[str, Any] | None:
    """The checkpoint, or None if the source is a Hugging Face folder."""
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "checkpoints").is_dir():
        return None
    content = read_checkpoint(checkpoint_file(str(path)), key="model.init_from")
    if "transformer" not in content:
        raise UserError(f"model.init_from: {source} holds no model of ours; `frugal export` it and set model.path")
    return content


def initial_shape(source: str) -> TransformerConfig:
    """The model's shape.

    Raises:
        UserError: nothing there, or no model of ours and none that ours computes.
    """
    content = _read(source)
    if content is None:
        return read_hf_shape(Path(source).expanduser())[0]
    return TransformerConfig.from_dict(content["transformer"])


def initial_weights(source: str) -> dict[str, Tensor]:
    """The transformer's `state_dict`, adapters merged in."""
    content = _read(source)
    return from_hf(Path(source).expanduser())[1] if content is None else plain_weights(content)
