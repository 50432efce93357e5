"""The account of a curation: JSON, a page to read, a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugal.data.curation.pipeline import BANDS, Curated, measured_groups
from frugal.data.documents import Document


def build_report(documents: Sequence[Document], curated: Curated, terms: dict[str, list[str]]) -> dict[str, Any]:
    """Everything that is known of a curation, as plain values.

    `coverage` says for each source, length band and list of terms how many documents there were and what share of them
    was left out: where that differs much, the filters are not neutral.
    """
    kept = set(curated.kept)
    there: Counter[tuple[str, str]] = Counter()
    lost: Counter[tuple[str, str]] = Counter()
    for i, groups in enumerate(measured_groups(documents, terms)):
        there.update(groups)
        if i not in kept:
            lost.update(groups)
    coverage: dict[str, dict[str, dict[str, float]]] = {"all": {}}
    coverage["all"]["all"] = _share(len(documents), len(documents) - len(kept))
    for (kind, name), count in sorted(
        there.items(), key=lambda item: (item[0][0], BANDS.get(item[0][1], 0), item[0][1])
    ):
        coverage.setdefault(kind, {})[name] = _share(count, lost[kind, name])
    filters = [
        {
            "filter": account.name,
            "documents": account.documents,
            "dropped": account.dropped,
            "changed": account.changed,
            "bytes_in": account.bytes_in,
            "bytes_out": account.bytes_out,
            "seconds": round(account.seconds, 4),
            "mb_per_second": round(account.bytes_in / 1e6 / account.seconds, 2) if account.seconds else None,
            "reasons": dict(account.reasons.most_common()),
            "dropped_by_source": dict(account.dropped_by_source.most_common()),
            "examples": account.examples,
        }
        for account in curated.accounts
    ]
    size = sum(account.bytes_in for account in curated.accounts[:1])
    core_seconds = sum(account.seconds for account in curated.accounts)
    return {
        "documents_in": len(documents),
        "documents_out": len(curated.documents),
        "bytes_in": size,
        "bytes_out": curated.accounts[-1].bytes_out,
        "seconds": round(curated.seconds, 3),
        "core_seconds": round(core_seconds, 3),
        "mb_per_second_and_core": round(size / 1e6 / core_seconds, 2) if core_seconds else None,
        "filters": filters,
        "coverage": coverage,
    }


def _share(count: int, lost: int) -> dict[str, float]:
    return {"documents": count, "dropped": lost, "share": round(lost / count, 4) if count else 0.0}


TABLE = ["filter", "documents", "dropped", "changed", "bytes_in", "bytes_out", "seconds", "mb_per_second"]


def table(report: dict[str, Any]) -> list[list[Any]]:
    """One row per filter, in the columns of TABLE."""
    return [[row[name] for name in TABLE] for row in report["filters"]]


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    unit = report.get("unit", "documents")
    lines = [
        "# Curation",
        "",
        f"{report['documents_in']:,} {unit}, {report['bytes_in'] / 1e6:.2f} MB in; {report['documents_out']:,} "
        f"{unit}, {report['bytes_out'] / 1e6:.2f} MB out; {report['seconds']} s "
        f"({report['mb_per_second_and_core']} MB/s per core).",
        "",
        f"| filter | {unit} | dropped | changed | MB in | MB out | MB/s | reasons |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["filters"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in row["reasons"].items())
        lines.append(
            f"| {row['filter']} | {row['documents']:,} | {row['dropped']:,} | {row['changed']:,} | "
            f"{row['bytes_in'] / 1e6:.2f} | {row['bytes_out'] / 1e6:.2f} | {row['mb_per_second'] or ''} | {reasons} |"
        )
    lines += ["", "## What was left out, by group", "", f"| group | {unit} | dropped | share |", "|---|---|---|---|"]
    for kind, groups in report["coverage"].items():
        for name, row in groups.items():
            lines.append(f"| {kind}: {name} | {row['documents']:,} | {row['dropped']:,} | {row['share']:.1%} |")
    lines += ["", "## Examples", ""]
    for row in report["filters"]:
        for example in row["examples"]:
            text = example["text"].replace("`", "'")
            lines.append(f"- {row['filter']}, {example['reason']} ({example['source']}): `{text}`")
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """What each filter left out, and what share of each group is gone."""
    from matplotlib.figure import Figure

    unit = report.get("unit", "documents")
    groups = [(f"{kind}: {name}", row) for kind, part in report["coverage"].items() for name, row in part.items()]
    groups = groups[:30]  # a picture of hundreds of sources says nothing
    figure = Figure(figsize=(11, 0.3 * max(len(report["filters"]), len(groups)) + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [row["filter"] for row in report["filters"]]
    places = range(len(names))  # a filter may come twice
    # Orange, blue and green that every common colour blindness tells apart (Okabe and Ito 2008).
    for key, shift, color in (("dropped", -0.2, "#D55E00"), ("changed", 0.2, "#0072B2")):
        counts = [row[key] for row in report["filters"]]
        bars = left.barh([place + shift for place in places], counts, 0.4, color=color, label=key)
        left.bar_label(bars, [f"{count:,}" if count else "" for count in counts], padding=2, fontsize=7)
    left.set_yticks(places, names)
    left.set(
        xlabel=unit, xscale="symlog", title=f"{report['documents_out']:,} of {report['documents_in']:,} {unit} are kept"
    )
    left.margins(x=0.15)
    left.invert_yaxis()
    left.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2, frameon=False)
    bars = right.barh(range(len(groups)), [row["share"] for _, row in groups], color="#009E73")
    right.bar_label(bars, [f"{row['dropped']:,} of {row['documents']:,}" for _, row in groups], padding=2, fontsize=7)
    right.set_yticks(range(len(groups)), [name[:40] for name, _ in groups])
    right.set(xlabel=f"share of {unit} left out", xlim=(0, 1.25), xticks=[0, 0.25, 0.5, 0.75, 1])
    right.invert_yaxis()
    figure.savefig(path, dpi=110)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """`curation.json`, `curation.md` and `curation.png`."""
    (folder / "curation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "curation.md").write_text(as_markdown(report), encoding="utf-8")
    draw(report, folder / "curation.png")
