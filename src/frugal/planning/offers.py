"""For each piece of hardware: does a run fit, how long does it take, what does it cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from frugal.model.config import count_parameters, flops_per_token
from frugal.planning.calibration import Calibration
from frugal.planning.hardware import Hardware
from frugal.planning.memory import Load, Memory, Strategy, training_memory
from frugal.planning.run_config import PlannedRun

# Assumptions, where neither --mfu nor a calibration says better.
MFU = 0.30  # of published mixtures on H100s: 0.20 to 0.47; a small model stays below
LAUNCH = 0.5e-3  # seconds per layer and micro-batch that a GPU's kernels take to be launched, forward and backward
STEP_BYTES = 28  # that an optimizer step reads and writes per parameter: weight, gradient, two moments
OVERHEAD = {True: 15.0, False: 45.0}  # seconds until the first step, on a CPU and on a GPU
RESERVED = 2**30  # bytes of a GPU that its context and workspaces take
FRAGMENTS = 0.05  # share of a GPU's memory that the allocator cannot use
TIE = 1.02  # times closer than this count as equal
PEAKS = {"32-true": "float32", "16-mixed": "float16", "bf16-mixed": "bfloat16", "bf16-true": "bfloat16"}


@dataclass(frozen=True)
class Offer:
    """One way to do a run. Seconds, dollars and joules are None where the row lacks a figure."""

    hardware: str
    devices: int
    strategy: Strategy
    checkpointing: bool
    memory: Memory
    room: float
    seconds: float | None
    dollars: float | None
    joules: float | None
    basis: str

    @property
    def fits(self) -> bool:
        """Whether the peak leaves room."""
        return self.memory.peak <= self.room

    def row(self) -> dict[str, Any]:
        """Plain numbers."""
        hours = None if self.seconds is None else self.seconds * self.devices / 3600
        return {
            "hardware": self.hardware,
            "devices": self.devices,
            "strategy": self.strategy,
            "checkpointing": self.checkpointing,
            "peak_bytes": self.memory.peak,
            "state_bytes": self.memory.state,
            "activation_bytes": self.memory.activations + self.memory.logits,
            "room_bytes": self.room,
            "fits": self.fits,
            "seconds": self.seconds,
            "device_hours": hours,
            "dollars": self.dollars,
            "joules": self.joules,
            "basis": self.basis,
        }


def room_of(row: Hardware) -> float:
    """Bytes that a run may use of one device; of a CPU, the memory of the machine that plans."""
    if row.memory_gib is None:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) * 0.9
    return row.memory_gib * 2**30 * (1 - FRAGMENTS) - RESERVED


def make_offer(
    run: PlannedRun,
    row: Hardware,
    devices: int = 1,
    mfu: float | None = None,
    calibrations: Sequence[Calibration] = (),
    extra_hours: float = 0.0,
) -> Offer:
    """Plan a run on `devices` of one row (cores, if the row counts these).

    The first way that fits: replicated, sharded, sharded with experts in their places, each without and with
    activation checkpointing; else the one that comes nearest.

    Args:
        mfu: share of the peak that the model's FLOPs achieve, all overheads included.
        calibrations: what was measured; the one for this row and precision is used unless `mfu` is given.
        extra_hours: device hours to add, for other phases.
    """
    replicas = 1 if row.per_core else devices
    # The config's micro-batch, or fewer sequences where so many devices share the step.
    share = max(run.tokens_per_step // (run.seq_len * replicas * run.accumulate), 1)
    load = Load(
        micro_batch=min(run.micro_batch, share),
        seq_len=run.seq_len,
        eval_batch=run.eval_batch,
        accumulate=run.accumulate,
        precision=run.precision,
        optimizer=run.optimizer,
        device="cpu" if row.per_core else "cuda",
        compiled=run.compiled,
        devices=replicas,
    )
    strategies: list[Strategy] = ["replicated", "sharded", "expert"] if run.model.moe else ["replicated", "sharded"]
    loads = [
        replace(load, strategy=strategy, checkpointing=checkpointing)
        for strategy in (strategies if replicas > 1 else strategies[:1])
        for checkpointing in (False, True)
    ]
    ways = [(way, training_memory(run.model, way)) for way in loads]
    room = room_of(row)
    way, memory = next(
        ((way, memory) for way, memory in ways if memory.peak <= room), min(ways, key=lambda pair: pair[1].peak)
    )
    seconds, basis = _seconds(run, row, devices, way, mfu, calibrations)
    if seconds is not None:
        seconds += extra_hours * 3600 / devices
    known = seconds is not None
    return Offer(
        row.name,
        devices,
        way.strategy,
        way.checkpointing,
        memory,
        room,
        seconds,
        row.dollars(seconds or 0.0, devices) if known else None,
        row.joules(seconds or 0.0, devices) if known else None,
        basis,
    )


def _seconds(
    run: PlannedRun, row: Hardware, devices: int, load: Load, mfu: float | None, calibrations: Sequence[Calibration]
) -> tuple[float | None, str]:
    """How long, and on what that rests."""
    measured = next((c for c in calibrations if (c.hardware, c.precision) == (row.name, run.precision)), None)
    flops = flops_per_token(run.model, run.seq_len)
    if mfu is None and measured is not None:
        speed = measured.flops_per_second * devices
        validation = run.validations * measured.validation_tokens * flops.forward
        return (run.flops + validation) / speed + measured.overhead_seconds, "measured"
    peak = row.peak_tflops.get(PEAKS.get(run.precision, ""))
    if peak is None:
        return None, f"no peak for {run.precision}"
    speed = peak * 1e12 * (MFU if mfu is None else mfu) * devices
    # Validation on as much text as the first calibration saw; unknown without one.
    tokens = calibrations[0].validation_tokens if calibrations else 0.0
    validation = run.validations * tokens * flops.forward / speed
    if mfu is not None:
        return run.flops / speed + validation, f"MFU {mfu:.1%} as given"
    again = 1 + load.checkpointing * flops.forward / flops.training
    seconds, basis = run.flops / speed * again + validation + OVERHEAD[row.per_core], f"MFU {MFU:.0%} assumed"
    if not row.per_core:
        layers = run.model.n_layers + run.model.n_mtp
        rounds = run.accumulate * max(run.tokens_per_step // (load.micro_batch * run.seq_len * load.devices), 1)
        floor = rounds / run.accumulate * layers * LAUNCH * run.steps
        if floor + OVERHEAD[row.per_core] > seconds:
            seconds, basis = floor + OVERHEAD[row.per_core], "kernel launches, assumed"
        if row.bandwidth_gb_s:
            parts = 1 if load.strategy == "replicated" else devices
            traffic = STEP_BYTES * count_parameters(run.model).total / parts
            seconds += run.steps * traffic / (row.bandwidth_gb_s * 1e9)
    return seconds, basis


def marks(offers: Sequence[Offer]) -> list[str]:
    """Of each offer that fits: cheapest, fastest, or Pareto (none is both faster and cheaper); else nothing."""
    able = [o for o in offers if o.fits and o.seconds is not None and o.dollars is not None]
    if not able:
        return [""] * len(offers)
    cheapest = min(able, key=lambda o: (o.dollars, o.seconds))
    least = min(o.seconds or 0.0 for o in able)
    fastest = min((o for o in able if (o.seconds or 0.0) <= TIE * least), key=lambda o: (o.dollars, o.seconds))

    def beaten(offer: Offer) -> bool:
        mine = (offer.seconds or 0.0, offer.dollars or 0.0)
        others = [(o.seconds or 0.0, o.dollars or 0.0) for o in able if o is not offer]
        # Seconds that differ by less than a plan can tell are no reason to pay more.
        return any(s <= TIE * mine[0] and d <= mine[1] and (s, d) != mine for s, d in others)

    def mark(offer: Offer) -> str:
        if not any(offer is o for o in able):
            return ""
        names = [name for name, best in (("cheapest", cheapest), ("fastest", fastest)) if offer is best]
        return ", ".join(names) or ("" if beaten(offer) else "Pareto")

    return [mark(offer) for offer in offers]
