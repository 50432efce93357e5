"""Pictures of what runs cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from frugal.tracking.plots import BLUE, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, GREEN = "#999999", "#009E73"


def offers_figure(rows: list[dict[str, Any]], title: str) -> Figure:
    """Time against dollars of each way to do a run (rows of `frugal plan --json`); the Pareto set is joined.

    What does not fit into memory is shown only where nothing does.
    """
    figure = new_figure(figsize=(8, 5.5))
    axis = figure.subplots()
    priced = [row for row in rows if row["seconds"] is not None and row["dollars"] is not None]
    rows = [row for row in priced if row["fits"]] or priced
    if left := len(priced) - len(rows):
        title += f"\n({left} more do not fit into memory)"
    best = sorted((row for row in rows if row["mark"]), key=lambda row: row["seconds"])
    longest = max((row["seconds"] for row in rows), default=1.0)
    unit, size = next(
        ((u, s) for u, s in (("days", 86400), ("hours", 3600), ("minutes", 60)) if longest > 3 * s), ("seconds", 1)
    )
    kinds: tuple[tuple[str, dict[str, Any], list[dict[str, Any]]], ...] = (
        ("fits", {"color": BLUE}, [r for r in rows if r["fits"] and not r["mark"] and not _bound(r)]),
        (
            "fits; links unknown: at least so long",
            {"edgecolor": BLUE, "facecolor": "white"},
            [r for r in rows if r["fits"] and not r["mark"] and _bound(r)],
        ),
        ("does not fit into memory", {"color": GREY, "marker": "x"}, [r for r in rows if not r["fits"]]),
    )
    for label, style, some in kinds:
        if some:
            axis.scatter([r["seconds"] / size for r in some], [r["dollars"] for r in some], label=label, **style)
    if best:
        points = [(r["seconds"] / size, r["dollars"]) for r in best]
        axis.plot(*zip(*points, strict=True), "D-", color=ORANGE, linewidth=1.2, markersize=7, label="Pareto set")
    labelled = rows
    if len(rows) > 20:  # the best ones, and of each other hardware its cheapest
        cheapest = {row["hardware"]: row for row in sorted(rows, key=lambda row: (row["fits"], -row["dollars"]))}
        labelled = best + [row for row in cheapest.values() if not any(row is other for other in best)]
    for row in labelled:
        name = row["hardware"] + (f" x {row['devices']:,}" if row["devices"] > 1 else "")
        note = f" ({row['mark']})" if row["mark"] in ("cheapest", "fastest", "cheapest, fastest") else ""
        axis.annotate(
            name + note,
            (row["seconds"] / size, row["dollars"]),
            xytext=(-6, -9) if row["mark"] else (8, _free_height(row, labelled)),
            textcoords="offset points",
            ha="right" if row["mark"] else "left",
            va="center",
            fontsize="small",
            color="black" if row["fits"] else GREY,
        )
    axis.set(xscale="log", yscale="log", xlabel=f"time ({unit})", ylabel="price (dollars)", title=title)
    axis.margins(x=0.25, y=0.12)
    low, high = axis.get_xlim()
    if high < 4 * low:  # little differences should look little
        axis.set_xlim(low / 1.5, high * 1.5)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:,g}")
        scale.set_minor_formatter(lambda x, _: f"{x:,g}" if f"{x:e}"[0] in "25" else "")
    axis.grid(alpha=0.3, which="both")
    if rows:
        axis.legend()
    return figure


def _bound(row: dict[str, Any]) -> bool:
    """Whether the time is only a lower bound."""
    return "links unknown" in row.get("basis", "")


def _free_height(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Points by which a label moves up or down to keep clear of its neighbours' (equal times, similar prices)."""

    def near(other: dict[str, Any]) -> bool:
        return max(row["seconds"], other["seconds"]) < 3 * min(row["seconds"], other["seconds"]) and max(
            row["dollars"], other["dollars"]
        ) < 1.1 * min(row["dollars"], other["dollars"])

    close = sorted((other for other in rows if near(other)), key=lambda other: (other["dollars"], other["hardware"]))
    position = next(i for i, other in enumerate(close) if other is row)
    return 9.0 * (position - (len(close) - 1) / 2)


def parts_figure(parts: dict[str, float], title: str) -> Figure:
    """Where a run's seconds went (`seconds_by_part` of summary.json), the largest part on top."""
    figure = new_figure(figsize=(8, 3))
    axis = figure.subplots()
    shown = sorted((seconds, part) for part, seconds in parts.items() if seconds > 0)
    total = sum(seconds for seconds, _ in shown)
    names = [part.replace("_", " ") for _, part in shown]
    bars = axis.barh(names, [s for s, _ in shown], color=[GREEN if part == "step" else BLUE for _, part in shown])
    axis.bar_label(bars, [f"{s:.1f} s, {s / total:.0%}" for s, _ in shown], padding=3, fontsize="small")
    axis.set(xlabel="seconds", title=title)
    axis.margins(x=0.2)
    return figure
