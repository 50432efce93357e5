"""Progress: a rich bar on a terminal, one line per validation elsewhere (CI logs, Slurm output)."""

from __future__ import annotations

import logging
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

log = logging.getLogger(__name__)


class Progress(RichProgressBar):
    """Steps done, time left, loss and tokens/s."""

    def __init__(self) -> None:
        # Showing the loss waits for the device, so not at every step.
        super().__init__(refresh_rate=5, leave=True)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A live bar makes sense on a terminal only."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Lightning's columns without batches per second: tokens/s stand beside the loss, in 80 columns."""
        return [
            column for column in super().configure_columns(trainer) if type(column).__name__ != "ProcessingSpeedColumn"
        ]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the screen to the closing card."""
        self._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Short names, rounded values."""
        values = trainer.progress_bar_metrics
        shown: dict[str, Any] = {}
        if "train/loss" in values:
            shown["loss"] = f"{float(values['train/loss']):.3f}"
        if "val/bits_per_byte" in trainer.callback_metrics:
            shown["val bpb"] = f"{float(trainer.callback_metrics['val/bits_per_byte']):.3f}"
        elif "val/accuracy" in trainer.callback_metrics:
            shown["val right"] = f"{float(trainer.callback_metrics['val/accuracy']):.1%}"
        if "speed/tokens_per_second" in values:
            shown["tok/s"] = f"{float(values['speed/tokens_per_second']):,.0f}"
        return shown

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the run stands."""
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != "fit" or sys.stdout.isatty():
            return
        values: dict[str, Any] = {**trainer.callback_metrics, **trainer.progress_bar_metrics}
        parts = [f"step {trainer.global_step}/{trainer.max_steps}"]
        for key, label, form in (
            ("train/loss", "train loss", ".3f"),
            ("val/loss", "val loss", ".3f"),
            ("val/bits_per_byte", "val bits/byte", ".3f"),
            ("val/accuracy", "val right", ".2%"),
            ("speed/tokens_per_second", "tokens/s", ",.0f"),
        ):
            if key in values:
                parts.append(f"{label} {float(values[key]):{form}}")
        if trainer.is_global_zero:
            log.info(" · ".join(parts))
