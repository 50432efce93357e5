"""What a run will see, step by step, found without training: the schedules are functions of the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frugal.data.batches import TrainingSequences
from frugal.data.image_batches import TrainingImages


@dataclass(frozen=True)
class Plan:
    """Samples of P points along a run.

    Args:
        steps: first step of each point's window, [P].
        difficulty: 10%, 50% and 90% quantile of the samples' difficulty there, [P, 3].
        kind: which difficulty.
        size: of a sample, [P].
        size_name: what that counts.
        shares: of each source, [P, sources].
        epochs: how often each source has been gone through by the end, [sources].
    """

    steps: np.ndarray
    difficulty: np.ndarray
    kind: str
    size: np.ndarray
    size_name: str
    shares: np.ndarray
    epochs: np.ndarray


def plan_of(
    data: TrainingSequences | TrainingImages,
    difficulty: list[np.ndarray],
    kind: str,
    total_steps: int,
    points: int = 100,
    samples: int = 256,
) -> Plan:
    """Walk along the run and look at what is drawn.

    Args:
        data: the training samples, with their schedules.
        difficulty: of each scored sample of each source, [M].
        kind: its name.
        total_steps: the run's length.
        points: windows looked at, evenly spread.
        samples: consecutive samples looked at in each window; the last windows end with the run.
    """
    drawn = data.clock.sample(total_steps)
    steps = np.unique(np.linspace(0, total_steps - 1, min(points, total_steps)).astype(np.int64))
    quantiles, shares = [], []
    for step in steps.tolist():
        first = max(0, min(data.clock.sample(step), drawn - samples))
        found = [data.scored(i) for i in range(first, min(first + samples, drawn))]
        quantiles.append(np.quantile([difficulty[part][k] for part, k in found], [0.1, 0.5, 0.9]))
        parts = np.bincount([part for part, _ in found], minlength=len(difficulty))
        shares.append(parts / parts.sum())
    sizes = np.array([data.size_at(step) for step in steps.tolist()])
    return Plan(steps, np.array(quantiles), kind, sizes, data.size_name, np.array(shares), data.epochs(drawn))
