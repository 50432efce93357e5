"""What a run costs: tokens, FLOPs, seconds, joules and dollars, counted across resumes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from frugal.callbacks.energy import EnergyCounter, open_counters
from frugal.callbacks.ledger import Ledger
from frugal.callbacks.matmul_peak import measure_matmul_peak, synchronize
from frugal.callbacks.peak_memory import PeakMemory
from frugal.data.batches import data_ranks
from frugal.errors import UserError
from frugal.model.config import Frozen
from frugal.planning.hardware import Hardware, choose_hardware, load_hardware
from frugal.tracking.run_folder import RunFolder, keep_steps, read_lines, write_json


def compile_seconds() -> float:
    """What torch.compile has taken in this process so far."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def number_format(trainer: pl.Trainer, pl_module: Any) -> str:
    """`trainer.precision`, and what the model sets beside it: runs of another format measure no speed for this one."""
    if pl_module.tf32:
        return "tf32"
    return f"{trainer.precision}, fp8" if pl_module.fp8 is not None else str(trainer.precision)


class CostMeter(pl.Callback):
    """Count what training spends; log it, and keep it in the checkpoint so that a resumed run adds up right.

    Every second from the program's start belongs to one of `PARTS`; what making the data took in an earlier process is
    charged once on top. What a killed process had spent since its last checkpoint is read back from `meter.json` and
    billed as `lost`; its steps are done again, so their tokens and FLOPs are not counted twice.

    Args:
        hardware: row of the hardware table, or auto to match the device's name.
        hardware_file: the table of watts and prices.
        peak_tflops: ceiling for MFU per device; null measures a matrix product at the start of the run.
        measure_energy: read NVML and RAPL where they are; false estimates all energy from the table's watts.
    """

    def __init__(
        self,
        hardware: str = "auto",
        hardware_file: str = "configs/hardware.yaml",
        peak_tflops: float | None = None,
        measure_energy: bool = True,
    ) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise UserError(f"cost.peak_tflops: must be positive, got {peak_tflops}")
        self.rows, self.hardware_file = load_hardware(hardware_file), hardware_file
        choose_hardware(self.rows, "", hardware)  # an unknown row is refused before any work is done
        self.hardware, self.given_peak = hardware, peak_tflops and peak_tflops * 1e12
        self.measure_energy = measure_energy
        self.measured_peaks: dict[str, float] = {}  # by device, the best so far, across resumes
        self.ledger = Ledger()
        self.row: Hardware | None = None
        self.units = self.nodes = 1
        self.began: float | None = None  # perf_counter() at the program's start, where it is known
        self._memory, self._datamodule = PeakMemory(), None
        self._counters: list[EnergyCounter] = []
        self._phase, self._mark, self._written, self._resumed = "start_up", 0.0, 0.0, False
        self._cpu_mark = self._waiting = 0.0
        self._apart = {"data_wait": 0.0, "compile": 0.0}  # how much of each this process has booked
        self._window = (0, 0.0, 0.0, 0.0)
        self._flops_per_token: dict[tuple[int, Frozen], float] = {}

    # --- the clock

    def _enter(self, phase: str) -> None:
        """Close the current phase and begin another one."""
        self._lap()
        self._phase = phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Book what happens within as this part of the seconds, whatever part it interrupts."""
        before = self._phase
        synchronize(self.device)
        self._enter(phase)
        try:
            yield
        finally:
            synchronize(self.device)
            self._enter(before)

    def _lap(self, watts: float | None = None) -> None:
        """Book the time since the last call; waiting for data and compiling have accounts of their own.

        `watts` is what the machine drew before anything counted, zero where nothing tells.
        """
        now, cpu = time.perf_counter(), time.process_time()
        whole, worked = now - self._mark, cpu - self._cpu_mark
        seconds = whole
        self._mark, self._cpu_mark = now, cpu
        apart = {"compile": compile_seconds()}
        if self._phase == "step":
            apart["data_wait"] = float(getattr(self._datamodule, "waited_seconds", 0.0))
        shares = {}
        for part, total in apart.items():
            shares[part] = share = min(max(total - self._apart[part], 0.0), seconds)
            self._apart[part], seconds = total, seconds - share
            self.ledger.seconds[part] += share
        self.ledger.seconds[self._phase] += seconds
        measured = sum(counter.joules() for counter in self._counters) * self.nodes if self._counters else None
        before = self.ledger.joules
        self._pay(whole, measured if watts is None else None, watts or 0.0)
        if self._phase == "step":
            # How much of it this process and how much the compiler's own took, nothing tells: at most the rest is work.
            self.ledger.train_cpu_seconds += min(worked, whole - shares["compile"]) if shares["compile"] else worked
            spent = self.ledger.joules - before
            # A GPU waits while its kernels are compiled, a CPU compiles; where nothing measures, seconds cost alike.
            waits = measured is not None and not (self.row is not None and self.row.per_core)
            idle = self._waiting if waits else spent / max(whole, 1e-9)
            self.ledger.train_joules += max(spent - idle * shares["compile"], 0.0)

    def _pay(self, seconds: float, measured: float | None = None, watts: float = 0.0) -> None:
        """At this machine's price and, where nothing measures, its watts; earlier parts of a run keep theirs."""
        if measured is not None:
            self.ledger.joules += measured
            self.ledger.joules_measured += measured
        elif watts:
            self.ledger.joules += watts * seconds
        if self.row is not None:
            self.ledger.dollars += self.row.dollars(seconds, self.units)
            if measured is None and not watts:
                self.ledger.joules += self.row.joules(seconds, self.units)

    # --- hooks

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Watch memory from before the model is built."""
        if stage == "fit":
            self._memory.start(trainer.strategy.root_device)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure the ceiling, book the start so far, and go on where an earlier process of the run stopped."""
        self.device, self._datamodule, self.nodes = pl_module.device, trainer.datamodule, trainer.num_nodes
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.device_name = name
        self._mark = time.perf_counter() if self.began is None else self.began
        if self.measure_energy:
            devices = getattr(trainer.strategy, "parallel_devices", None) or [self.device]
            cuda = [device for device in devices if device.type == "cuda"]
            self._counters = open_counters([str(torch.cuda.get_device_properties(d).uuid) for d in cuda])
        self.row = choose_hardware(self.rows, name, self.hardware)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        per_core = self.row is None or self.row.per_core
        self.units = cores * self.nodes if per_core else trainer.world_size  # nodes are taken to be alike
        self._apart["compile"] = compile_seconds()
        self._folder = RunFolder(Path(trainer.default_root_dir))
        if self._resumed and self._folder.meter.is_file():
            self.ledger.add_lost(Ledger.load(json.loads(self._folder.meter.read_text(encoding="utf-8"))))
        # A machine that waits for its program to start draws a fraction of what it draws in training.
        self._waiting = sum(counter.watts() for counter in self._counters) * self.nodes
        self._lap(self._waiting)
        if self.given_peak is None:
            dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(str(trainer.precision).split("-")[0])
            self._keep_peak(name, measure_matmul_peak(self.device, dtype or torch.float32))
            self._memory.forget(self.device)  # of the matrices just multiplied
        self._writes = trainer.is_global_zero and not trainer.fast_dev_run
        trainer.save_checkpoint = self._timed(trainer.save_checkpoint)  # type: ignore[method-assign]

    def _timed(self, save: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            with self.during("checkpoint"):
                save(*args, **kwargs)
            self._write()

        return timed

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Drop the metrics of steps that a resumed run is about to do again; charge what the data took."""
        if trainer.is_global_zero:
            keep_steps(RunFolder(Path(trainer.default_root_dir)).metrics, trainer.global_step - 1)
        self._enter("step")
        if not self.ledger.charged:  # once for a run, however often it is resumed
            charged = float(getattr(trainer.datamodule, "charged_seconds", 0.0))
            here = float(getattr(trainer.datamodule, "preparing_seconds", 0.0))
            self._pay(self.ledger.charge_data(charged, here), watts=self._waiting)  # GPUs wait for it
        self._window = (
            self.ledger.tokens,
            self.ledger.train_seconds,
            self.ledger.flops,
            self.ledger.seconds["data_wait"],
        )
        self._write()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Count the micro-batch; log the speed at the end of each window."""
        rows, length = pl_module.token_shape(batch)
        tokens = rows * length * data_ranks(trainer)[1]
        key = (length, pl_module.frozen)  # what is frozen in this step costs less
        if key not in self._flops_per_token:
            self._flops_per_token[key] = pl_module.flops_per_token(length).training
        self.ledger.tokens += tokens
        self.ledger.flops += tokens * self._flops_per_token[key]
        self.ledger.step = trainer.global_step
        if pl_module.step_complete:
            self.ledger.flops += pl_module.optimizer_flops()
        if pl_module.step_complete and trainer.global_step % trainer.log_every_n_steps == 0:
            synchronize(self.device)
            self._lap()
            self._log_window(trainer, pl_module)
            if time.perf_counter() - self._written > 1.0:
                self._write()

    def add_forward(self, trainer: pl.Trainer, pl_module: Any, batch: Any) -> None:
        """Count a batch's forward pass, the head with it, on every rank; its tokens are not trained on."""
        rows, length = pl_module.token_shape(batch)
        self.ledger.flops += rows * length * data_ranks(trainer)[1] * pl_module.flops_per_token(length).forward

    def _now(self) -> tuple[int, float, float, float]:
        spent = self.ledger
        return spent.tokens, spent.train_seconds, spent.flops, spent.seconds["data_wait"]

    def _log_window(self, trainer: pl.Trainer, pl_module: Any) -> None:
        now = self._now()
        tokens, seconds, flops, waited = (a - b for a, b in zip(now, self._window, strict=True))
        self._window, seconds = now, max(seconds, 1e-9)
        pl_module.log("speed/tokens_per_second", tokens / seconds, prog_bar=True)
        pl_module.log_dict(
            {
                "speed/mfu": self._mfu(flops / seconds, trainer.world_size),
                "speed/goodput": self.ledger.goodput,
                "data/wait_fraction": waited / seconds,
                **self._costs(),
                "cost/seconds/training": self.ledger.train_seconds,
                **{f"cost/seconds/{part}": seconds for part, seconds in self.ledger.seconds.items()},
            }
        )

    def _costs(self) -> dict[str, float]:
        """What has been spent so far, on every axis that is known."""
        spent = {"tokens": float(self.ledger.tokens), "flops": self.ledger.flops, "seconds": self.ledger.total_seconds}
        return {f"cost/{name}": value for name, value in {**spent, **self._bill()}.items() if value is not None}

    def _bill(self) -> dict[str, float | None]:
        """Joules and dollars so far; None for a device that the table does not know and nothing measures."""
        known = self.row is not None
        return {
            "joules": self.ledger.joules if known or self.ledger.joules_measured else None,
            "dollars": self.ledger.dollars if known else None,
        }

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
        """Close the training phase; log what was spent for this loss, in one row with it as W&B's plots need."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            synchronize(self.device)
            self._enter("validation")
            pl_module.log_dict(self._costs(), batch_size=1, reduce_fx="max")  # a mean would ask for all ranks

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the validation phase."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            synchronize(self.device)
            self.ledger.validations += 1
            self._enter("step")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the last phase."""
        synchronize(self.device)
        self._enter("other")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave behind what was spent, for a run that goes on from an earlier checkpoint."""
        if self._mark:
            self._write()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Give the trainer its own method back."""
        trainer.__dict__.pop("save_checkpoint", None)

    # --- across resumes

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint."""
        if self._mark:
            self._lap()
            self.ledger.note_peak(self._memory.bytes(self.device))
        return {**self.ledger.state(), "peaks": dict(self.measured_peaks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint stood."""
        self.ledger, self._resumed = Ledger.load(state_dict), True
        for device, flops in state_dict.get("peaks", {}).items():
            self._keep_peak(device, flops)

    def _write(self) -> None:
        """Keep `meter.json` current: what has been spent, whether or not a checkpoint will tell."""
        state = self.state_dict()
        self._written = time.perf_counter()
        if self._writes:
            write_json(self._folder.meter, state)

    # --- after the run

    def summary(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, Any]:
        """The run's receipt: what `summary.json` and the closing card show."""
        self._lap()
        counts, seconds = pl_module.counts(), self.ledger.seconds
        # Speeds are those of steps and of waiting for their data: compiling is paid once, however long the run.
        at_work = max(seconds["step"] + seconds["data_wait"], 1e-9)
        history = read_lines(RunFolder(Path(trainer.default_root_dir)).metrics)
        validations = [row for row in history if "val/loss" in row]
        best = min(validations, key=lambda row: row["val/loss"], default={})
        phases = {"train": self.ledger.train_seconds, "validation": seconds["validation"], "data": seconds["data"]}
        total = sum(seconds.values())
        return {
            "val_loss": best.get("val/loss"),
            # And whatever else was found there, but for single parts and classes.
            **{key.replace("/", "_"): best[key] for key in best if key.startswith("val/") and key.count("/") == 1},
            "loss_unit": pl_module.unit,
            "tokens_seen": self.ledger.tokens,
            "flops": self.ledger.flops,
            "seconds": total,
            "seconds_by_phase": {**phases, "other": total - sum(phases.values())},
            "seconds_by_part": dict(seconds),
            "train_cpu_seconds": self.ledger.train_cpu_seconds,
            "threads": torch.get_num_threads(),
            "workers": int(getattr(trainer.datamodule, "num_workers", 0)),
            "wall_seconds": self.ledger.wall_seconds,
            "goodput": self.ledger.goodput,
            "lost": dict(self.ledger.lost),
            **self._bill(),
            "joules_measured": self.ledger.joules_measured,
            "train_joules": self.ledger.train_joules,
            "assumption": self._assumption(),
            "params_total": counts.total,
            "params_active": counts.active,
            "params_active_without_input_embedding": counts.active_without_input_embedding,
            "params_applied": counts.applied,
            "tokens_per_second": self.ledger.tokens / at_work,
            "wait_fraction": seconds["data_wait"] / at_work,
            "mfu": self._mfu(self.ledger.flops / at_work, trainer.world_size),
            "peak_tflops_measured": self.peak_flops / 1e12,
            "peak_given": self.given_peak is not None,
            "global_step": trainer.global_step,
            "validations": self.ledger.validations,
            "peak_memory_bytes": self.ledger.peak_bytes,
            "peak_memory_counts": self._memory.what(self.device),
            "hardware": self.row.name if self.row else None,
            "device": self.device_name,
            "devices": trainer.world_size,
            "cores": self.units if self.row and self.row.per_core else None,
            "precision": number_format(trainer, pl_module),
        }

    def _assumption(self) -> str:
        """What the joules and dollars rest on, in words."""
        if self.row is None:
            prices = f"no row for {self.device_name!r} in {self.hardware_file}"
        else:
            prices = self.row.assumption(self.units)
        if not self._counters:
            return prices
        share = self.ledger.joules_measured / max(self.ledger.joules, 1e-9)
        counted = " and ".join(counter.name for counter in self._counters)
        return f"{share:.0%} of the energy measured ({counted}), the start estimated; {prices}"
