"""Receipts: what finished savings studies found, as data, and many of them in one table and one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal.errors import UserError, require
from frugal.tracking.savings import Finding, Points
from frugal.tracking.savings_report import LABELS, SIGNS, axis_groups, cell, forest_figure, loss_cell
from frugal.tracking.statistics import Ratio
from frugal.tracking.study import AXES, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = ("saves", "ties", "one seed", "open", "costs")


@dataclass(frozen=True)
class StudyResult:
    """What a study asked, how it was run, and what it found; all that a reader of its figures must know.

    Args:
        study: its name.
        question: as declared.
        base: name of the baseline's arm.
        arms: what each arm is, by name.
        controls: names of arms that only stand beside others.
        steps: of the baseline.
        seeds: of the pairs.
        margin: relative difference that does not matter.
        metric: the loss that counts.
        target: `baseline` is the baseline's final loss; a number is a value of the metric.
        conditions: machine and measurement of the seconds.
        date: of the report, as YYYY-MM-DD.
        findings: every arm against the baseline and its controls.
        sweeps: by arm, the loss of each value that its sweep tried; the best one was used.
        runs: by arm and seed, every finished run of the search: share of the steps, loss, and the five costs.
    """

    study: str
    question: str
    base: str
    arms: dict[str, str]
    controls: list[str]
    steps: int
    seeds: list[int]
    margin: float
    metric: str
    target: str | float
    conditions: list[str]
    date: str
    findings: list[Finding]
    sweeps: dict[str, dict[str, float]] = field(default_factory=dict)
    runs: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)


def result_of(
    name: str,
    study: Study,
    findings: Sequence[Finding],
    conditions: Sequence[str],
    sweeps: Mapping[str, Mapping[float, float]],
    points: Points,
) -> StudyResult:
    """A finished study as data."""
    arms = study.all_arms()
    named = {control for arm in arms for control in arm.controls}
    controls = [arm.name for arm in arms if arm.name in named and not arm.controls]
    about = {arm.name: arm.about for arm in arms}
    return StudyResult(
        name,
        study.question,
        study.base.name,
        about,
        controls,
        study.steps,
        study.seeds,
        study.margin,
        study.metric,
        study.target,
        list(conditions),
        date.today().isoformat(),
        list(findings),
        {arm: {f"{value:g}": loss for value, loss in losses.items()} for arm, losses in sweeps.items()},
        {
            arm: {
                str(seed): [{"share": share, "loss": point.loss, **point.costs} for share, point in found]
                for seed, found in seeds.items()
            }
            for arm, seeds in points.items()
        },
    )


def write_result(result: StudyResult, path: Path) -> None:
    """Write a result as JSON."""
    path.write_text(json.dumps(as_tree(result), indent=1) + "\n", encoding="utf-8")


def as_tree(result: StudyResult) -> dict[str, Any]:
    """A result as plain data; an open end of an interval is null."""
    tree = {**asdict(result), "findings": [finding.row() for finding in result.findings]}
    return dict(_without_infinities(tree))


def _without_infinities(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_infinities(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_infinities(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def read_results(sources: Iterable[str]) -> list[StudyResult]:
    """Read results that `frugal savings` wrote.

    Args:
        sources: a result's file, or a folder that holds some, itself or in its folders.

    Raises:
        UserError: nothing there, a file that is no result, or two results of one study.
    """
    found: dict[str, tuple[Path, StudyResult]] = {}
    for source in sources:
        path = Path(source)
        files = [path] if path.is_file() else sorted([*path.glob("*.json"), *path.glob("*/*.json")])
        require(bool(files), f"studies: no result of `frugal savings` in {source}")
        for file in files:
            result = _read(file)
            other = found.setdefault(result.study, (file.resolve(), result))[0]
            require(other == file.resolve(), f"studies: {other} and {file} are both of {result.study}; name one")
    return [result for _, result in found.values()]


def _read(file: Path) -> StudyResult:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        for key, kind in KINDS.items():
            _is(tree[key], kind, key)
        for key, kind in (("arms", str), ("conditions", str), ("controls", str), ("seeds", int)):
            for value in tree[key].values() if key == "arms" else tree[key]:
                _is(value, kind, key)
        return StudyResult(**{**tree, "findings": [_finding(row) for row in tree["findings"]]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"studies: {file} is no result of `frugal savings` ({type(error).__name__}: {error}); "
            "write it anew with `frugal savings STUDY --report_only`"
        ) from None


KINDS: dict[str, Any] = {"study": str, "question": str, "base": str, "arms": dict, "controls": list, "steps": int}
KINDS |= {"seeds": list, "margin": int | float, "metric": str, "target": str | int | float, "conditions": list}
KINDS |= {"date": str, "findings": list}


def _is(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}")
    return value


def _finding(row: Mapping[str, Any]) -> Finding:
    ratios = {axis: _ratio(row[axis], axis) for axis in AXES if axis in row}
    if ratios and "flops" not in ratios:
        raise KeyError("flops")
    loss = row["loss_difference"]
    if loss is not None:  # of one seed the interval has no ends
        mean, low, high = loss
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        loss = (_is(mean, int | float, "loss_difference"), low, high)
    arm, reference, note = (_is(row[key], str, key) for key in ("arm", "reference", "note"))
    return Finding(arm, reference, ratios, loss, note)


def _ratio(row: Mapping[str, Any], axis: str) -> Ratio:
    found = Ratio(**{**row, "high": math.inf if row["high"] is None else row["high"]})
    for value in (found.estimate, found.low, found.high):
        _is(value, int | float, axis)
    if found.estimate <= 0 or found.verdict not in ORDER or found.bound not in SIGNS:
        raise ValueError(f"{axis} is {row!r}")
    return found


def techniques(results: Sequence[StudyResult]) -> list[tuple[StudyResult, Finding]]:
    """Every arm against its study's baseline, controls too: what saves FLOPs first, what costs last."""
    rows = [
        (result, finding)
        for result in results
        for finding in result.findings
        if finding.reference == result.base and finding.ratios
    ]

    def place(row: tuple[StudyResult, Finding]) -> tuple[int, float]:
        flops = row[1].ratios["flops"]
        return ORDER.index(flops.verdict), flops.estimate

    return sorted(rows, key=place)


def receipts_table(results: Sequence[StudyResult]) -> str:
    """All techniques as a markdown table: cost to reach the baseline's loss as a multiple of the baseline's."""
    rows = techniques(results)
    groups = axis_groups([finding for _, finding in rows])
    head = ["technique", *(" = ".join(LABELS[axis] for axis in group) for group in groups), "against its control"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result, finding in rows:
        cells = [_cell_of_group(finding, group) for group in groups]
        beside = [f for f in result.findings if f.arm == finding.arm and f.reference != result.base]
        about = result.arms.get(finding.arm, "")
        lines.append(
            f"| {_label(result, finding, '**')}{', ' + about if about else ''} | "
            + " | ".join(cells)
            + f" | {'; '.join(map(_beside, beside))} |"
        )
    failed = [(r, f) for r in results for f in r.findings if f.reference == r.base and not f.ratios]
    lines += ["", *(f"Left out: {_label(result, finding)}" for result, finding in failed)] if failed else []
    lines += ["", "Baselines, by study:", ""]
    for result in results:
        about = result.arms.get(result.base, "")
        target = "" if result.target == "baseline" else f" to {result.target:g}"
        lines.append(
            f"- {result.study}{': ' + about if about else ''}; {result.steps:,} steps, {len(result.seeds)} seeds, "
            f"{result.metric}{target}, {result.date}. {result.question}"
        )
    lines += ["", "How it was measured:", ""]
    said: dict[str, list[str]] = {}
    for result in results:
        said.setdefault(" ".join(result.conditions), []).append(result.study)
    lines += [f"- {', '.join(studies)}: {conditions}" for conditions, studies in said.items()]
    return "\n".join(lines) + "\n"


def _cell_of_group(finding: Finding, group: Sequence[str]) -> str:
    """A ratio that holds for all axes of the group but those that the finding lacks."""
    without = [LABELS[axis] for axis in group[1:] if axis not in finding.ratios]
    beside = f" (no {', '.join(without)})" if without and group[0] in finding.ratios else ""
    return cell(finding.ratios.get(group[0])) + beside


def _label(result: StudyResult, finding: Finding, mark: str = "") -> str:
    said = [*(["control"] if finding.arm in result.controls else []), *([finding.note] if finding.note else [])]
    beside = f" ({', '.join(said)})" if said else ""
    return f"{result.study}: {mark}{finding.arm}{mark}{beside}"


def _beside(finding: Finding) -> str:
    if finding.ratios:
        return f"{finding.reference}: FLOPs {cell(finding.ratios['flops'])}"
    return f"{finding.reference}: loss {loss_cell(finding.loss, None)}"


def receipts_figure(results: Sequence[StudyResult]) -> Figure:
    """All techniques as one forest plot."""
    rows = [
        replace(finding, arm=_label(result, replace(finding, note="")), reference="the baseline")  # notes are long
        for result, finding in techniques(results)
    ]
    return forest_figure("receipts", rows, "the baseline", max(result.margin for result in results))
