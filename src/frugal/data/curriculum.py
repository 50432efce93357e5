"""Which sequences, and how long ones, a run sees at which step: pure functions of the step.

Shape letters: M sequences of a source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from frugal.data.difficulty import Difficulty, Scorer, check_reference
from frugal.errors import require
from frugal.schedule import check_starts


@dataclass(frozen=True)
class Curriculum:
    """Sequences by difficulty: at each step the batch is drawn from the easiest so-and-so-many (Bengio et al. 2009).

    After `steps` the run goes on in its usual order, each sequence once per epoch.

    Args:
        difficulty: rarity is the mean surprise of a sequence's tokens by their frequency (Platanios et al. 2019),
            compressibility its size after zlib, length the mean length of its documents, level the highest level
            among them (for sources that know one), loss what `reference` says; random is the control: pacing without
            meaning.
        steps: step at which the pool is the whole source.
        start: share of the sequences in the pool at step 0.
        pacing: how the pool grows (Wu et al. 2021, arXiv 2012.03107): linearly; root, fast at first, as the square root
            (the competence of Platanios et al. 2019); step, at `start` until half-way, then whole; exponential.
        reverse: hardest first, the anti-curriculum: a control.
        reference: the model whose loss is the difficulty; its scoring is charged to the run, its training is not.
    """

    difficulty: Difficulty
    steps: int
    start: float = 0.1
    pacing: Literal["linear", "root", "step", "exponential"] = "root"
    reverse: bool = False
    reference: Scorer | None = None

    def __post_init__(self) -> None:
        check_reference("data.curriculum", self.difficulty, self.reference)
        require(self.steps > 0, f"data.curriculum.steps: must be positive, got {self.steps}")
        require(0 < self.start <= 1, f"data.curriculum.start: must lie in (0, 1], got {self.start}")

    def share(self, step: int) -> float:
        """Share of the sequences in the pool at a step, in (0, 1]."""
        if step >= self.steps:
            return 1.0
        done = step / self.steps
        if self.pacing == "linear":
            return self.start + (1 - self.start) * done
        if self.pacing == "root":
            return math.sqrt(self.start**2 + (1 - self.start**2) * done)
        if self.pacing == "exponential":
            return self.start ** (1 - done)
        return self.start if done < 0.5 else 1.0


@dataclass(frozen=True)
class LengthStage:
    """From a step on, sequences of this length: a batch keeps its tokens, so it has more of the shorter sequences.

    Training on short sequences first is cheaper and steadier (Li et al. 2022, arXiv 2108.06084). Its controls are
    full-length sequences throughout, and short ones throughout.

    Args:
        start: optimizer step from which the length holds; the first stage starts at 0.
        seq_len: tokens per sequence; divides data.seq_len.
    """

    start: int
    seq_len: int


@dataclass(frozen=True)
class ResolutionStage:
    """From a step on, images of this size: fewer patches, cheaper steps (progressive resizing; Touvron et al. 2019).

    Args:
        start: optimizer step from which the size holds; the first stage starts at 0.
        image_size: height and width in pixels, at most data.image_size; a multiple of the model's patch_size.
    """

    start: int
    image_size: int


def check_resolutions(stages: Sequence[ResolutionStage], image_size: int) -> None:
    """Refuse stages out of order and sizes beyond the largest.

    Raises:
        UserError: naming the stage.
    """
    check_starts("data.resolutions", [stage.start for stage in stages])
    for i, stage in enumerate(stages):
        require(
            0 < stage.image_size <= image_size,
            f"data.resolutions[{i}].image_size: must lie between 1 and data.image_size ({image_size}), got "
            f"{stage.image_size}",
        )


def resolution_at(stages: Sequence[ResolutionStage], image_size: int, step: int) -> int:
    """Height and width of the images at a step."""
    return next((stage.image_size for stage in reversed(stages) if stage.start <= step), image_size)


def check_lengths(stages: Sequence[LengthStage], seq_len: int) -> None:
    """Refuse stages out of order and lengths that do not divide the longest.

    Raises:
        UserError: naming the stage.
    """
    check_starts("data.lengths", [stage.start for stage in stages])
    for i, stage in enumerate(stages):
        require(
            stage.seq_len > 0 and seq_len % stage.seq_len == 0,
            f"data.lengths[{i}].seq_len: {stage.seq_len} does not divide data.seq_len ({seq_len})",
        )


def length_at(stages: Sequence[LengthStage], seq_len: int, step: int) -> int:
    """Tokens per sequence at a step."""
    return next((stage.seq_len for stage in reversed(stages) if stage.start <= step), seq_len)


@dataclass(frozen=True)
class BatchStage:
    """From a step on, micro-batches of so many sequences per device; it takes the place of data.batch_size.

    Small batches first learn more per token while the gradient is large beside its noise (Smith et al. 2018, arXiv
    1711.00489; McCandlish et al. 2018, arXiv 1812.06162). The learning rate does not follow.

    Args:
        start: optimizer step from which the size holds; the first stage starts at 0.
        batch_size: sequences per micro-batch and device.
    """

    start: int
    batch_size: int


def check_batches(stages: Sequence[BatchStage]) -> None:
    """Refuse stages out of order and empty batches.

    Raises:
        UserError: naming the stage.
    """
    check_starts("data.batch_ramp", [stage.start for stage in stages])
    for i, stage in enumerate(stages):
        require(stage.batch_size > 0, f"data.batch_ramp[{i}].batch_size: must be at least 1, got {stage.batch_size}")


def batch_size_at(stages: Sequence[BatchStage], batch_size: int, step: int) -> int:
    """Sequences per micro-batch and device at a step."""
    return next((stage.batch_size for stage in reversed(stages) if stage.start <= step), batch_size)


class PacedOrder:
    """A curriculum over one source: which sequence sample number `index` is at a step.

    Args:
        curriculum: what it is.
        difficulty: of each sequence, [M].
        seed: with the sample's index, decides the draw from the pool.
    """

    def __init__(self, curriculum: Curriculum, difficulty: np.ndarray, seed: int) -> None:
        self.curriculum, self.seed = curriculum, seed
        order = np.argsort(difficulty, kind="stable")
        self.order = order[::-1].copy() if curriculum.reverse else order

    def draw(self, index: int, step: int) -> int | None:
        """The sequence, in [0, M); None once the curriculum is over."""
        if step >= self.curriculum.steps:
            return None
        pool = max(1, math.ceil(self.curriculum.share(step) * len(self.order)))
        # A counter of its own: 0 is the epochs' order, small ones the text transforms.
        rng = np.random.Generator(np.random.Philox(key=[self.seed, index], counter=[0, 0, 0, 1 << 40]))
        return int(self.order[rng.integers(pool)])
