"""What a run costs: tokens, FLOPs, seconds, joules and dollars, counted across resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from frugal.data.batches import data_ranks
from frugal.errors import UserError
from frugal.model.config import Frozen
from frugal.model.linear import linear
from frugal.planning.hardware import Hardware, choose_hardware, load_hardware
from frugal.tracking.run_folder import RunFolder, keep_steps, read_lines


def measure_matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.6) -> float:
    """FLOP/s of the best square matrix product that this machine does now: the ceiling of MFU.

    Best of several repeats, because a shared machine is slower than itself at times, and of torch's own product and
    the one that the model uses (`frugal.model.linear`), because on some CPUs the latter is twice as fast.
    """
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    until = time.perf_counter() + seconds
    repeats = 0
    products: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.matmul, linear)
    while repeats < 4 or time.perf_counter() < until:
        product = products[repeats % 2]
        _synchronize(device)
        start = time.perf_counter()
        product(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
        repeats += 1
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class CostMeter(pl.Callback):
    """Count what training spends; log it, and keep it in the checkpoint so that a resumed run adds up right.

    Args:
        hardware: row of the hardware table, or auto to match the device's name.
        hardware_file: the table of watts and prices.
        peak_tflops: ceiling for MFU per device; null measures a matrix product at the start of the run.
    """

    def __init__(
        self,
        hardware: str = "auto",
        hardware_file: str = "configs/hardware.yaml",
        peak_tflops: float | None = None,
    ) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise UserError(f"cost.peak_tflops: must be positive, got {peak_tflops}")
        self.rows, self.hardware_file = load_hardware(hardware_file), hardware_file
        choose_hardware(self.rows, "", hardware)  # an unknown row is refused before any work is done
        self.hardware, self.given_peak = hardware, peak_tflops and peak_tflops * 1e12
        self.measured_peaks: dict[str, float] = {}  # by device, the best so far, across resumes
        self.tokens = 0
        self.flops = 0.0
        self.seconds = {"train": 0.0, "validation": 0.0, "other": 0.0}
        self.cpu_seconds = self._cpu_mark = 0.0  # processor time of this process while training
        self.joules = self.dollars = 0.0
        self.row: Hardware | None = None
        self._mark = 0.0
        self.waited = 0.0  # seconds of the training phase in which the loader had no batch ready
        self._waited_here = 0.0  # how many of them the loader of this process has reported so far
        self._window = (0, 0.0, 0.0, 0.0)
        self._flops_per_token: dict[tuple[int, Frozen], float] = {}

    # --- the clock: every moment of the fit belongs to one of the phases

    def _lap(self, phase: str) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self._spend(phase, now - self._mark)
        self.cpu_seconds += cpu - self._cpu_mark if phase == "train" else 0.0
        self._mark, self._cpu_mark = now, cpu

    def _spend(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += seconds
        if self.row is not None:  # at this machine's price; earlier parts of a resumed run keep theirs
            self.joules += self.row.joules(seconds, self.units)
            self.dollars += self.row.dollars(seconds, self.units)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure the ceiling and start the clock."""
        self.device = pl_module.device
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.device_name = name
        if self.given_peak is None:
            dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).split("-")[0])
            self._keep_peak(name, measure_matmul_peak(self.device, dtype or torch.float32))
        self.row = choose_hardware(self.rows, name, self.hardware)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.units = cores if self.row is None or self.row.per_core else trainer.world_size
        self.assumption = (
            self.row.assumption(self.units) if self.row else f"no row for {name!r} in {self.hardware_file}"
        )
        self._mark, self._cpu_mark = time.perf_counter(), time.process_time()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Drop the metrics of steps that a resumed run is about to do again."""
        if trainer.is_global_zero:
            keep_steps(RunFolder(Path(trainer.default_root_dir)).metrics, trainer.global_step - 1)
        self._lap("other")
        charged = getattr(trainer.datamodule, "charged_seconds", 0.0)
        if charged and "data" not in self.seconds:  # once for a run, however often it is resumed
            self.seconds["data"] = 0.0
            self._spend("data", charged)
        self._window = (self.tokens, self.seconds["train"], self.flops, self.waited)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Count the micro-batch; log the speed at the end of each window."""
        rows, length = pl_module.token_shape(batch)
        tokens = rows * length * data_ranks(trainer)[1]
        key = (length, pl_module.frozen)  # what is frozen in this step costs less
        if key not in self._flops_per_token:
            self._flops_per_token[key] = pl_module.flops_per_token(length).training
        self.tokens += tokens
        self.flops += tokens * self._flops_per_token[key]
        if pl_module.step_complete:
            self.flops += pl_module.optimizer_flops() * trainer.world_size
        if pl_module.step_complete and trainer.global_step % trainer.log_every_n_steps == 0:
            _synchronize(self.device)
            self._lap("train")
            self._note_waiting(trainer)
            waited = self.waited - self._window[3]
            tokens, seconds = self.tokens - self._window[0], self.seconds["train"] - self._window[1]
            flops = self.flops - self._window[2]
            self._window = (self.tokens, self.seconds["train"], self.flops, self.waited)
            speed = tokens / max(seconds, 1e-9)
            pl_module.log("speed/tokens_per_second", speed, prog_bar=True)
            pl_module.log_dict(
                {
                    "speed/mfu": self._mfu(flops / max(seconds, 1e-9), trainer.world_size),
                    "data/wait_fraction": waited / max(seconds, 1e-9),
                    "cost/tokens": float(self.tokens),
                    "cost/flops": self.flops,
                    "cost/seconds": sum(self.seconds.values()),
                    **{f"cost/{name}": value for name, value in self._estimates().items() if value is not None},
                }
            )

    def _note_waiting(self, trainer: pl.Trainer) -> None:
        reported = float(getattr(trainer.datamodule, "waited_seconds", 0.0))
        self.waited += reported - self._waited_here
        self._waited_here = reported

    def _estimates(self) -> dict[str, float | None]:
        """Joules and dollars so far; None for a device that the table does not know."""
        known = self.row is not None
        return {"joules": self.joules if known else None, "dollars": self.dollars if known else None}

    def _keep_peak(self, device: str, flops: float) -> None:
        """A machine that is busy when a run resumes has not become slower: its best measurement counts."""
        self.measured_peaks[device] = max(flops, self.measured_peaks.get(device, 0.0))

    @property
    def peak_flops(self) -> float:
        """FLOP/s of one device that MFU is measured against."""
        return self.given_peak or self.measured_peaks[self.device_name]

    def _mfu(self, flops_per_second: float, devices: int) -> float:
        return flops_per_second / (self.peak_flops * devices)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the training phase."""
        if trainer.state.fn == "fit":
            _synchronize(self.device)
            self._lap("other" if trainer.sanity_checking else "train")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the validation phase."""
        if trainer.state.fn == "fit":
            self._lap("validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the last phase."""
        self._note_waiting(trainer)
        self._lap("train")

    # --- across resumes

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint."""
        if self._mark:
            self._lap("train")
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": dict(self.seconds),
            "cpu_seconds": self.cpu_seconds,
            "waited": self.waited,
            "joules": self.joules,
            "dollars": self.dollars,
            "peaks": dict(self.measured_peaks),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint stood."""
        self.tokens, self.flops = state_dict["tokens"], state_dict["flops"]
        self.seconds = dict(state_dict["seconds"])
        self.cpu_seconds = state_dict.get("cpu_seconds", 0.0)
        self.waited = state_dict.get("waited", 0.0)
        self.joules, self.dollars = state_dict["joules"], state_dict["dollars"]
        for device, flops in state_dict.get("peaks", {}).items():
            self._keep_peak(device, flops)

    # --- after the run

    def summary(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        """The run's receipt: what `summary.json` and the closing card show."""
        counts = pl_module.counts()
        seconds = sum(self.seconds.values())
        train_seconds = max(self.seconds["train"], 1e-9)
        history = read_lines(RunFolder(Path(trainer.default_root_dir)).metrics)
        validations = [row for row in history if "val/loss" in row]
        best = min(validations, key=lambda row: row["val/loss"], default={})
        return {
            "val_loss": best.get("val/loss"),
            # And whatever else was found there, but for single parts and classes.
            **{key.replace("/", "_"): best[key] for key in best if key.startswith("val/") and key.count("/") == 1},
            "loss_unit": pl_module.unit,
            "tokens_seen": self.tokens,
            "flops": self.flops,
            "seconds": seconds,
            "seconds_by_phase": self.seconds,
            "train_cpu_seconds": self.cpu_seconds,
            "threads": torch.get_num_threads(),
            **self._estimates(),
            "assumption": self.assumption,
            "params_total": counts.total,
            "params_active": counts.active,
            "params_active_without_input_embedding": counts.active_without_input_embedding,
            "params_applied": counts.applied,
            "tokens_per_second": self.tokens / train_seconds,
            "wait_fraction": self.waited / train_seconds,
            "mfu": self._mfu(self.flops / train_seconds, trainer.world_size),
            "peak_tflops_measured": self.peak_flops / 1e12,
            "global_step": trainer.global_step,
        }


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write `summary.json` in one move, so that a reader never sees half of it."""
    temporary = folder.summary.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder.summary)
