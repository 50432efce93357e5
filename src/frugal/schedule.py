"""What changes with time, as pure functions of the step: they can be plotted before a run and resume exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from frugal.errors import UserError


def check_starts(key: str, starts: Sequence[int]) -> None:
    """Refuse a list of stages that does not begin at step 0 and go on in order.

    Raises:
        UserError: naming the stage below `key`.
    """
    for i, (start, before) in enumerate(zip(starts, [-1, *starts], strict=False)):
        if i == 0 and start != 0:
            raise UserError(f"{key}[0].start: the first stage starts at step 0, got {start}")
        if start <= before:
            raise UserError(f"{key}[{i}].start: {start} does not come after the stage before it ({before})")


@dataclass(frozen=True)
class LossWeight:
    """Weight of an additional loss, which may change once towards the end of a run.

    Args:
        start: weight from the first step (DeepSeek-V3 weighs multi-token prediction 0.3, and 0.1 in the last third).
        final: weight in the last part of the run; null keeps the first.
        final_fraction: last share of all steps that counts as that part.
    """

    start: float = 0.3
    final: float | None = None
    final_fraction: float = 0.32

    def __post_init__(self) -> None:
        if self.start < 0 or (self.final is not None and self.final < 0):
            raise UserError("model.mtp_loss_weight: start and final must not be negative")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"model.mtp_loss_weight.final_fraction: must lie in [0, 1], got {self.final_fraction}")

    def at(self, step: int, total_steps: int) -> float:
        """The weight at the optimizer step number `step` (from 0) of `total_steps`."""
        if self.final is None or step < total_steps * (1 - self.final_fraction):
            return self.start
        return self.final


@dataclass(frozen=True)
class WarmupStableDecay:
    """Learning-rate factor: linear warmup, a plateau, a decay at the end (WSD, Hu et al. 2024, arXiv 2404.06395).

    Args:
        warmup_steps: steps until the full rate is reached.
        decay_fraction: last share of all steps over which the rate falls; 1.0 gives a decay right after the warmup.
        shape: how it falls: linear, cosine, or 1-sqrt (Hägele et al. 2024, arXiv 2405.18392).
        final: factor at the last step.
    """

    warmup_steps: int = 0
    decay_fraction: float = 0.2
    shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"model.schedule.warmup_steps: must not be negative, got {self.warmup_steps}")
        if not 0 <= self.final <= 1:
            raise UserError(f"model.schedule.final: must lie in [0, 1], got {self.final}")
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(f"model.schedule.decay_fraction: must lie in [0, 1], got {self.decay_fraction}")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor on the peak learning rate for the optimizer step number `step` (from 0) of `total_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        decay_steps = min(round(self.decay_fraction * total_steps), total_steps - self.warmup_steps)
        remaining = total_steps - step
        if decay_steps <= 0 or remaining > decay_steps:
            return 1.0
        done = 1 - max(remaining, 0) / decay_steps
        fall = {"linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2, "1-sqrt": math.sqrt(done)}[self.shape]
        return 1 - (1 - self.final) * fall


@dataclass(frozen=True)
class Ramp:
    """A value that rises linearly from 0, stays, and falls linearly back to 0.

    Args:
        value: the plateau; the whole run by default.
        start: first step with a value above 0.
        ramp_in: steps over which it rises, counted from start; 0 is at once.
        stop: first step that is at 0 again; null means never.
        ramp_out: steps before stop over which it falls.
    """

    value: float = 1.0
    start: int = 0
    ramp_in: int = 0
    stop: int | None = None
    ramp_out: int = 0

    def __post_init__(self) -> None:
        for key in ("start", "ramp_in", "ramp_out"):
            if getattr(self, key) < 0:
                raise UserError(f"ramp.{key}: must not be negative, got {getattr(self, key)}")
        if self.stop is None and self.ramp_out:
            raise UserError(f"ramp.ramp_out: {self.ramp_out} steps before which step? set ramp.stop")
        if self.stop is not None and self.stop < self.start + self.ramp_in + self.ramp_out:
            raise UserError(f"ramp.stop: must be at least start + ramp_in + ramp_out, got {self.stop}")

    def at(self, step: int) -> float:
        """The value at a step."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        rise = (step - self.start + 1) / (self.ramp_in + 1)
        fall = (self.stop - step) / (self.ramp_out + 1) if self.stop is not None else 1.0
        return self.value * min(1.0, rise, fall)
