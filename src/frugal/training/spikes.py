"""Leave out an optimizer step whose gradient is far outside of what the steps before it had."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from frugal.errors import require


@dataclass(frozen=True)
class SkipSpikes:
    """A step is skipped if its gradient's norm, before clipping, lies too far above the mean of the latest ones.

    As in OLMo 2's training (OLMo team 2024, arXiv 2501.00656). Skipped norms count for the steps after them, so that a
    lasting change is accepted after a few.

    Args:
        sigmas: standard deviations above the mean that make a spike.
        window: how many of the latest norms count; none is a spike before half of them are known.
    """

    sigmas: float = 6.0
    window: int = 128

    def __post_init__(self) -> None:
        require(self.sigmas > 0, f"model.skip_spikes.sigmas: must be positive, got {self.sigmas}")
        require(self.window >= 4, f"model.skip_spikes.window: must be at least 4, got {self.window}")

    def is_spike(self, norm: float, latest: Sequence[float]) -> bool:
        """Whether a step of this gradient norm is to be skipped; what is not finite is for others to judge."""
        if len(latest) < self.window // 2 or not math.isfinite(norm):
            return False
        return norm > statistics.fmean(latest) + self.sigmas * statistics.stdev(latest)
