"""How evenly the experts are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from frugal.tracking.run_folder import RunFolder, keep_steps


def load_metrics(load_LE: Tensor) -> dict[str, float]:
    """Balance figures of the loads of L layers and E experts.

    `max_violation` is the fullest expert's load over the mean, less one, in the worst layer (MaxVio, Wang et al.
    2024); 0 is perfect. `min_load` is the emptiest expert's load over the mean; `dead_experts` counts experts
    without a single token; `entropy` is the loads' entropy over its maximum, 1 when all are even (mean over layers).
    """
    load_LE = load_LE.double()
    ratio_LE = load_LE / load_LE.mean(dim=1, keepdim=True).clamp_min(1e-12)
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp_min(1e-12)
    entropy_L = torch.special.entr(share_LE).sum(dim=1) / torch.log(torch.tensor(float(max(load_LE.shape[1], 2))))
    return {
        "max_violation": (ratio_LE.max() - 1).item(),
        "min_load": ratio_LE.min().item(),
        "dead_experts": float((load_LE == 0).sum().item()),
        "entropy": entropy_L.mean().item(),
    }


class RoutingMonitor(pl.Callback):
    """Log the balance over windows of `trainer.log_every_n_steps` steps; shares go to `expert_load.jsonl`."""

    def __init__(self) -> None:
        self._window_LE: Tensor | None = None
        self.last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window, so that a resumed run logs what an uninterrupted one would."""
        return {"window": self._window_LE, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the window."""
        self._window_LE, self.last = state_dict["window"], state_dict["last"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Drop the lines of steps that a resumed run is about to do again."""
        if self._window_LE is not None:
            self._window_LE = self._window_LE.to(pl_module.device)
        if trainer.is_global_zero:
            keep_steps(RunFolder(Path(trainer.default_root_dir)).expert_load, trainer.global_step - 1)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Add the finished step's loads to the window; log when it is full."""
        moes = pl_module.model.moe_layers()
        if not moes or not pl_module.step_complete:
            return
        load_LE = torch.stack([moe.load for moe in moes.values()])
        self._window_LE = load_LE.clone() if self._window_LE is None else self._window_LE + load_LE
        if trainer.global_step % trainer.log_every_n_steps:
            return
        window_LE, self._window_LE = self._window_LE, None
        self.last = load_metrics(window_LE)
        pl_module.log_dict({f"router/{name}": value for name, value in self.last.items()})
        if trainer.is_global_zero and not trainer.fast_dev_run:
            share_LE = (window_LE / window_LE.sum(dim=1, keepdim=True)).tolist()
            layers = {str(layer): [round(x, 5) for x in row] for layer, row in zip(moes, share_LE, strict=True)}
            with RunFolder(Path(trainer.default_root_dir)).expert_load.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.global_step - 1, "layers": layers}) + "\n")
