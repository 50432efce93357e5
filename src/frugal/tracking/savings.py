"""From the runs of a study to its findings: ratios on five axes, controls, what the parts of a recipe do together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from frugal.tracking.statistics import Point, Ratio, Reach, ratio, reach, t_interval
from frugal.tracking.study import AXES, Arm, Study

Points = Mapping[str, Mapping[int, Sequence[tuple[float, Point]]]]  # by arm and seed: (share of the steps, point)
Sweeps = Mapping[str, Mapping[float, float]]  # by arm and value: loss


@dataclass(frozen=True)
class Finding:
    """An arm against a reference: ratios of costs, and the difference of the study's metric at one length."""

    arm: str
    reference: str
    ratios: dict[str, Ratio]
    loss: tuple[float, float, float] | None
    note: str = ""

    def row(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "arm": self.arm,
            "reference": self.reference,
            **{axis: asdict(found) for axis, found in self.ratios.items()},
            "loss_difference": self.loss,
            "note": self.note,
        }


def needs(points: Sequence[tuple[float, Point]], target: float) -> Reach:
    """What an arm needs to reach the target, from its runs of one seed in order of length."""
    return reach([point for _, point in sorted(points, key=lambda pair: pair[0])], target)


def compare(study: Study, points: Points, sweeps: Sweeps | None = None) -> list[Finding]:
    """Every arm against the baseline, then every technique against its controls.

    Seeds for which a side has no run are left out and counted in the note: those that are left may be the lucky ones,
    so they decide nothing, and the verdict is `open`. It is so, too, where a run of a side's sweep failed: the value
    that it would have had may be the best one. Costs that were measured in unlike ways make no ratio.

    Args:
        study: what was declared.
        points: the finished runs.
        sweeps: by arm, the loss of each value that its sweep tried; infinite for one whose run failed.
    """
    base = study.base.name
    targets = {
        seed: dict(runs)[1.0].loss if study.target == "baseline" else float(study.target)
        for seed, runs in points.get(base, {}).items()
    }
    arms = {arm.name: arm for arm in study.all_arms()}
    pairs = [(name, base) for name, arm in arms.items() if name != base and not arm.equal]
    pairs += [(name, control) for name, arm in arms.items() for control in arm.controls]
    findings = []
    for arm, reference in pairs:
        mine, theirs = points.get(arm, {}), points.get(reference, {})
        seeds = [seed for seed in study.seeds if seed in mine and seed in theirs and seed in targets]
        lost = len(study.seeds) - len(seeds)
        notes = [f"{lost} of {len(study.seeds)} seeds without a result"] if lost else []
        open_, said = _said_of_sweeps([arms[arm], arms[reference], study.base], sweeps or {})
        notes += said
        if not seeds:
            findings.append(Finding(arm, reference, {}, None, "; ".join(notes)))
            continue
        used = [point for side in (mine, theirs) for seed in seeds for _, point in side[seed]]
        if len({point.code for point in used}) > 1:
            notes.append("runs of unlike code")
        ratios: dict[str, Ratio] = {}
        if not arms[reference].equal:
            my = [needs(mine[seed], targets[seed]) for seed in seeds]
            their = [needs(theirs[seed], targets[seed]) for seed in seeds]
            known = [axis for axis in AXES if not any(math.isnan(r.costs[axis]) for r in (*my, *their))]
            unlike = [axis for axis in known if len({point.how.get(axis) for point in used}) > 1]
            if unlike:
                notes.append(f"{' and '.join(unlike)} were measured in unlike ways")
            ratios = {axis: ratio(my, their, axis, study.margin) for axis in known if axis not in unlike}
            if lost or open_:
                ratios = {axis: replace(r, verdict="open" if r.seeds > 1 else r.verdict) for axis, r in ratios.items()}
        findings.append(Finding(arm, reference, ratios, _loss_difference(mine, theirs, seeds), "; ".join(notes)))
    return findings


def _said_of_sweeps(sides: Sequence[Arm], sweeps: Sweeps) -> tuple[bool, list[str]]:
    """Whether a run failed in a sweep that one of the sides rests on; and this, and which best values are no middle."""
    names = dict.fromkeys(name for arm in sides for name in (arm.name, *arm.tuned_by) if name in sweeps)
    failed, said = False, []
    for name in names:
        losses = sweeps[name]
        best, values = min(losses, key=lambda value: losses[value]), list(losses)
        if not all(map(math.isfinite, losses.values())):
            failed = True
            said.append(f"a run of {name}'s sweep failed")
        if best in (values[0], values[-1]):
            said.append(f"{name}'s best value, {best:g}, is its grid's {'first' if best == values[0] else 'last'}")
    return failed, said


def _loss_difference(mine: Any, theirs: Any, seeds: Sequence[int]) -> tuple[float, float, float] | None:
    """Loss of an arm less another's at length 1, or at the control's own length where that is its only run."""
    gaps = []
    for seed in seeds:
        my, their = dict(mine[seed]), dict(theirs[seed])
        if 1.0 not in my or (1.0 not in their and len(their) != 1):
            return None
        gaps.append(my[1.0].loss - (their[1.0] if 1.0 in their else next(iter(their.values()))).loss)
    return t_interval(gaps)


@dataclass(frozen=True)
class PartEffect:
    """What a part of a recipe does alone, and inside the recipe (recipe over the recipe without it)."""

    part: str
    alone: dict[str, float]
    within: dict[str, float]


def recipe_effects(study: Study, findings: Sequence[Finding]) -> tuple[list[PartEffect], dict[str, float]]:
    """Effects of the parts as ratios by axis, and the product of the parts' own ratios: savings need not multiply."""
    found = {f.arm: f.ratios for f in findings if f.reference == study.base.name}
    effects = []
    for part in study.parts:
        alone = {axis: r.estimate for axis, r in found.get(f"only-{part.name}", {}).items()}
        recipe, rest = found.get("recipe", {}), found.get(f"without-{part.name}", {})
        within = {axis: recipe[axis].estimate / rest[axis].estimate for axis in recipe if axis in rest}
        effects.append(PartEffect(part.name, alone, within))
    product = {
        axis: math.prod(effect.alone[axis] for effect in effects)
        for axis in AXES
        if effects and all(axis in effect.alone for effect in effects)
    }
    return effects, product


def earlier(study: Study, points: Points) -> dict[int, float]:
    """Seeds whose baseline has the loss of its full length earlier: the share of the steps in its shortest such run."""
    found = {}
    for seed, runs in points.get(study.base.name, {}).items():
        losses = {share: point.loss for share, point in runs}
        short = [share for share, loss in losses.items() if share < 1 and loss <= losses.get(1.0, -math.inf)]
        if short:
            found[seed] = min(short)
    return found


def is_flat(study: Study, points: Points) -> bool:
    """Whether the baseline's loss changes less from its full length to the next one than from seed to seed.

    Then what reaches it, and at which length, is chance: the costs depend on where a search begins.
    """
    changes = []
    for runs in points.get(study.base.name, {}).values():
        losses = dict(runs)
        others = sorted((abs(math.log(share)), share) for share in losses if share != 1.0)
        if 1.0 in losses and others:
            changes.append(losses[others[0][1]].loss - losses[1.0].loss)
    noise = seed_noise(points, study.base.name)
    return bool(changes) and noise is not None and abs(statistics.fmean(changes)) < noise


def seed_noise(points: Points, arm: str) -> float | None:
    """Standard deviation of an arm's loss at length 1 over the seeds."""
    losses = [dict(runs)[1.0].loss for runs in points.get(arm, {}).values() if 1.0 in dict(runs)]
    return statistics.stdev(losses) if len(losses) > 1 else None
