"""What finished runs achieved on this machine, kept for plans in a small file."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frugal.errors import UserError, require
from frugal.model.config import flops_per_token
from frugal.planning.run_config import PlannedRun, read_run

log = logging.getLogger(__name__)
FILE = Path(".cache/calibration.json")
LEAST_STEPS = 50  # of a run that may measure a machine: its first steps are slow, and a handful says little
NEEDED = {"flops", "precision", "cores", "devices", "validations", "global_step", "peak_memory_bytes", "wall_seconds"}


@dataclass(frozen=True)
class Calibration:
    """One machine at one precision.

    Args:
        hardware: row of the hardware table.
        precision: as in `trainer.precision`.
        flops_per_second: of one device (or core), steps and waiting for data together, what is computed anew counted.
        validation_tokens: what one validation costs, in forward passes of so many tokens at that speed.
        overhead_seconds: start, checkpoints and the rest of a whole run.
        runs: where the figures come from.
    """

    hardware: str
    precision: str
    flops_per_second: float
    validation_tokens: float
    overhead_seconds: float
    runs: tuple[str, ...]

    def is_by(self, run: str) -> bool:
        """Whether this run's own figures are among those it was measured by."""
        return Path(run).resolve() in {Path(each).resolve() for each in self.runs}


def read_summary(run: str, key: str = "run") -> dict[str, Any]:
    """The receipt in a run's folder; `key` is the argument that named it.

    Raises:
        UserError: there is none, or it is from before seconds were told apart.
    """
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise UserError(f"{key}: no summary.json in {run}; it is written when a run ends")
    try:
        summary = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{key}: {path}: damaged ({error}); take another run") from None
    if "seconds_by_part" not in summary:
        raise UserError(f"{key}: {path} has no seconds_by_part; train it again to calibrate with it")
    try:
        training_seconds(summary)
        missing = NEEDED - summary.keys()
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{key}: {path}: damaged ({type(error).__name__}: {error}); take another run") from None
    if missing:
        raise UserError(f"{key}: {path}: damaged: it lacks {', '.join(sorted(missing))}; take another run")
    return summary


def training_seconds(summary: dict[str, Any]) -> float:
    """Seconds of steps and of waiting for data.

    On a CPU that others use too, the processor seconds of a run of one thread, where they are fewer: what an idle
    machine takes. Several threads wait for each other, so theirs say little.
    """
    parts = summary["seconds_by_part"]
    seconds = float(parts["step"] + parts["data_wait"])
    busy = summary.get("train_cpu_seconds")
    if summary.get("device") == "cpu" and busy and summary["threads"] == 1:
        seconds = min(seconds, busy)
    return seconds


def _again(run: PlannedRun) -> float:
    """FLOPs that are computed as a multiple of those that count."""
    flops = flops_per_token(run.model, run.seq_len)
    return 1 + run.recompute * flops.forward / flops.training


def calibrate(runs: list[str]) -> list[Calibration]:
    """Measure by finished runs; several of one machine and precision are added up.

    Runs that have not finished, took fewer than LEAST_STEPS steps or had float8 products, which a plan's precision does
    not tell, are left out with one warning.

    Raises:
        UserError: no run is left, or one ran on hardware that the table does not know.
    """
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    left_out = []
    for run in runs:
        require(Path(run).is_dir(), f"calibrate: no folder {run}; name folders of runs")
        if not (Path(run) / "summary.json").is_file():
            left_out.append(f"{run} (no summary.json; it is written when a run ends)")
            continue
        summary = read_summary(run, "calibrate")
        if summary["global_step"] < LEAST_STEPS:
            left_out.append(f"{run} ({summary['global_step']} steps)")
            continue
        if read_run(str(Path(run) / "config.yaml"), key="calibrate").fp8:
            left_out.append(f"{run} (model.fp8)")
            continue
        if not summary.get("hardware"):
            raise UserError(f"calibrate: {run} ran on {summary.get('device')}, which configs/hardware.yaml lacks")
        groups.setdefault((summary["hardware"], summary["precision"]), []).append((run, summary))
    told = f"needed are {LEAST_STEPS} steps of a finished run; left out: {', '.join(left_out)}"
    require(bool(groups), f"calibrate: no run to measure by: {told}")
    if left_out:
        log.warning("calibrate: %s", told)
    found = []
    for (hardware, precision), members in groups.items():
        units = [summary["cores"] or summary["devices"] for _, summary in members]
        seconds = [training_seconds(summary) for _, summary in members]
        plans = [read_run(str(Path(run) / "config.yaml"), key="calibrate") for run, _ in members]
        done = [
            summary["flops"] * _again(plan) / n for (_, summary), plan, n in zip(members, plans, units, strict=True)
        ]
        speed = sum(done) / sum(seconds)
        evaluations, overheads = [], []
        for (_, summary), planned, n, mine in zip(members, plans, units, seconds, strict=True):
            parts = summary["seconds_by_part"]
            forward = flops_per_token(planned.model, planned.seq_len).forward
            # A machine that others slow down slows validation as much as training.
            slowed = mine / max(parts["step"] + parts["data_wait"], 1e-9)
            each = parts["validation"] * slowed / max(summary["validations"], 1)
            evaluations.append(each * speed * n / forward)
            overheads.append(parts["start_up"] + parts["checkpoint"] + parts["compile"] + parts["other"])
        found.append(
            Calibration(
                hardware,
                precision,
                speed,
                sum(evaluations) / len(evaluations),
                sum(overheads) / len(overheads),
                tuple(run for run, _ in members),
            )
        )
    return found


def remember(found: list[Calibration], file: Path = FILE) -> None:
    """Keep them for later plans; a machine's newer figures replace its older ones."""
    known = {(c.hardware, c.precision): c for c in recall(file)} | {(c.hardware, c.precision): c for c in found}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(c) for c in known.values()], indent=2) + "\n", encoding="utf-8")


def recall(file: Path = FILE) -> list[Calibration]:
    """What is remembered; nothing without the file."""
    if not file.is_file():
        return []
    try:
        return [Calibration(**{**row, "runs": tuple(row["runs"])}) for row in json.loads(file.read_text())]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"calibration: {file} cannot be read; delete it and calibrate again") from None
