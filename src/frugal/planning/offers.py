"""For each piece of hardware: does a run fit, how long does it take, what does it cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from frugal.model.config import TransformerConfig, count_parameters, flops_per_token
from frugal.planning.calibration import Calibration
from frugal.planning.communication import Traffic, bytes_per_step
from frugal.planning.hardware import Hardware
from frugal.planning.memory import Load, Memory, Strategy, bytes_of, expert_ranks, training_memory
from frugal.planning.run_config import PlannedRun

# Assumptions, where neither --mfu nor a calibration says better.
MFU = 0.30  # of published mixtures on H100s: 0.20 to 0.47; a small model stays below
# Seconds that a GPU waits for its kernels to be launched, forward and backward, per layer and micro-batch; and beside
# that in a step for optimizer, clipping, callbacks and loop. Measured on an H200 (LOG, 2026-11-27); the host decides.
LAUNCH = {"dense": 2.2e-3, "mixture": 7e-3, "compiled": 2.6e-3}
STEP = 25e-3
STEP_BYTES = 28  # that an optimizer step reads and writes per parameter: weight, gradient, two moments
OVERHEAD = {True: 15.0, False: 20.0}  # seconds until the first step, on a CPU and on a GPU
COMPILING = 25.0  # seconds, where blocks are compiled
RESERVED = 2**30  # bytes of a GPU that its context and workspaces take
FRAGMENTS = 0.05  # share of a GPU's memory that the allocator cannot use
LINKS_UNKNOWN = "links unknown"  # to several devices: the time is without communication
TIE = 1.02  # times closer than this count as equal
PEAKS = {
    "32-true": "float32", "tf32": "tfloat32", "16-mixed": "float16", "bf16-mixed": "bfloat16", "bf16-true": "bfloat16"
}  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """One way to do a run. Seconds, dollars and joules are None where the row lacks a figure.

    `sent_bytes` is what each device sends to others in a step.
    """

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
    sent_bytes: float = 0.0

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
            "sent_bytes_per_step": self.sent_bytes,
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
    as_configured: bool = False,
) -> Offer:
    """Plan a run on `devices` of one row (cores, if the row counts these).

    The fastest way that fits: replicated, sharded, sharded with experts in their places, each without and with
    activation checkpointing, the first of those that are equal; else the one that comes nearest.

    Args:
        mfu: share of the peak that the model's FLOPs achieve, all overheads included.
        calibrations: what was measured; the one for this row and precision is used unless `mfu` is given.
        extra_hours: device hours to add, for other phases.
        as_configured: recompute and share the state if and only if the run does, in place of what is best.
    """
    replicas = 1 if row.per_core else devices
    # The config's micro-batch, or fewer sequences where so many devices share the step.
    share = max(run.tokens_per_step // (run.seq_len * replicas), 1)
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
    split = expert_ranks(run.model, replicas) > 1
    strategies: list[Strategy] = ["replicated", "sharded", "expert"] if split else ["replicated", "sharded"]
    if replicas == 1:
        strategies = ["replicated"]
    elif as_configured:
        strategies = ["expert" if run.experts_apart and split else "sharded"] if run.sharded else ["replicated"]
    loads = [
        replace(load, strategy=strategy, checkpointing=checkpointing)
        for strategy in strategies
        for checkpointing in ([run.recompute] if as_configured else [False, True])
    ]
    ways = [
        (way, training_memory(run.model, way), *_seconds(run, row, devices, way, mfu, calibrations)) for way in loads
    ]
    room = room_of(row)
    fitting = [each for each in ways if each[1].peak <= room] or [min(ways, key=lambda each: each[1].peak)]
    way, memory, seconds, basis = min(fitting, key=lambda each: each[2] or 0.0)
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
        traffic(run, way).total,
    )


def traffic(run: PlannedRun, load: Load) -> Traffic:
    """What each device sends in a step. Experts in their places: over as many devices as divide their number."""
    weight, operand, _ = bytes_of(load.precision)
    expert = expert_ranks(run.model, load.devices) if load.strategy == "expert" else 1
    return bytes_per_step(
        run.model,
        "ddp" if load.strategy == "replicated" else "fsdp2",
        load.micro_batch * load.seq_len,
        data=load.devices // expert,
        expert=expert,
        accumulate=_rounds(run, load),
        recompute=load.checkpointing,
        muon=run.optimizer == "Muon",
        weight_bytes=weight,
        gradient_bytes=weight if load.strategy == "replicated" else 4,
        activation_bytes=operand,
    )


def _rounds(run: PlannedRun, load: Load) -> int:
    """Micro-batches of a step."""
    return max(run.tokens_per_step // (load.micro_batch * load.seq_len * load.devices), 1)


def _seconds(
    run: PlannedRun, row: Hardware, devices: int, load: Load, mfu: float | None, calibrations: Sequence[Calibration]
) -> tuple[float | None, str]:
    """How long, and on what that rests.

    An MFU that is given is that of all devices, and counts the model's FLOPs alone: idle devices and recomputation are
    in it already.
    """
    measured = next((c for c in calibrations if (c.hardware, c.precision) == (row.name, run.precision)), None)
    flops = flops_per_token(run.model, run.seq_len)
    work = run.flops
    if load.strategy == "replicated":  # each copy orthogonalizes every matrix
        work += (load.devices - 1) * run.steps * run.optimizer_flops
    again = 1 + load.checkpointing * flops.forward / flops.training
    # A sequence is computed on one device: where there are more devices than sequences in a step, some do nothing.
    sequences = max(run.tokens_per_step // run.seq_len, 1)
    idle = mfu is None and not row.per_core and devices > sequences
    devices, note = (sequences, f"; {sequences} sequences a step") if idle else (devices, "")
    if mfu is None and measured is not None:
        speed = measured.flops_per_second * devices
        validation = run.validations * measured.validation_tokens * flops.forward
        steps, basis = _with_communication(run, row, load, work * again / speed, "measured")
        return steps + validation / speed + measured.overhead_seconds, basis + note
    peak = row.peak_tflops.get(PEAKS.get(run.precision, ""))
    if peak is None:
        return None, f"no peak for {run.precision}"
    speed = peak * 1e12 * (MFU if mfu is None else mfu) * devices
    # Validation on as much text as the first calibration saw; unknown without one.
    tokens = calibrations[0].validation_tokens if calibrations else 0.0
    validation = run.validations * tokens * flops.forward / speed
    if mfu is not None:
        return run.flops / speed + validation, f"MFU {mfu:.1%} as given"
    seconds, basis = work / speed * again, f"MFU {MFU:.0%} assumed"
    if not row.per_core:
        floor = run.steps * step_floor(run.model, _rounds(run, load), run.compiled)
        if floor > seconds:
            seconds, basis = floor, "kernel launches, assumed"
        if row.bandwidth_gb_s:
            parts = 1 if load.strategy == "replicated" else devices
            state = STEP_BYTES * count_parameters(run.model).total / parts
            seconds += run.steps * state / (row.bandwidth_gb_s * 1e9)
    seconds, basis = _with_communication(run, row, load, seconds, basis)
    return seconds + validation + OVERHEAD[row.per_core] + COMPILING * run.compiled, basis + note


def step_floor(model: TransformerConfig, micro_batches: int = 1, compiled: bool = False) -> float:
    """Seconds in which the kernels of a GPU's step are launched: no step is shorter, however fast the GPU."""
    layers = model.n_layers + model.n_mtp
    if compiled:
        return STEP + micro_batches * layers * LAUNCH["compiled"]
    dense = min(model.moe.first_k_dense, layers) if model.moe else layers
    return STEP + micro_batches * (dense * LAUNCH["dense"] + (layers - dense) * LAUNCH["mixture"])


def _with_communication(run: PlannedRun, row: Hardware, load: Load, compute: float, basis: str) -> tuple[float, str]:
    """Seconds of all steps, given those of their computation, and on what they rest.

    Weights and gradients travel while a device computes, so the longer one counts; what a layer waits for (tokens to
    experts and back, sums of tensor parallelism, matrices to orthogonalize) comes on top. Links are taken at their
    full speed, which is the least that communication can take.
    """
    sent = traffic(run, load)
    if not sent.total:
        return compute, basis
    speed = row.between(load.devices)
    if speed is None:
        return compute, f"{basis}; {LINKS_UNKNOWN}"
    behind = run.steps * (sent.all_gather + sent.reduce_scatter + (load.strategy == "replicated") * sent.all_reduce)
    waited = run.steps * sent.total - behind
    return max(compute, behind / speed) + waited / speed, "links at full speed" if behind / speed > compute else basis


def marks(offers: Sequence[Offer]) -> list[str]:
    """Of each offer that fits: cheapest, fastest, or Pareto (none is both faster and cheaper); else nothing.

    Where links are not known the time is a lower bound; such an offer is marked only if there is no other kind.
    """
    able = [o for o in offers if o.fits and o.seconds is not None and o.dollars is not None]
    able = [o for o in able if LINKS_UNKNOWN not in o.basis] or able
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
