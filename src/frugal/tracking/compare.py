"""Runs side by side: what differs in their configs, what they reached and spent, how the loss fell with each cost."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from frugal.tracking.plots import OKABE_ITO, new_figure
from frugal.tracking.read_runs import RunData
from frugal.units import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = {"val/bits_per_byte": "bits per byte", "val/loss": "validation loss"}  # the first that the runs have
AXES = {"cost/tokens": "tokens", "cost/flops": "FLOPs", "cost/seconds": "seconds", "cost/dollars": "US dollars"}
# What a run is called and where it lies says nothing about what it does.
INCIDENTAL = (
    "run.name",
    "run.root",
    "run.id",
    "run.group",
    "run.tags",
    "run.wandb",
    "run.project",
    "ckpt_path",
    "trainer.default_root_dir",
    "data.seed",  # train.py takes it from seed_everything
)


def config_differences(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all runs, with each run's value; `-` where a run has no such key.

    A section that only some runs have (an architecture's mixture, say) is one line: `set`, or what stands in its place.
    """
    keys = sorted(set().union(*(run.config for run in runs)))
    sections = [key for key in keys if any(other.startswith(f"{key}.") for other in keys)]

    def value(run: RunData, key: str) -> Any:
        inside = any(other.startswith(f"{key}.") for other in run.config)
        return "set" if inside and key not in run.config else run.config.get(key, "-")

    kept = [key for key in keys if not key.startswith(tuple(f"{section}." for section in sections))]
    table = {key: [value(run, key) for run in runs] for key in kept}
    for section in sections:  # of the runs that have it, what differs among these
        having = [run for run in runs if value(run, section) == "set"]
        inner = sorted(key for key in set().union(*(run.config for run in having)) if key.startswith(f"{section}."))
        for key in inner:
            if len({str(run.config.get(key, "-")) for run in having}) > 1:
                table[key] = [run.config.get(key, "-") for run in runs]
    return {
        key: values
        for key, values in table.items()
        if not key.startswith(INCIDENTAL) and any(value != values[0] for value in values[1:])
    }


def loss_of(runs: Sequence[RunData]) -> str:
    """The metric by which runs are compared: bits per byte, or where none has it (images) the validation loss."""
    return next((key for key in LOSSES if any(key in row for run in runs for row in run.rows)), next(iter(LOSSES)))


def curve(run: RunData, axis: str, loss: str = "val/bits_per_byte") -> list[tuple[float, float]]:
    """(cost, validation loss) along a run; the cost at a validation is that of the row at or next after its step.

    Runs log their costs with each validation and every few steps, older ones only the latter: there a last validation
    after the last such row takes that row's cost.
    """
    costs = [(row["step"], row[axis]) for row in run.rows if axis in row]
    steps = [step for step, _ in costs]
    points = []
    for row in run.rows:
        if costs and math.isfinite(row.get(loss, math.nan)):
            at = min(bisect.bisect_left(steps, row["step"]), len(costs) - 1)
            points.append((costs[at][1], row[loss]))
    return points


def pareto(points: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those of the (cost, loss, name) that no other beats in both cost and loss, from cheap to dear.

    Equal points are all kept.
    """
    front: list[tuple[float, float, str]] = []
    for cost, loss, name in sorted(points):
        if not front or loss < front[-1][1] or (cost, loss) == front[-1][:2]:
            front.append((cost, loss, name))
    return front


def front_of(runs: Sequence[RunData], axis: str) -> list[tuple[float, float, str]]:
    """The Pareto front over every validation of every run."""
    key = loss_of(runs)
    return pareto((cost, loss, run.name) for run in runs for cost, loss in curve(run, axis, key))


def metric_table(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: best loss, costs at the end, speed, and on which axes the run lies on the Pareto front."""
    key = loss_of(runs)
    fronts = {axis: {name for _, _, name in front_of(runs, axis)} for axis in AXES}
    header = [
        "run",
        LOSSES[key],
        "steps",
        "tokens",
        "FLOPs",
        "seconds",
        "joules",
        "dollars",
        "tokens/s",
        "on the front of",
    ]
    rows = []
    for run in runs:
        last: dict[str, Any] = {}
        for row in run.rows:
            last |= row
        losses = [row[key] for row in run.rows if math.isfinite(row.get(key, math.nan))]
        front = [AXES[axis] for axis, names in fronts.items() if run.name in names]
        figures = [
            f"{min(losses):.4f}" if losses else "",
            str(run.summary.get("global_step", last.get("step", ""))),
            *(_figure(run, last, key) for key in ("tokens", "flops", "seconds", "joules", "dollars")),
            f"{value:,.0f}"
            if (value := run.summary.get("tokens_per_second", last.get("speed/tokens_per_second")))
            else "",
            ", ".join(front),
        ]
        rows.append([run.name, *figures])
    return header, rows


def _figure(run: RunData, last: Mapping[str, Any], key: str) -> str:
    value = run.summary.get("tokens_seen" if key == "tokens" else key, last.get(f"cost/{key}"))
    return "" if value is None else short(float(value)) if value >= 1000 else f"{value:.4g}"


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_call(value: Any) -> str:
    """A config's value for a table: classes as calls, as in `NearDuplicates(threshold=0.7)`."""
    if isinstance(value, list):
        return ", ".join(map(as_call, value)) or "none"
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = ", ".join(f"{key}={as_call(v)}" for key, v in (value.get("init_args") or {}).items())
        return str(value["class_path"]).rpartition(".")[2] + (f"({arguments})" if arguments else "")
    return str(value)


def report(runs: Sequence[RunData]) -> str:
    """Config differences and metrics as markdown."""
    differences = config_differences(runs)
    rows = [[f"`{key}`", *map(as_call, values)] for key, values in differences.items()]
    parts = ["## What differs", ""]
    if rows:
        parts.append(as_markdown(["key", *(run.name for run in runs)], rows))
    elif len(runs) == 1:
        parts.append("One run; name another to see how their configs differ.")
    else:
        parts.append("Nothing: the configs are the same." if all(run.config for run in runs) else "Not known.")
    parts += ["", "## What they reached and spent", "", as_markdown(*metric_table(runs))]
    return "\n".join(parts)


def comparison_figure(runs: Sequence[RunData]) -> Figure:
    """Validation loss against tokens, FLOPs, seconds and dollars; the Pareto front over all validations is ringed."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    key = loss_of(runs)
    experiments = [run.name.rpartition("/")[0] or run.name for run in runs]
    groups = list(dict.fromkeys(experiments))
    single = len(runs) <= len(OKABE_ITO)
    figure = new_figure(figsize=(11, 7.5))
    panels = figure.subplots(2, 2, sharey=True).ravel()
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        shown = []
        for number, run in enumerate(runs):
            points = [point for point in curve(run, axis, key) if point[0] > 0 and math.isfinite(point[1])]
            if not points:
                continue
            kind = number if single else groups.index(experiments[number])
            colour = OKABE_ITO[kind % len(OKABE_ITO)]
            marker = "osD^vPX*"[(kind if single else kind // len(OKABE_ITO)) % 8]
            panel.plot(
                *zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.2, label=run.name
            )
            shown.append(run.name)
        front = [(cost, loss) for cost, loss, _ in front_of(runs, axis) if cost > 0]
        if front:
            panel.step(
                *zip(*front, strict=True),
                "--",
                where="post",
                color="#555555",
                marker="o",
                markersize=11,
                markerfacecolor="none",
                linewidth=0.9,
                label="Pareto front",
            )
        else:
            panel.text(0.5, 0.5, "not logged by these runs", ha="center", transform=panel.transAxes)
        panel.set(xlabel=label, xscale="log" if shown else "linear")
        if shown:
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            # A thousandth of a dollar is not to be read as millions.
            panel.xaxis.set_major_formatter("{x:g}" if axis == "cost/dollars" else EngFormatter(sep=""))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="both")
    for panel in panels[::2]:
        panel.set_ylabel("validation loss" + (" (bits per byte)" if key == "val/bits_per_byte" else ""))
    handles, labels = panels[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle("What a loss costs: down and to the left is better")
    return figure
