"""Writing and reading checkpoints: `last.ckpt` to go on from, `best.ckpt` to use."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from frugal.errors import UserError


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint of tensors and plain types; anything else is refused, never executed.

    Raises:
        UserError: the file is missing, truncated, no checkpoint, or holds more than tensors and plain types.
    """
    if not Path(path).is_file():
        raise UserError(f"ckpt_path: no file {path}")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:  # torch's own advice here is to trust the file; ours is not to
        raise UserError(
            f"ckpt_path: {path} is no checkpoint, or holds more than tensors and plain values; not loaded"
        ) from None
    except Exception:  # a damaged archive fails in many ways
        raise UserError(f"ckpt_path: {path} is damaged or no checkpoint; use another one of the same run") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"ckpt_path: {path} is no checkpoint of train.py (it has no `state_dict`)")
    return content


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint reader with one-line errors, restricted to tensors and plain types."""

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load on behalf of the Trainer."""
        return read_checkpoint(path, map_location)


class LastCheckpoint(ModelCheckpoint):
    """Keep `last.ckpt`, the state to go on from: every n steps, after each validation and at the end.

    Args:
        every_n_steps: optimizer steps between two checkpoints; what a crash can cost at most.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps <= 0:
            raise UserError(f"checkpoint.every_n_steps: must be positive, got {every_n_steps}")
        super().__init__(
            filename="last",
            save_top_k=1,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Save every n steps; where a validation is due, after it, so that a crash inside it does not skip it."""
        if not _validation_is_due(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the validation logged, too."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final state, unless it lies on the disk already."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def _validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether the Trainer validates right after the batch that just ended (for intervals counted in batches)."""
    every = trainer.val_check_batch
    done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    at_interval = isinstance(every, int) and every > 0 and done % every == 0
    return trainer.enable_validation and (at_interval or trainer.should_stop)


def best_checkpoint() -> ModelCheckpoint:
    """Keep `best.ckpt`, the state of the lowest validation loss."""
    return ModelCheckpoint(
        monitor="val/loss", filename="best", save_top_k=1, save_on_train_epoch_end=False, enable_version_counter=False
    )
