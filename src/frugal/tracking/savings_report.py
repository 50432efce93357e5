"""The report of a savings study: markdown and a forest plot of the ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugal.tracking.plots import new_figure
from frugal.tracking.savings import Finding, Points, earlier, is_flat, recipe_effects, seed_noise
from frugal.tracking.statistics import Ratio
from frugal.tracking.study import AXES, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds", "joules": "joules", "dollars": "dollars"}
SIGNS = {"exact": "", "at least": "≥ ", "at most": "≤ ", "either": "~ "}
# Okabe & Ito (2008); the marker says the same as the colour.
STYLES = {
    "saves": ("#009E73", "v"),
    "ties": ("#000000", "o"),
    "costs": ("#D55E00", "^"),
    "one seed": ("#999999", "s"),
    "open": ("#999999", "x"),
}


def axis_groups(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """Axes whose ratios are the same in every finding that has them: joules and dollars may follow the seconds."""
    groups: list[tuple[str, ...]] = []
    for axis in AXES:
        if not any(axis in f.ratios for f in findings):
            continue
        for i, group in enumerate(groups):
            if all(_same(f.ratios.get(axis), f.ratios.get(group[0])) for f in findings):
                groups[i] = (*group, axis)
                break
        else:
            groups.append((axis,))
    return groups


def _same(one: Ratio | None, other: Ratio | None) -> bool:
    if one is None or other is None:
        return True
    ends = ((one.estimate, other.estimate), (one.low, other.low), (one.high, other.high))
    close = all(math.isclose(a, b, rel_tol=5e-3) for a, b in ends)
    return close and (one.verdict, one.bound) == (other.verdict, other.bound)


def forest_figure(title: str, findings: Sequence[Finding], reference: str, margin: float) -> Figure:
    """Cost to reach the target as a multiple of the reference's, one panel for each axis that differs."""
    rows = [f for f in findings if f.reference == reference and f.ratios]
    groups = axis_groups(rows)
    figure = new_figure(figsize=(3.0 + 3.1 * len(groups), 1.6 + 0.42 * len(rows)))
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, group in zip(axes, groups, strict=True):
        panel.axvspan(1 / (1 + margin), 1 + margin, color="#DDDDDD", zorder=0)
        panel.axvline(1, color="black", linewidth=0.8, zorder=1)
        found = {y: row.ratios[group[0]] for y, row in enumerate(rows) if group[0] in row.ratios}
        # Estimates set the scale: an interval that tells little may run out of it, with an arrow.
        ends = [
            v for r in found.values() for v in (r.estimate, max(r.low, r.estimate / 1.3), min(r.high, r.estimate * 1.3))
        ]
        ends = [v for v in ends if 0.1 <= v <= 10]
        low, high = min([*ends, 0.8]) / 1.08, max([*ends, 1.25]) * 1.08
        for y, one in found.items():
            _draw(panel, one, y, low, high)
        panel.set(
            xscale="log", xlim=(low, high), xlabel=" = ".join(LABELS[a] for a in group) + f"\n/ those of {reference}"
        )
        fine = (0.8, 0.9, 1.1, 1.25, 1.5) if high < 2 * low else (0.8, 1.25, 1.5) if high < 4 * low else (0.3, 1.4)
        ticks = [t for t in sorted((*fine, 0.1, 0.2, 0.5, 0.7, 1, 2, 3, 4, 6, 10)) if low <= t <= high]
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks], rotation=45 if len(ticks) > 7 else 0)
        panel.set_xticks([], minor=True)
        panel.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row.arm for row in rows])
    for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_color("#777777" if row.arm.endswith("(control)") else "black")
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    from matplotlib.lines import Line2D

    verdicts = {row.ratios[group[0]].verdict for row in rows for group in groups if group[0] in row.ratios}
    used = [verdict for verdict in STYLES if verdict in verdicts]
    handles: list[Any] = [Line2D([], [], color=STYLES[v][0], marker=STYLES[v][1], linewidth=1.5, label=v) for v in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"{title}\ncost to reach the target, left of 1 saves; 95% intervals over seeds, margin grey", fontsize=10
    )
    return figure


def _draw(panel: Any, one: Ratio, y: int, low: float, high: float) -> None:
    colour, marker = STYLES[one.verdict]
    left, right = max(one.low, low), min(one.high, high)
    if one.verdict != "one seed":
        panel.plot((left, right), (y, y), color=colour, linewidth=1.8, solid_capstyle="butt")
        for end, beyond, way in ((left, one.low < low, "<"), (right, one.high > high, ">")):
            if beyond:  # the interval goes on
                panel.plot(end, y, way, color=colour, markersize=6, clip_on=False)
    at = min(max(one.estimate, low), high)
    panel.plot(at, y, marker, color=colour, markersize=7, markerfacecolor="white" if one.bounded else colour)
    from matplotlib.patheffects import withStroke

    panel.annotate(
        f"{SIGNS[one.bound]}{one.estimate:.2f}",
        (at, y),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=colour,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],  # readable upon the line at 1
    )


def cell(one: Ratio | None) -> str:
    """A ratio for a table: estimate, interval, verdict."""
    if one is None:
        return "not known"
    sign = SIGNS[one.bound]
    if one.verdict == "one seed":
        return f"{sign}{one.estimate:.2f} (one seed)"
    within = f" within {max(one.within, 0.01):.0%}" if one.verdict == "ties" else ""
    high = "∞" if math.isinf(one.high) else f"{one.high:.2f}"
    bounded = f", {one.bounded} of {one.seeds} seeds a bound" if one.bounded else ""
    return f"**{one.verdict}**{within} {sign}{one.estimate:.2f} [{one.low:.2f}, {high}]{bounded}"


def loss_cell(loss: tuple[float, float, float] | None, noise: float | None) -> str:
    """A difference of losses with its interval, and how large it is beside the baseline's deviation over the seeds."""
    if loss is None:
        return ""
    interval = f" [{loss[1]:+.4f}, {loss[2]:+.4f}]" if math.isfinite(loss[1]) else " (one seed)"
    return f"{loss[0]:+.4f}{interval}" + (f", {abs(loss[0]) / noise:.1f} deviations" if noise else "")


def markdown(
    name: str,
    study: Study,
    points: Points,
    findings: Sequence[Finding],
    conditions: Sequence[str],
    sweeps: Mapping[str, Mapping[float, float]],
    failures: Mapping[str, str],
) -> str:
    """The report as text."""
    arms = {arm.name: arm for arm in study.all_arms()}
    base = study.base.name
    noise = seed_noise(points, base)
    unit = "bits per byte" if study.metric.endswith("bits_per_byte") else study.metric
    target = "the baseline's final loss of the same seed" if study.target == "baseline" else f"{study.target:g} {unit}"
    lines = [f"# Savings study: {name}", "", study.question, ""]
    lines += [
        f"Target: {target}. Baseline: {study.steps:,} steps. {len(study.seeds)} paired seeds. "
        f"Margin: {study.margin:.1%}.".replace(".0%", "%"),
        f"Lengths an arm could be run at, as shares of {study.steps:,} steps, each with a schedule of its own: "
        + ", ".join(f"{length:g}" for length in study.lengths)
        + ".",
    ]
    if sooner := earlier(study, points):
        said = ", ".join(f"seed {seed}: {share:g}" for seed, share in sooner.items())
        lines.append(f"The baseline has this loss earlier, and that is its cost (shares of its steps: {said}).")
    if is_flat(study, points):
        lines.append(
            "The baseline's loss hardly depends on its length here, less than on the seed: what reaches it, and when, "
            "is chance. Read the losses at full length, not the ratios."
        )
    if noise is not None:
        lines.append(f"Standard deviation of the baseline's loss over the seeds: {noise:.4f} {unit}.")
    lines += ["", *conditions, "", f"![ratios of costs]({name}.png)", ""]
    shown = [axis for axis in AXES if any(axis in f.ratios for f in findings)]
    header = "| arm | " + " | ".join(LABELS[axis] for axis in shown) + " | loss at full length less the reference's |"
    rule = "|" + "---|" * (len(shown) + 2)
    lines += [f"## Cost to reach the target, as a multiple of {base}'s", "", header, rule]
    for found in (f for f in findings if f.reference == base):
        cells = [cell(found.ratios.get(axis)) for axis in shown]
        note = f" ({found.note})" if found.note else ""
        lines.append(f"| {found.arm}{note} | " + " | ".join(cells) + f" | {loss_cell(found.loss, noise)} |")
    lines += ["", *(f"- {arm.name}: {arm.about}" for arm in arms.values() if arm.about)]
    if controlled := [f for f in findings if f.reference != base]:
        lines += ["", "## Against the fair controls", "", header.replace("arm", "arm / its control", 1), rule]
        for found in controlled:
            cells = [cell(found.ratios[axis]) if axis in found.ratios else "by loss" for axis in shown]
            lines.append(
                f"| {found.arm} / {found.reference} | " + " | ".join(cells) + f" | {loss_cell(found.loss, noise)} |"
            )
        lines += ["", "A technique whose control does as well does not owe its saving to its idea."]
    effects, product = recipe_effects(study, findings)
    if any(effect.alone or effect.within for effect in effects):
        lines += ["", "## The recipe's parts: alone, and within the recipe (recipe over recipe without it)", ""]
        lines += ["| part | " + " | ".join(f"{LABELS[a]} alone | within" for a in shown) + " |"]
        lines += ["|" + "---|" * (1 + 2 * len(shown))]
        for effect in effects:
            cells = [f"{part[a]:.2f}" if a in part else "" for a in shown for part in (effect.alone, effect.within)]
            lines.append(f"| {effect.part} | " + " | ".join(cells) + " |")
        recipe = next((f.ratios for f in findings if f.arm == "recipe"), {})
        if product and recipe:
            said = ", ".join(
                f"{LABELS[a]} {product[a]:.2f} against {recipe[a].estimate:.2f}" for a in product if a in recipe
            )
            lines += ["", f"Product of the parts' own ratios against the recipe's: {said}."]
    lines += [
        "",
        "## The runs",
        "",
        f"| arm | seed | share of the steps | {unit} | TFLOPs | seconds |",
        "|" + "---|" * 6,
    ]
    for arm, by_seed in points.items():
        for seed, runs in by_seed.items():
            for length, point in runs:
                tera, seconds = point.costs["flops"] / 1e12, point.costs["seconds"]
                lines.append(f"| {arm} | {seed} | {length:.3g} | {point.loss:.4f} | {tera:.3f} | {seconds:.1f} |")
    for arm, losses in sweeps.items():
        tune = arms[arm].tune
        assert tune
        best = min(losses, key=lambda value: losses[value])
        edge = ", at the grid's end" if best in (tune.grid[0], tune.grid[-1]) else ""
        said = ", ".join(f"{value:g}: {loss:.4f}" for value, loss in losses.items())
        lines += ["", f"Sweep of {tune.key} for {arm} (seed {tune.seed}): {said}. Best: {best:g}{edge}."]
    lines += [f"\nFailed: {run}: {why}" for run, why in failures.items()]
    return "\n".join(lines) + "\n"


TABLE = ["arm", "reference", "axis", "verdict", "ratio", "low", "high", "bound", "seeds"]


def table_rows(findings: Sequence[Finding]) -> list[list[Any]]:
    """The findings as rows of `TABLE`; an open end of an interval is null."""
    return [
        [
            f.arm,
            f.reference,
            axis,
            r.verdict,
            r.estimate,
            r.low,
            None if math.isinf(r.high) else r.high,
            r.bound,
            r.seeds,
        ]
        for f in findings
        for axis, r in f.ratios.items()
    ]


def write_report(
    folder: Path, name: str, study: Study, points: Points, findings: Sequence[Finding], text: str
) -> dict[str, Path]:
    """Write `<name>.md` and, if anything can be compared, `<name>.png`."""
    paths = {"report": folder / f"{name}.md"}
    paths["report"].write_text(text, encoding="utf-8")
    if any(f.ratios for f in findings if f.reference == study.base.name):
        paths["figure"] = folder / f"{name}.png"
        forest_figure(name, findings, study.base.name, study.margin).savefig(paths["figure"])
    return paths
