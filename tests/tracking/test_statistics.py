"""The statistics of a savings study: known cases, scipy as oracle, and what simulated studies say."""

import math
import random

import pytest
import scipy.stats

from frugal.tracking.savings import compare
from frugal.tracking.savings_report import cell
from frugal.tracking.statistics import Point, Ratio, Reach, decide, ratio, reach, t_interval, t_quantile
from frugal.tracking.study import AXES, Arm, Study


def point(loss: float, cost: float) -> Point:
    return Point(loss, dict.fromkeys(AXES, cost))


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 30, 101])
@pytest.mark.parametrize("probability", [0.5, 0.75, 0.95, 0.975, 0.999])
def test_quantiles_of_t_are_those_of_scipy(df: int, probability: float) -> None:
    assert t_quantile(probability, df) == pytest.approx(scipy.stats.t.ppf(probability, df), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("probability", "df"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_a_quantile_that_does_not_exist_is_refused(probability: float, df: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(probability, df)


def test_the_interval_is_that_of_scipy() -> None:
    values = [0.3, -0.1, 0.25, 0.4, 0.05]
    mean, low, high = t_interval(values, 0.9)
    expected = scipy.stats.t.interval(0.9, 4, 0.18, scipy.stats.sem(values))
    assert mean == pytest.approx(0.18) and (low, high) == pytest.approx(expected)
    assert t_interval([0.2]) == (0.2, -math.inf, math.inf)


def test_a_crossing_is_interpolated_over_the_logarithm_of_each_cost() -> None:
    points = [Point(2.0, {"flops": 100.0, "seconds": 10.0}), Point(1.6, {"flops": 400.0, "seconds": 90.0})]
    found = reach(points, 1.8)
    assert found.bound == "exact"
    assert found.costs == pytest.approx({"flops": 200.0, "seconds": 30.0})
    assert reach(points, 1.6).costs == pytest.approx(points[1].costs)  # reached exactly at the end


def test_a_target_outside_the_runs_gives_a_bound_and_no_extrapolation() -> None:
    points = [point(2.0, 100.0), point(1.6, 400.0)]
    above, below = reach(points, 2.5), reach(points, 1.5)
    assert (above.bound, above.costs["flops"], above.gap) == ("at most", 100.0, -0.5)
    assert (below.bound, below.costs["flops"]) == ("at least", 400.0) and below.gap == pytest.approx(0.1)
    assert reach(points, 2.0).bound == "exact"


def test_a_ratio_is_the_paired_interval_of_the_logarithms() -> None:
    mine = [Reach({"flops": cost}) for cost in (80.0, 90.0, 70.0, 85.0)]
    theirs = [Reach({"flops": cost}) for cost in (100.0, 110.0, 95.0, 100.0)]
    found = ratio(mine, theirs, "flops", margin=0.02)
    logs = [math.log(a / b) for a, b in ((80, 100), (90, 110), (70, 95), (85, 100))]
    test = scipy.stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(test.low), math.exp(test.high)))
    assert found.estimate == pytest.approx(math.exp(sum(logs) / 4)) and found.verdict == "saves"


def test_the_margin_decides() -> None:
    assert decide(0.90, 0.95, margin=0.02) == "saves"
    assert decide(0.90, 0.985, margin=0.02) == "ties"
    assert decide(1.03, 1.5, margin=0.02) == "costs" and decide(1.01, 1.5, margin=0.02) == "ties"
    assert decide(1.03, math.inf, margin=0.02) == "costs" and decide(0.85, math.inf, margin=0.02) == "open"
    assert decide(0.0, 0.9, margin=0.02) == "saves" and decide(0.0, 1.2, margin=0.02) == "open"
    with pytest.raises(ValueError, match="no number"):
        decide(math.nan, 1.0, margin=0.02)


def test_a_tie_is_worth_what_its_interval_excludes() -> None:
    close, wide = (Ratio(1.0, low, 1.05, "ties", 3) for low in (0.97, 0.7))
    assert close.within == pytest.approx(0.05) and wide.within == pytest.approx(0.3)
    assert cell(wide) == "**ties** within 30% 1.00 [0.70, 1.05]"


def test_one_seed_has_no_verdict() -> None:
    assert ratio([Reach({"flops": 1.0})], [Reach({"flops": 9.0})], "flops", 0.02).verdict == "one seed"


def test_arms_that_never_reach_the_target_are_bounds() -> None:
    base = [Reach({"flops": 100.0})] * 3
    missed = [Reach({"flops": 140.0}, "at least", gap) for gap in (0.02, 0.025, 0.03)]
    found = ratio(missed, base, "flops", 0.02)
    assert (found.verdict, found.bound, found.bounded) == ("costs", "at least", 3)
    assert found.low == pytest.approx(1.4) and found.high == math.inf
    # The losses at that cost do not lie clearly above the target: no verdict from bounds alone.
    barely = [Reach({"flops": 140.0}, "at least", gap) for gap in (0.0001, 0.03, 0.001)]
    assert ratio(barely, base, "flops", 0.02).verdict == "open"
    early = [Reach({"flops": 25.0}, "at most", gap) for gap in (-0.02, -0.025, -0.03)]
    found = ratio(early, base, "flops", 0.02)
    assert (found.verdict, found.bound, found.low) == ("saves", "at most", 0.0)


def test_one_seed_of_three_that_misses_opens_the_interval_upwards() -> None:
    base = [Reach({"flops": 100.0})] * 3
    mine = [Reach({"flops": 70.0}), Reach({"flops": 72.0}), Reach({"flops": 140.0}, "at least", 0.01)]
    found = ratio(mine, base, "flops", 0.02)
    assert found.high == math.inf and found.verdict == "open" and found.bounded == 1


def test_bounds_in_both_directions_say_nothing() -> None:
    base = [Reach({"flops": 100.0})] * 2
    mine = [Reach({"flops": 140.0}, "at least", 0.1), Reach({"flops": 20.0}, "at most", -0.1)]
    found = ratio(mine, base, "flops", 0.02)
    assert (found.low, found.high, found.verdict, found.bound) == (0.0, math.inf, "open", "either")


# Losses fall by 0.144 bits per byte for each e-fold of the steps and vary by 0.006 over seeds, as the default's do
# between 1,400 and 2,100 steps; a step's seconds vary by 3% from run to run.
SLOPE, NOISE, SECONDS = 0.144, 0.006, 0.03


def simulated_verdicts(seeds: int, saving: float, draw: int) -> dict[str, str]:
    rng = random.Random(draw)
    study = Study("?", 1000, arms=[Arm("technique")], seeds=list(range(seeds)))

    def runs(lengths: list[float], saved: float) -> list[tuple[float, Point]]:
        found = []
        for length in lengths:
            loss = 1.66 - SLOPE * math.log(length / (1 - saved)) + rng.gauss(0, NOISE)
            seconds = 100 * length * math.exp(rng.gauss(0, SECONDS))
            costs = {"tokens": 1e6 * length, "flops": 1e12 * length, "seconds": seconds}
            found.append((length, Point(loss, costs | {"joules": 10 * seconds, "dollars": seconds / 1e5})))
        return found

    points = {
        "base": {seed: runs([0.7, 1.0], 0.0) for seed in study.seeds},
        "technique": {seed: runs([0.5, 0.7, 1.0, 1.4], saving) for seed in study.seeds},
    }
    (finding,) = compare(study, points)
    return {axis: found.verdict for axis, found in finding.ratios.items()}


@pytest.mark.parametrize("seeds", [3, 5])
def test_identical_arms_tie(seeds: int) -> None:
    ties = sum(set(simulated_verdicts(seeds, 0.0, draw).values()) == {"ties"} for draw in range(100))
    assert ties >= 95


def test_a_saving_of_a_fifth_is_seen_with_five_seeds() -> None:
    seen = sum(set(simulated_verdicts(5, 0.2, draw).values()) == {"saves"} for draw in range(100))
    assert seen >= 80


def test_a_cost_of_a_fifth_is_seen_too() -> None:
    assert sum(set(simulated_verdicts(5, -0.2, draw).values()) == {"costs"} for draw in range(100)) >= 80
