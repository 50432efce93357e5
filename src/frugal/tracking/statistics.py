"""Statistics of a savings study: what it costs to reach a loss, ratios paired by seed, verdicts. Pure functions."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Bound = Literal["exact", "at least", "at most", "either"]
Verdict = Literal["saves", "ties", "costs", "open", "one seed"]


def t_quantile(probability: float, df: int) -> float:
    """Quantile of Student's t for an integer number of degrees of freedom, by bisection of its closed form.

    Args:
        probability: between 0.5 and 1.
        df: degrees of freedom, at least 1.

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    if not 0.5 <= probability < 1 or df < 1:
        raise ValueError(f"no quantile {probability} of t with {df} degrees of freedom")

    def within(t: float) -> float:  # P(|T| < t)
        angle = math.atan(t / math.sqrt(df))
        cos, total = math.cos(angle), 0.0
        term = cos if df % 2 else 1.0
        for k in range(3 if df % 2 else 2, df + 1, 2):
            total += term
            term *= cos**2 * (k - 1) / k
        if df % 2:
            return 2 / math.pi * (angle + math.sin(angle) * total)
        return math.sin(angle) * total

    low, high = 0.0, 1.0
    while within(high) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * probability - 1 else (low, middle)
    return high


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and t-interval of independent values; with one value the interval is unbounded."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Point:
    """A finished run: its final validation loss and what it spent, by cost axis.

    `how` says by axis how the cost was measured, where that can differ: unlike costs make no ratio. `code` is a digest
    of the code that ran.
    """

    loss: float
    costs: Mapping[str, float]
    how: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None


@dataclass(frozen=True)
class Reach:
    """What it costs to reach a target, and whether that is a value or only a bound.

    `gap` is the loss less the target at the run that the bound comes from.
    """

    costs: Mapping[str, float]
    bound: Bound = "exact"
    gap: float = 0.0


def reach(points: Sequence[Point], target: float) -> Reach:
    """Costs at which the loss of ever longer runs crosses the target.

    Between the two runs around the crossing the loss is taken as linear in the logarithm of each cost. A longest run
    that does not reach the target gives a lower bound, a shortest one that does gives an upper bound: nothing is
    extrapolated.

    Args:
        points: finished runs of one arm and seed, from short to long, each with a schedule of its own length.
        target: a validation loss, in the unit of the points.
    """
    if not points:
        raise ValueError("no run to read a cost from")
    if points[0].loss <= target:
        exact = points[0].loss == target
        return Reach(points[0].costs, "exact" if exact else "at most", points[0].loss - target)
    for before, after in itertools.pairwise(points):
        if after.loss <= target:
            weight = (before.loss - target) / (before.loss - after.loss)
            costs = {
                axis: math.exp((1 - weight) * math.log(cost) + weight * math.log(after.costs[axis]))
                for axis, cost in before.costs.items()
            }
            return Reach(costs)
    return Reach(points[-1].costs, "at least", points[-1].loss - target)


@dataclass(frozen=True)
class Ratio:
    """Cost of one arm as a multiple of another's: geometric mean over the seeds, its interval, and the verdict.

    `bound` says whether the estimate is a value, or what the true one lies beyond (`either`: on one side for some
    seeds, on the other for others); `bounded` is the number of seeds that gave a bound only.
    """

    estimate: float
    low: float
    high: float
    verdict: Verdict
    seeds: int
    bound: Bound = "exact"
    bounded: int = 0

    @property
    def within(self) -> float:
        """The least difference from 1 that the interval excludes, as a share of the reference's cost."""
        return max(1 - self.low, self.high - 1)


OPPOSITE: dict[Bound, Bound] = {"exact": "exact", "at least": "at most", "at most": "at least", "either": "either"}


def decide(low: float, high: float, margin: float) -> Verdict:
    """`saves` if the whole interval lies below 1/(1 + margin), `costs` if it lies above 1 + margin, else `ties`.

    So `ties` says that neither was shown; how equal the two are at least, the interval says (`Ratio.within`).
    An interval without an end, from bounds, that reaches beyond the margin is no tie: it leaves the question `open`.

    Raises:
        ValueError: an end that is no number.
    """
    if math.isnan(low) or math.isnan(high):
        raise ValueError("an interval whose end is no number decides nothing")
    if high < 1 / (1 + margin):
        return "saves"
    if low > 1 + margin:
        return "costs"
    return "open" if low == 0 or math.isinf(high) else "ties"


def ratio(mine: Sequence[Reach], theirs: Sequence[Reach], axis: str, margin: float, confidence: float = 0.95) -> Ratio:
    """Ratio of costs paired by seed: the t-interval of the mean log-ratio.

    Seeds that give bounds are kept at their bound. Where the true value can only be larger, the mean of the kept
    values lies below the true mean, so the interval's lower end still holds and its upper end is infinite; likewise the
    other way round. Where all seeds give the same kind of bound there is nothing to take a spread from: then the bound
    holds if the losses at that cost lie on its side of the target, by their own t-interval.

    Args:
        mine: what the arm needs, by seed.
        theirs: what the reference needs, of the same seeds in the same order.
        axis: cost axis to compare.
        margin: relative difference that does not matter, declared before the runs.
        confidence: of the two-sided interval.
    """
    logs, bounds, gaps = [], [], []
    for my, their in zip(mine, theirs, strict=True):
        logs.append(math.log(my.costs[axis]) - math.log(their.costs[axis]))
        both = {my.bound, OPPOSITE[their.bound]} - {"exact"}
        bounds.append(both)
        gaps.append(my.gap if my.bound != "exact" else -their.gap)
    kinds: set[Bound] = set().union(*bounds)
    bounded = sum(map(bool, bounds))
    mean, low, high = t_interval(logs, confidence)
    if len(kinds) == 1 and bounded == len(logs) > 1:
        _, worst, best = t_interval(gaps, confidence)
        low = min(logs) if worst > 0 else -math.inf
        high = max(logs) if best < 0 else math.inf
    if "at least" in kinds:
        high = math.inf
    if "at most" in kinds:
        low = -math.inf
    bound: Bound = next(iter(kinds), "exact") if len(kinds) < 2 else "either"
    ends = math.exp(low), math.inf if high > 700 else math.exp(high)
    verdict = decide(*ends, margin) if len(logs) > 1 else "one seed"
    return Ratio(math.exp(mean), *ends, verdict, len(logs), bound, bounded)
