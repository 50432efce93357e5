"""How several sources are mixed: which source the i-th sample of a run comes from, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from frugal.errors import UserError, require
from frugal.schedule import check_starts

BLOCK = 1024  # samples within which the shares hold to one sample


@dataclass(frozen=True)
class MixtureStage:
    """From a step on, how often each source is drawn.

    Args:
        start: optimizer step from which the weights hold; the first stage starts at 0.
        weights: share of the sequences by the source's name; they need not add up to one, and a source left out is
            not drawn.
    """

    start: int = 0
    weights: dict[str, float] = field(default_factory=dict)


def check_stages(stages: Sequence[MixtureStage], names: Sequence[str]) -> None:
    """Refuse stages out of order, unknown sources and weights that leave nothing.

    Raises:
        UserError: naming the stage.
    """
    check_starts("data.mixture", [stage.start for stage in stages])
    for i, stage in enumerate(stages):
        key = f"data.mixture[{i}]"
        for name, weight in stage.weights.items():
            require(name in names, f"{key}.weights: no source {name!r}; there are {', '.join(names)}")
            require(weight >= 0, f"{key}.weights: {name} must not be negative, got {weight}")
        require(sum(stage.weights.values()) > 0, f"{key}.weights: no source has a weight above zero")


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` in whole numbers by weight, int64 [parts]; the largest remainders get what is left over (Hamilton)."""
    share = np.asarray(weights, dtype=np.float64)
    exact = share / share.sum() * total
    counts = np.floor(exact).astype(np.int64)
    # Stable, so that equal remainders go to the first: the same on every machine.
    for part in np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]:
        counts[part] += 1
    if too_small := [
        i for i, (weight, count) in enumerate(zip(share, counts, strict=True)) if weight > 0 and not count
    ]:
        raise UserError(
            f"data.mixture: a weight of {share[too_small[0]] / share.sum():.2g} is less than one sample in {total}"
        )
    return counts


class Mixer:
    """Sample i of the run is the n-th one of source p: `locate(i)` gives (p, n).

    In every block of 1,024 samples each source has its share exactly, in an order drawn from (seed, stage, block); so
    any sample is found without walking there, and each source goes through its own sequences one after the other.

    Args:
        starts: first sample of each stage, growing from 0.
        weights: of each stage, one per source.
        seed: decides the order within blocks.
    """

    def __init__(self, starts: Sequence[int], weights: Sequence[Sequence[float]], seed: int) -> None:
        assert len(starts) == len(weights) and starts[0] == 0
        self.starts: list[int] = []
        self.counts: list[np.ndarray] = []
        self.before: list[np.ndarray] = []  # samples of each source before each stage
        self.seed = seed
        self._order = lru_cache(maxsize=8)(self._draw)
        for start, stage in zip(starts, weights, strict=True):
            self.append(start, stage)

    def append(self, start: int, weights: Sequence[float]) -> None:
        """Add a stage that begins at sample `start`, after the last one's."""
        counts = apportion(weights, BLOCK)
        drawn = (
            self._drawn(len(self.starts) - 1, int(start) - self.starts[-1]) if self.starts else np.zeros_like(counts)
        )
        self.starts.append(int(start))
        self.counts.append(counts)
        self.before.append(drawn)

    def _draw(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each sample of a block, and how many of that source came before it within the block."""
        # The second word's top bit keeps these draws apart from those of the sequences' order.
        key = np.array([self.seed, (1 << 63) + (stage << 40) + block], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        parts = rng.permutation(np.repeat(np.arange(len(self.counts[stage])), self.counts[stage]))
        rank = np.empty(BLOCK, dtype=np.int64)
        for part, count in enumerate(self.counts[stage]):
            rank[parts == part] = np.arange(count)
        return parts, rank

    def _drawn(self, stage: int, samples: int) -> np.ndarray:
        """Samples of each source before the stage and in its first `samples`."""
        blocks, rest = divmod(samples, BLOCK)
        partial = np.bincount(self._order(stage, blocks)[0][:rest], minlength=len(self.counts[stage]))
        return self.before[stage] + blocks * self.counts[stage] + partial

    def locate(self, index: int) -> tuple[int, int]:
        """Which source, and which of its samples."""
        stage = int(np.searchsorted(self.starts, index, side="right")) - 1
        block, position = divmod(int(index) - self.starts[stage], BLOCK)
        parts, rank = self._order(stage, block)
        part = int(parts[position])
        return part, int(self.before[stage][part] + block * self.counts[stage][part] + rank[position])

    def drawn_before(self, index: int) -> np.ndarray:
        """How many of the first `index` samples each source gives, int64 [parts]."""
        stage = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._drawn(stage, int(index) - self.starts[stage])

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=8)(self._draw)
