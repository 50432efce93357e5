"""An adaptive curriculum's side of training: measure each group's loss, let the data decide, keep the record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from frugal.data.adaptive import AdaptiveOrder
from frugal.tracking.run_folder import RunFolder, keep_steps


class CurriculumMonitor(pl.Callback):
    """Sum the losses of the groups over windows, and let the data module decide at the end of each.

    Logs each group's share of the samples, and its loss in the latest window. Decisions go to `curriculum.jsonl` with
    the step at which they take effect. Does nothing without `data.adaptive`.
    """

    def __init__(self) -> None:
        self._window: Tensor | None = None  # nats and labels, [2, G]

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window."""
        return {} if self._window is None else {"window": self._window.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the window."""
        self._window = state_dict.get("window")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Drop the decisions of steps that a resumed run is about to do again."""
        if trainer.is_global_zero:
            keep_steps(RunFolder(Path(trainer.default_root_dir)).curriculum, trainer.global_step - 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """After a whole step: add its losses; after a window: decide."""
        adaptive: AdaptiveOrder | None = getattr(trainer.datamodule, "adaptive", None)
        if adaptive is None or not pl_module.step_complete:
            return
        step_2G = pl_module.step_groups.double()
        self._window = step_2G if self._window is None else self._window.to(step_2G) + step_2G
        if trainer.global_step % adaptive.config.every == 0:
            nats, labels = self._window.tolist()
            self._window = None
            row = adaptive.observe([n / m if m else math.nan for n, m in zip(nats, labels, strict=True)])
            if trainer.is_global_zero and not trainer.fast_dev_run:
                with RunFolder(Path(trainer.default_root_dir)).curriculum.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": trainer.global_step - 1, **row}) + "\n")
        if trainer.global_step % trainer.log_every_n_steps == 0:
            now = {"share": adaptive.shares_at(trainer.global_step - 1), "loss": adaptive.latest_losses()}
            pl_module.log_dict(
                {f"curriculum/{key}/{name}": x for key, values in now.items() for name, x in values.items()}
            )
