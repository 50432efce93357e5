"""`frugal plan`: what a run will cost, on which hardware; and, after it, what it did cost."""

from __future__ import annotations

from typing import Any

HARDWARE_FILE = "configs/hardware.yaml"


def plan(
    experiment: str,
    hardware: list[str] | None = None,
    devices: list[int] | None = None,
    tokens: str | None = None,
    seq_len: int | None = None,
    precision: str | None = None,
    mfu: float | None = None,
    extra_device_hours: float = 0.0,
    calibrate: list[str] | None = None,
    audit: str | None = None,
    png: str | None = None,
    json: bool = False,
) -> None:
    """Memory, time, dollars and energy of a run on each hardware row, before it; --audit RUN compares after it.

    Args:
        experiment: of configs/experiments/ (a+b lays b upon a), a run's config.yaml, or a shape of configs/model/ with
            --tokens; not needed to audit or to calibrate alone.
        hardware: rows of configs/hardware.yaml; all by default.
        devices: numbers of devices to plan for: 1 8 64. A CPU counts cores: those of this machine.
        tokens: train on so many, 300M or 14.8T, in place of trainer.max_steps.
        seq_len: tokens per sequence.
        precision: as in trainer.precision, in place of the config's.
        mfu: share of the peak that the model's FLOPs achieve on every row, all overheads included.
        extra_device_hours: to add, for other phases.
        calibrate: folders of finished runs, of 50 steps at least, to measure this machine by; remembered for later
            plans in .cache/calibration.json, until that file is deleted.
        audit: folder of a finished run: its plan beside what happened.
        png: write the picture of time and dollars there.
        json: print JSON instead of a table.
    """
    import sys
    from dataclasses import asdict, replace
    from json import dumps
    from pathlib import Path

    from frugal.errors import UserError, require
    from frugal.planning import calibration
    from frugal.planning.audit import audit as audit_run
    from frugal.planning.hardware import choose_hardware, load_hardware
    from frugal.planning.memory import bytes_of
    from frugal.planning.offers import make_offer, marks
    from frugal.planning.run_config import read_run

    require(mfu is None or 0 < mfu <= 1, f"mfu: must lie between 0 and 1, got {mfu}")
    require(all(n > 0 for n in devices or []), "devices: must be positive")
    require(seq_len is None or seq_len > 0, f"seq_len: must be positive, got {seq_len}")
    require(png is None or Path(png).suffix in (".png", ".svg", ".pdf"), f"png: {png} must end in .png, .svg or .pdf")
    require(extra_device_hours >= 0, "extra_device_hours: must not be negative")
    require(bool(experiment or audit or calibrate), "experiment: name an experiment, a shape, or --audit RUN")
    if calibrate:
        calibration.remember(calibration.calibrate(calibrate))
    known = calibration.recall()
    if calibrate and not json:
        _print_calibrations(known, {row.name for row in load_hardware(HARDWARE_FILE) if row.per_core})
    if audit:
        rows = audit_run(audit, known, HARDWARE_FILE)
        if json:
            print(dumps(rows, indent=2))
        else:
            _print_audit(audit, rows, bool(known))
        if any(c.is_by(audit) for c in known):
            print(
                f"audit: {audit} is one of the runs of the calibration: its time, energy and price are no predictions",
                file=sys.stderr if json else sys.stdout,
            )
        return
    if not experiment:
        if json:
            print(dumps([asdict(c) for c in known], indent=2))
        return
    run = read_run(experiment, None if tokens is None else _number(tokens), seq_len)
    if precision is not None:
        run = replace(run, precision=precision)
    bytes_of(run.precision)
    table = load_hardware(HARDWARE_FILE)
    chosen = [choose_hardware(table, "", name, "hardware") for name in hardware] if hardware else table
    offers = [
        make_offer(run, row, n, mfu, known, extra_device_hours)
        for row in chosen
        if row is not None
        for n in ([_cores()] if row.per_core else devices or [1])
    ]
    found = [{**offer.row(), "mark": mark} for offer, mark in zip(offers, marks(offers), strict=True)]
    if png:
        from frugal.tracking.cost_plots import offers_figure

        try:
            offers_figure(found, f"Plan of {experiment}").savefig(png)
        except OSError as error:
            raise UserError(f"png: cannot write {png} ({error.strerror})") from None
    if json:
        print(dumps({"tokens": run.tokens, "flops": run.flops, "offers": found}, indent=2))
        return
    _print_plan(experiment, run, found, bool(known))
    if png:
        print(f"picture: {png}")


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(text: str) -> float:
    """300M, 14.8T, 1e9."""
    from frugal.errors import UserError

    units = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    try:
        number = float(text[:-1]) * units[text[-1].upper()] if text[-1:].upper() in units else float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"tokens: {text!r} is no number of tokens, such as 300M or 14.8T")
    return number


def _plain(value: float) -> str:
    """Four digits at least, without an exponent: 15,123 and 0.04306."""
    from math import floor, log10

    return f"{value:,.{max(3 - floor(log10(value)), 0) if value > 0 else 0}f}"


def _print_plan(config: str, run: Any, rows: list[dict[str, Any]], calibrated: bool) -> None:
    from frugal.planning.offers import TIE
    from frugal.units import duration, gib, short

    print(
        f"{config}: {short(run.tokens)} tokens in {run.steps:,} steps, {short(run.flops, 'FLOP')}, {run.precision}, "
        f"{run.optimizer}, {run.micro_batch} x {run.seq_len} tokens per micro-batch and device"
    )
    ways = {"replicated": "replicated", "sharded": "FSDP", "expert": "FSDP + experts"}
    _print_table(
        [
            "hardware",
            "devices",
            "way",
            "peak memory",
            "fits",
            "sent/step",
            "time",
            "device hours",
            "dollars",
            "energy",
            "",
            "time by",
        ],
        [
            [
                row["hardware"],
                f"{row['devices']:,}",
                ways[row["strategy"]] + (", recompute" if row["checkpointing"] else ""),
                gib(row["peak_bytes"]),
                "yes" if row["fits"] else "no",
                gib(row["sent_bytes_per_step"]) if row["devices"] > 1 and row["sent_bytes_per_step"] else "",
                "?" if row["seconds"] is None else duration(row["seconds"]),
                "?" if row["seconds"] is None else _plain(row["device_hours"]),
                "?" if row["dollars"] is None else f"${_plain(row['dollars'])}",
                "?" if row["joules"] is None else short(row["joules"], "J"),
                row["mark"],
                row["basis"],
            ]
            for row in rows
        ],
    )
    print(
        "recompute: model.activation_checkpointing. Dollars, watts and links: configs/hardware.yaml, with sources; "
        f"weights and gradients travel while devices compute. fastest: the cheapest of all within {TIE - 1:.0%} of the "
        "least time. Pareto: none is both faster and cheaper."
        + ("" if calibrated else " Better figures for this machine: frugal plan --calibrate RUN.")
    )
    if run.left_out:
        print(f"not counted: {', '.join(run.left_out)}")


def _print_calibrations(known: list[Any], per_core: set[str]) -> None:
    from frugal.planning.calibration import FILE

    for c in known:
        unit = "core" if c.hardware in per_core else "device"
        speed = f"{c.flops_per_second / 1e9:,.1f} GFLOP/s per {unit}"
        print(f"{c.hardware}, {c.precision}: {speed} by {', '.join(c.runs)}")
    print(f"kept for later plans in {FILE}; delete it to forget")


def _print_audit(run: str, rows: list[dict[str, Any]], calibrated: bool) -> None:
    from frugal.units import duration, gib, short

    def shown(value: float | None, unit: str) -> str:
        if value is None:
            return "?"
        return {"bytes": gib, "s": duration, "$": lambda v: f"${_plain(v)}"}.get(unit, lambda v: short(v, unit))(value)

    print(f"{run}, planned {'with' if calibrated else 'without'} calibration")
    _print_table(
        ["", "predicted", "actual", "off by"],
        [
            [
                row["quantity"],
                shown(row["predicted"], row["unit"]),
                shown(row["actual"], row["unit"]),
                f"{row['predicted'] / row['actual'] - 1:+.1%}" if row["predicted"] and row["actual"] else "?",
            ]
            for row in rows
        ],
    )


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        best = any(word in row for word in ("cheapest", "fastest", "cheapest, fastest", "Pareto"))
        table.add_row(*row, style="bold" if best else None)
    console = Console()
    Console(width=None if console.is_terminal else 190).print(table)


def with_experiment(arguments: list[str]) -> list[str]:
    """`plan --audit RUN` and `plan --calibrate RUN` need no experiment: an empty one stands in."""
    verb, *words = arguments
    named = words and (words[0] in ("-h", "--help") or not words[0].startswith("--"))
    return arguments if named else [verb, "", *words]
