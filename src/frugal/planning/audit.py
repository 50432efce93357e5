"""After a run: what the plan would have said, beside what happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from frugal.errors import UserError
from frugal.planning.calibration import Calibration, read_summary, training_seconds
from frugal.planning.hardware import choose_hardware, load_hardware
from frugal.planning.offers import COMPILING, OVERHEAD, make_offer
from frugal.planning.run_config import read_run


def audit(
    run: str, calibrations: list[Calibration], hardware_file: str = "configs/hardware.yaml"
) -> list[dict[str, Any]]:
    """Rows of quantity, unit, predicted, actual; of a run's folder.

    On a CPU, time is compared twice: with the wall clock, and with the processor seconds of training, which do not grow
    when others use the machine.

    Raises:
        UserError: the run has no receipt, or ran on hardware that the table does not know.
    """
    summary = read_summary(run, "audit")
    if not summary.get("hardware"):
        raise UserError(f"audit: {run} ran on {summary.get('device')}, which {hardware_file} lacks")
    planned = read_run(str(Path(run) / "config.yaml"), key="audit", processes=summary["devices"])
    planned = replace(planned, steps=summary["global_step"], validations=summary["validations"])
    row = choose_hardware(load_hardware(hardware_file), "", summary["hardware"])
    assert row is not None
    units = summary["cores"] or summary["devices"]
    offer = make_offer(planned, row, units, calibrations=calibrations, as_configured=True)
    silent = replace(planned, validations=0)
    steps = make_offer(silent, row, units, calibrations=calibrations, as_configured=True).seconds
    again = 0 if planned.sharded else summary["devices"] - 1  # each copy of the weights orthogonalizes every matrix
    flops = planned.flops + again * planned.steps * planned.optimizer_flops
    measured = next((c for c in calibrations if (c.hardware, c.precision) == (row.name, planned.precision)), None)
    if steps is not None:  # of the steps alone
        assumed = OVERHEAD[row.per_core] + COMPILING * planned.compiled
        steps -= measured.overhead_seconds if measured else assumed
    return [
        {"quantity": "FLOPs", "unit": "", "predicted": flops, "actual": summary["flops"]},
        {
            "quantity": f"peak memory, {summary['peak_memory_counts']}",
            "unit": "bytes",
            "predicted": offer.memory.peak,
            "actual": summary["peak_memory_bytes"],
        },
        {"quantity": "training time", "unit": "s", "predicted": steps, "actual": training_seconds(summary)},
        {"quantity": "wall time", "unit": "s", "predicted": offer.seconds, "actual": summary["wall_seconds"]},
        {"quantity": "energy", "unit": "J", "predicted": offer.joules, "actual": summary["joules"]},
        {"quantity": "price", "unit": "$", "predicted": offer.dollars, "actual": summary["dollars"]},
    ]
