"""The closing card: what a run reached and what it cost, on one screen."""

from __future__ import annotations

from typing import Any

from frugal.units import duration, gib, short

# What a validation may have found beside its loss, and how it is shown.
SCORES = {
    "bits_per_byte": "{:.4f} bits per byte",
    "accuracy": "{:.2%} right",
    "calibration_error": "calibration error {:.4f}",
}


def scores(split: str, summary: dict[str, Any]) -> list[str]:
    """What was found on `val` or `test`, in words; the loss last."""
    found = [form.format(x) for name, form in SCORES.items() if (x := summary.get(f"{split}_{name}")) is not None]
    return [*found, f"{summary[f'{split}_loss']:.4f} nats per {summary.get('loss_unit', 'token')}"]


def card_rows(summary: dict[str, Any], paths: dict[str, str]) -> list[tuple[str, str]]:
    """The card's lines as (label, text), from `summary.json` and the paths to show."""
    active, inner = summary["params_active"], summary["params_active_without_input_embedding"]
    rows = [
        (
            "parameters",
            f"{short(summary['params_total'])} total, {short(active)} active per token"
            # A tied embedding is the head too, so nothing is without it.
            + (f" ({short(inner)} without the input embedding)" if inner != active else "")
            + (f", {short(applied)} applied" if (applied := summary.get("params_applied", active)) != active else ""),
        ),
        ("trained on", f"{short(summary['tokens_seen'])} tokens in {summary['global_step']:,} steps"),
        (
            "spent",
            f"{short(summary['flops'], 'FLOPs')} · {duration(summary['seconds'])} ({_parts(summary)})",
        ),
        (
            "speed",
            f"{summary['tokens_per_second']:,.0f} tokens/s · MFU {_share(summary['mfu'])} of the "
            f"{summary['peak_tflops_measured'] * 1000:,.0f} GFLOP/s "
            + ("given as cost.peak_tflops" if summary.get("peak_given") else "measured here")
            + (f" · goodput {good:.0%}" if (good := summary.get("goodput")) is not None else "")
            + (f" · {gib(memory)} at most" if (memory := summary.get("peak_memory_bytes")) else ""),
        ),
        (
            "energy" if summary.get("joules_measured") else "estimate",
            f"{_bill(summary['joules'], summary['dollars'])}  [{summary['assumption']}]",
        ),
    ]
    if summary.get("val_loss") is not None:
        rows.append(
            (
                "best validation",
                " · ".join(scores("val", summary)),
            )
        )
    if summary.get("test_loss") is not None:
        rows.append(("test, at the end", " · ".join(scores("test", summary))))
    if summary.get("router"):
        router = summary["router"]
        rows.append(
            (
                "experts",
                f"max violation {router['max_violation']:.2f} · emptiest {router['min_load']:.2f} of the mean load · "
                f"{router['dead_experts']:.0f} dead",
            )
        )
    if summary.get("sample"):
        # A young model may write control characters, which a terminal would obey.
        rows.append(("sample", "".join(c if c.isprintable() or c == "\n" else "·" for c in summary["sample"]).strip()))
    return rows + list(paths.items())


def _bill(joules: float | None, dollars: float | None) -> str:
    """Energy may be counted on a device whose price the table does not know."""
    if joules is None:
        return "energy and dollars unknown"
    price = "dollars unknown" if dollars is None else f"${dollars:.4f}"
    return f"{short(joules, 'J')} ({joules / 3.6e6:.4f} kWh) · {price}"


def _share(value: float) -> str:
    """Two digits, of a GPU that hardly works too."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _parts(summary: dict[str, Any]) -> str:
    """Where the seconds went, the largest part first; what is less than half a percent is left out."""
    parts: dict[str, float] = summary.get("seconds_by_part") or summary["seconds_by_phase"]
    shown = sorted(((s, part) for part, s in parts.items() if s >= 0.005 * summary["seconds"]), reverse=True)
    text = ", ".join(f"{part.replace('_', ' ')} {duration(seconds)}" for seconds, part in shown)
    lost = (summary.get("lost") or {}).get("steps", 0)
    return text + (f"; {lost:,} steps done twice" if lost else "")


def print_card(title: str, summary: dict[str, Any], paths: dict[str, str]) -> None:
    """Print the card to the terminal."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in card_rows(summary, paths):
        table.add_row(label, Text(text))
    console = Console()
    # Paths must stay whole for copying, so a narrow pipe gets a wide card.
    width = None if console.is_terminal else 120
    Console(width=width).print(Panel(table, title=title, border_style="green"))
