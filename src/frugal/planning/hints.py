"""Plans that defeat themselves, seen before the run."""

from __future__ import annotations

from collections.abc import Callable


def late_curriculum(curriculum_steps: int, total_steps: int, rate: Callable[[int, int], float]) -> str | None:
    """A warning if the run ends within a curriculum, or sees what is hard only when the learning rate is nearly zero.

    Args:
        curriculum_steps: step at which the curriculum is over.
        total_steps: the run's length.
        rate: factor on the peak learning rate at (step, total steps).
    """
    if curriculum_steps >= total_steps:
        return (
            f"data.curriculum.steps: the run ends at step {total_steps}, within the curriculum of {curriculum_steps}"
            "; it never trains on the whole text"
        )
    if (left := rate(curriculum_steps, total_steps)) < 0.1:
        return (
            f"data.curriculum.steps: when the curriculum ends, at step {curriculum_steps}, the learning rate is down "
            f"to {left:.0%} of its peak; what is hard is hardly learned then"
        )
    return None
