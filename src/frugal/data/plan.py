"""What a run will see, step by step, found without training: the schedules are functions of the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from frugal.data.batches import TrainingSequences
from frugal.data.curriculum import length_at


@dataclass(frozen=True)
class Plan:
    """Samples of P points along a run.

    Args:
        steps: first step of each point's window, [P].
        difficulty: 10%, 50% and 90% quantile of the sequences' difficulty there, [P, 3].
        kind: which difficulty.
        seq_len: tokens per sequence, [P].
        shares: of each source, [P, parts].
        epochs: how often each source has been gone through by the end, [parts].
    """

    steps: np.ndarray
    difficulty: np.ndarray
    kind: str
    seq_len: np.ndarray
    shares: np.ndarray
    epochs: np.ndarray


def plan_of(
    data: TrainingSequences,
    difficulty: list[np.ndarray],
    kind: str,
    total_steps: int,
    points: int = 100,
    samples: int = 256,
) -> Plan:
    """Walk along the run and look at what is drawn.

    Args:
        data: the training sequences, with their schedules.
        difficulty: of each whole sequence of each part, [M].
        kind: its name.
        total_steps: the run's length.
        points: windows looked at, evenly spread.
        samples: consecutive sequences looked at in each window.
    """
    drawn = data.clock.sample(total_steps)
    steps = np.unique(np.linspace(0, total_steps - 1, min(points, total_steps)).astype(np.int64))
    quantiles, shares, lengths = [], [], []
    for step in steps.tolist():
        first = data.clock.sample(step)
        found = [data.locate(i) for i in range(first, min(first + samples, drawn))]
        values = [_score(data, difficulty, part, start) for part, start in found]
        quantiles.append(np.quantile(values, [0.1, 0.5, 0.9]))
        parts = np.bincount([part for part, _ in found], minlength=len(data.parts))
        shares.append(parts / parts.sum())
        lengths.append(length_at(data.lengths, data.seq_len, step))
    counts = data.mixer.drawn_before(drawn) if data.mixer else np.array([drawn])
    return Plan(
        steps,
        np.array(quantiles),
        kind,
        np.array(lengths),
        np.array(shares),
        counts / np.array(data.per_epoch),
    )


def _score(data: TrainingSequences, difficulty: list[np.ndarray], part: int, start: int) -> float:
    """Of the whole sequence that a window overlaps most: epochs cut the text elsewhere than the scores do."""
    nearest = round((start - data.parts[part][0]) / data.seq_len)
    return float(difficulty[part][min(nearest, len(difficulty[part]) - 1)])
