"""Detectors that speak once when a technique is on and does nothing, and stop a run that has broken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from frugal.errors import UserError
from frugal.model.linear import local
from frugal.tracking.run_folder import RunFolder
from frugal.training.clipping import gradients
from frugal.training.precision import ScaledHalf, underflow_shares

log = logging.getLogger(__name__)
# Float16 steps skipped in a row that end a run: the scale has fallen by 2^25 and still something overflows.
HOPELESS = 25


def starved_stages(
    starts: Sequence[int], total_steps: int, factor: Callable[[int], float], least: float = 0.1
) -> list[tuple[int, float]]:
    """Stages of a curriculum that live where the learning rate is near zero.

    Args:
        starts: first step of each stage, ascending; a stage ends where the next begins, the last with the run.
        factor: the learning rate at a step, as a share of its peak.
        least: a stage whose mean factor is below this is starved.

    Returns:
        First step and mean factor of each starved stage; stages that begin after the run are none of its own.
    """
    found = []
    for start, stop in zip(starts, [*starts[1:], total_steps], strict=True):
        steps = range(start, min(stop, total_steps))
        if steps and (mean := sum(factor(step) for step in steps) / len(steps)) < least:
            found.append((start, mean))
    return found


def broken_parameters(module: torch.nn.Module) -> tuple[list[str], int]:
    """Names of the parameters with a value that is not finite, and the number of all parameters."""
    named = list(module.named_parameters())
    if not named:
        return [], 0
    bad = torch.stack([~torch.isfinite(local(p.detach())).all() for _, p in named]).float()
    meshes = [p.device_mesh for _, p in named if hasattr(p, "device_mesh")]
    if meshes:  # sharded: each process sees its own part
        bad = bad.to(meshes[0].device_type)
        torch.distributed.all_reduce(bad)
    finite = (bad == 0).tolist()
    return [name for (name, _), good in zip(named, finite, strict=True) if not good], len(named)


class Diagnostics(pl.Callback):
    """Watch a run; each warning is given once, and no checkpoint of a broken state is ever written.

    Whether loss and gradients are finite is noted on the device at every step, without waiting for it, and read at
    logging steps, before a validation, and before a checkpoint is written. Then training stops with the step's number.
    Under float16 with a scaler a gradient that is not finite is only a skipped step, until 25 come in a row.

    Args:
        nonfinite: stop at a loss or gradient that is not finite.
        dead_expert_steps: warn when an expert has had no token for so many steps; 0 switches it off.
        underflow: warn when more than this share of float16 gradients is zero or subnormal.
        wait_fraction: warn when more than this share of the time goes into waiting for batches.
        starved_factor: warn about a stage of the data with a mean learning rate below this share of the peak.
    """

    def __init__(
        self,
        nonfinite: bool = True,
        dead_expert_steps: int = 500,
        underflow: float = 0.5,
        wait_fraction: float = 0.2,
        starved_factor: float = 0.1,
    ) -> None:
        if dead_expert_steps < 0:
            raise UserError(f"diagnostics.dead_expert_steps: must not be negative, got {dead_expert_steps}")
        for key, value in (
            ("underflow", underflow),
            ("wait_fraction", wait_fraction),
            ("starved_factor", starved_factor),
        ):
            if not 0 <= value <= 1:
                raise UserError(f"diagnostics.{key}: must lie in [0, 1], got {value}")
        self.nonfinite, self.dead_expert_steps, self.underflow = nonfinite, dead_expert_steps, underflow
        self.wait_fraction, self.starved_factor = wait_fraction, starved_factor
        self.said: set[str] = set()
        self._first_bad: Tensor | None = None  # the first step that was not finite, or -1
        self._idle_LE: Tensor | None = None  # steps since each expert last had a token
        self._slow_rows = 0

    def state_dict(self) -> dict[str, Any]:
        """What has been said, and how long each expert has been idle."""
        return {"said": sorted(self.said), "idle": self._idle_LE, "slow_rows": self._slow_rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, and say nothing twice."""
        self.said, self._idle_LE = set(state_dict["said"]), state_dict["idle"]
        self._slow_rows = state_dict["slow_rows"]

    def say(self, trainer: pl.Trainer, key: str, message: str) -> None:
        """Warn once per run, on the first process."""
        if key not in self.said:
            self.said.add(key)
            if trainer.is_global_zero:
                log.warning("diagnostics: %s", message)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Hold the data's stages against the learning rate."""
        data, schedule = getattr(trainer, "datamodule", None), pl_module.schedule
        for key in ("lengths", "mixture", "batch_ramp"):
            starts = [stage.start for stage in getattr(data, key, None) or []]
            if len(starts) < 2:
                continue
            factor = lambda step: schedule.factor(step, trainer.max_steps)  # noqa: E731
            for start, mean in starved_stages(starts, trainer.max_steps, factor, self.starved_factor):
                self.say(
                    trainer,
                    f"{key} {start}",
                    f"the stage of data.{key} from step {start} trains at {mean:.1%} of the peak learning rate: it can "
                    "hardly teach anything; start it earlier or decay later (model.schedule)",
                )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Under float16, log how much of the gradients was lost (unscaled here, and not yet rescaled or clipped)."""
        plugin = trainer.precision_plugin
        if not isinstance(plugin, ScaledHalf) or (trainer.global_step + 1) % trainer.log_every_n_steps:
            return
        assert plugin.scaler is not None
        grads = gradients(p for group in optimizer.param_groups for p in group["params"])
        scale = plugin.scaler.get_scale()
        zero, subnormal = (x.item() for x in underflow_shares(grads, scale))
        pl_module.log_dict(
            {
                "precision/loss_scale": scale,
                "precision/zero_gradients": zero,
                "precision/subnormal_gradients": subnormal,
                "precision/skipped_steps": float(plugin.skipped),
            }
        )
        if zero + subnormal > self.underflow:
            self.say(
                trainer,
                "underflow",
                f"step {trainer.global_step}: {zero:.0%} of the float16 gradients are zero and {subnormal:.0%} "
                "subnormal at the present loss scale; use trainer.precision bf16-mixed",
            )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Note the finished step on the device; at logging steps read what was noted."""
        if not pl_module.step_complete:
            return
        step, plugin = trainer.global_step - 1, trainer.precision_plugin
        if isinstance(plugin, ScaledHalf):
            bad = plugin.skipped_in_a_row >= HOPELESS
        else:
            bad = ~(torch.isfinite(pl_module.step_nats) & torch.isfinite(pl_module.grad_norm))
        first = torch.full_like(bad, -1, dtype=torch.int64) if self._first_bad is None else self._first_bad
        self._first_bad = torch.where(bad & (first < 0), step, first)
        moes = pl_module.model.moe_layers() if self.dead_expert_steps else {}
        if moes:
            load_LE = torch.stack([moe.load for moe in moes.values()])
            idle_LE = torch.zeros_like(load_LE) if self._idle_LE is None else self._idle_LE.to(load_LE.device)
            self._idle_LE = torch.where(load_LE > 0, 0.0, idle_LE + 1)
        if trainer.global_step % trainer.log_every_n_steps:
            return
        self.check(trainer, pl_module)
        self._check_experts(trainer, list(moes))
        self._check_waiting(trainer)

    def _check_experts(self, trainer: pl.Trainer, layers: list[Any]) -> None:
        if not layers or self._idle_LE is None:
            return
        dead_LE = self._idle_LE >= self.dead_expert_steps
        for layer, count in zip(layers, dead_LE.sum(dim=1).tolist(), strict=True):
            if count:
                self.say(
                    trainer,
                    f"dead experts {layer}",
                    f"{count} experts of layer {layer} have had no token for {self.dead_expert_steps} steps: they cost "
                    "memory and do nothing; raise expert_bias.rate or use fewer experts",
                )

    def _check_waiting(self, trainer: pl.Trainer) -> None:
        waited = trainer.callback_metrics.get("data/wait_fraction")
        if waited is None:
            return
        self._slow_rows = self._slow_rows + 1 if float(waited) > self.wait_fraction else 0
        if self._slow_rows == 3:
            self.say(
                trainer,
                "waiting",
                f"training waits for batches {float(waited):.0%} of the time; raise data.num_workers",
            )

    def check(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop if some step so far was not finite.

        Raises:
            UserError: with the step, and where the last good checkpoint lies.
        """
        if not self.nonfinite or self._first_bad is None or (step := int(self._first_bad)) < 0:
            return
        if isinstance(trainer.precision_plugin, ScaledHalf):
            what = f"gradients overflow float16 at {HOPELESS} steps in a row up to step {step}"
        else:
            what = f"loss or gradient is not finite at step {step}"
        self._stop(trainer, pl_module, what)

    def _stop(self, trainer: pl.Trainer, pl_module: Any, what: str) -> None:
        broken, total = broken_parameters(pl_module)
        where = f" (first in {broken[0]}; {len(broken)} of {total} parameters)" if 0 < len(broken) < total else ""
        last = RunFolder(Path(trainer.default_root_dir)).checkpoints / "last.ckpt"
        good = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint had been written yet"
        raise UserError(f"training: {what}{where}; {good}; lower model.optimizer.lr or look at the data of that step")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A broken model is not worth validating."""
        if trainer.state.fn == "fit":
            self.check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a broken state over a good one; weights are read once more, an update can break them."""
        if not self.nonfinite:
            return
        self.check(trainer, pl_module)
        if broken_parameters(pl_module)[0]:
            self._stop(trainer, pl_module, f"weights are not finite after step {trainer.global_step - 1}")
