"""The runs of a study: which are there, which are missing, and in what order they are made."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import yaml

from frugal.errors import UserError
from frugal.tracking.run_folder import read_lines
from frugal.tracking.statistics import Point
from frugal.tracking.study import AXES, Arm, RunSpec, Study, run_spec
from frugal.units import duration

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 75  # exit code of a run that was told to stop
Start = Callable[[list[str], Path], int]  # command of train.py, log file -> exit status
_running: dict[subprocess.Popen[bytes], bool] = {}  # and whether a launcher stands before it
_told: list[int] = []  # the signal that has told all runs to stop


def start_process(
    command: list[str],
    log_file: Path,
    threads: int | None = None,
    devices: SimpleQueue[str] | None = None,
    launcher: Sequence[str] = (),
) -> int:
    """Run one command to its end; its output goes to the log file.

    Args:
        threads: of this machine that the run may use; null leaves it to the launcher.
        devices: values of CUDA_VISIBLE_DEVICES that no run uses now; one is taken for the time.
        launcher: words before the command: a program that waits for a place, runs it there and passes signals on.
    """
    environment = {**({} if threads is None else {"OMP_NUM_THREADS": str(threads)}), **os.environ}
    command = [*launcher, *command]
    device = devices.get() if devices else None
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    try:
        with log_file.open("a", encoding="utf-8") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        _running[process] = bool(launcher)
        try:
            if _told:  # between the check of the study and now
                _tell(process, _told[0])
            return process.wait()
        finally:
            _running.pop(process, None)
    finally:
        if devices and device is not None:
            devices.put(device)


def _tell(process: subprocess.Popen[bytes], number: int) -> None:
    """Pass a signal on. Slurm's srun makes SIGKILL of SIGTERM, but hands SIGUSR1 to the run, which stops by it too."""
    process.send_signal(signal.SIGUSR1 if _running.get(process) else number)


@dataclass(frozen=True)
class Result:
    """A finished run: its share of the study's steps and its `summary.json`."""

    spec: RunSpec
    length: float
    summary: dict[str, Any]

    @property
    def point(self) -> Point:
        """Loss and the five costs."""
        return Point(self.summary["loss"], costs_of(self.summary))


def costs_of(summary: dict[str, Any]) -> dict[str, float]:
    """What a run spent on training and data, by axis; start-up, validation and checkpoints are the same in every arm.

    On a CPU the training seconds are processor seconds by thread: what a machine takes that does nothing else. A
    summary without them has those of the clock.
    """
    phases = summary["seconds_by_phase"]
    clock, data = phases["train"], phases.get("data", 0.0)
    train = summary["train_cpu_seconds"] / summary["threads"] if is_cpu(summary) else clock
    seconds = train + data
    joules = dollars = float("nan")  # no row for the device: no estimate, which the report leaves out
    if summary.get("dollars"):
        dollars = summary["dollars"] * seconds / summary["seconds"]
    if whole := summary.get("joules"):
        # A device that trains draws more than one that waits; older summaries do not tell the two apart.
        own = summary.get("train_joules") or whole * clock / summary["seconds"]
        joules = own * train / clock + (whole - own) * data / max(summary["seconds"] - clock, 1e-9)
    return dict(zip(AXES, (summary["tokens_seen"], summary["flops"], seconds, joules, dollars), strict=True))


def is_cpu(summary: dict[str, Any]) -> bool:
    """Whether training ran on a CPU and its processor time was taken."""
    # Where RAPL counts, the assumption begins with that.
    return (
        str(summary.get("device") or summary.get("assumption", "")).startswith("cpu")
        and summary.get("train_cpu_seconds") is not None
    )


class StudyRuns:
    """Makes a study's runs, each once, and goes on where an interrupted one stopped.

    Args:
        name: of the study; W&B group and folder below `out`.
        study: what to run.
        out: folder for the runs and the report.
        wandb: as `run.wandb`.
        start: runs a command of train.py to its end; null starts nothing.
        restarts: how often a run that ends because its place was taken away begins again, from its checkpoint. Zero
            where a run can only have been told to stop by the machine's owner: then the study stops too.
    """

    def __init__(
        self,
        name: str,
        study: Study,
        out: Path,
        wandb: str = "auto",
        start: Start | None = start_process,
        restarts: int = 0,
    ) -> None:
        self.restarts = restarts
        self.name, self.study, self.out, self.wandb, self.start = name, study, out, wandb, start
        self.failures: dict[str, str] = {}
        self.tuned: dict[str, dict[str, float]] = {}  # by arm
        self.sweeps: dict[str, dict[float, float]] = {}
        self.arms = {arm.name: arm for arm in study.all_arms()}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self.done = self.made = self.searched = 0
        self.stopped = False
        _told.clear()
        self._began = time.monotonic()

    # --- one run

    def result(self, arm: Arm, seed: int, length: float, tuned: dict[str, float] | None = None) -> Result | None:
        """The run at a share of the study's steps, made if it is missing; None if it failed."""
        values = self.tuned_for(arm) if tuned is None else tuned
        spec = run_spec(self.study, arm, seed, max(2, round(length * self.study.steps)), values)
        key = spec.name.split("_", 1)[1]  # arms that come to the same config share a run
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            summary = self._summary(key) or self._make(spec, key)
        if summary and summary["loss"] is None:  # made by an earlier call: making it again would not help
            self.failures[spec.name] = f"its metrics have no {self.study.metric}"
            return None
        return Result(spec, length, summary) if summary else None

    def _summary(self, key: str) -> dict[str, Any] | None:
        found = sorted((self.out / "runs").glob(f"*_{key}/*/summary.json"))
        if not found:
            return None
        try:
            summary = json.loads(found[-1].read_text(encoding="utf-8"))
            costs_of(summary)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{found[-1]}: damaged; remove its folder and the run is made again") from None
        rows = [row for row in read_lines(found[-1].with_name("metrics.jsonl")) if self.study.metric in row]
        summary["loss"] = rows[-1][self.study.metric] if rows else None
        if self.study.clock == "wall":
            summary.pop("train_cpu_seconds", None)
        return summary

    def _make(self, spec: RunSpec, key: str) -> dict[str, Any] | None:
        if self.start is None or spec.name in self.failures:
            return None
        if self.stopped:  # another run was told to stop: begin no new one
            raise UserError(f"{spec.name}: not begun; the same command goes on")
        run = {"name": spec.name, "root": str(self.out / "runs"), "group": self.name, "wandb": self.wandb}
        overlay = {**spec.overlay, "run": {**run, "tags": ["study", self.name, spec.arm]}}
        folder = self.out / "overlays"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{spec.name}.yaml"
        file.write_text(yaml.safe_dump(overlay, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "train.py", "fit", "--config", str(file), "--ckpt_path", "last"]
        output, began = file.with_suffix(".log"), time.monotonic()
        status = self.start(command, output)
        for _ in range(self.restarts):
            if status != STOPPED or self.stopped:
                break
            log.info("%s: lost its place, begins again", spec.name)
            status = self.start(command, output)
        if status == STOPPED or (status and self.stopped):  # a run that was still starting has nothing to save
            self.stopped = True
            raise UserError(f"{spec.name}: was told to stop; the same command goes on")
        summary = self._summary(key)
        if status or summary is None or summary["loss"] is None:
            lines = output.read_text(encoding="utf-8").strip().splitlines() if output.is_file() else []
            own = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
            self.failures[spec.name] = own[-1] if own else f"exit status {status}"
            log.warning("%s failed: %s (%s)", spec.name, self.failures[spec.name], output)
            return None
        self.made += 1
        log.info("%s: %s %.4f in %s", spec.name, self.study.metric, summary["loss"], duration(time.monotonic() - began))
        return summary

    def stop(self, number: int, _: object = None) -> None:
        """Begin no further run and pass a signal on to those that run; a handler for `signal.signal`."""
        self.stopped = True
        _told[:] = [number]
        for process in tuple(_running):
            _tell(process, number)

    def interrupt(self, number: int, _: object = None) -> NoReturn:
        """A handler for Ctrl-C, which the runs on this terminal have had too; those behind a launcher are told."""
        self.stopped = True
        for process, launched in tuple(_running.items()):
            if launched:
                _tell(process, number)
        raise KeyboardInterrupt

    # --- sweeps

    def tuned_for(self, arm: Arm) -> dict[str, float]:
        """Values that sweeps chose: the arm's own, else the baseline's."""
        return self.tuned.get(arm.name) or self.tuned.get(self.study.base.name) or {}

    def tune(self, arm: Arm) -> None:
        """Choose the arm's best value; a value whose run fails is out of the race."""
        assert arm.tune
        losses = {}
        for value in arm.tune.grid:
            found = self.result(arm, arm.tune.seed, 1.0, {arm.tune.key: value})
            losses[value] = found.point.loss if found else float("inf")
        best = min(losses, key=lambda value: losses[value])
        if losses[best] == float("inf"):
            raise UserError(
                f"arms: {arm.name}: no run of the sweep over {arm.tune.key} has ended well; see {self.out / 'overlays'}"
            )
        self.sweeps[arm.name], self.tuned[arm.name] = losses, {arm.tune.key: best}

    # --- all of them

    def search(self, arm: Arm, seed: int) -> list[Result]:
        """Runs around the target: from the arm's start to longer or shorter ones until the target lies between two."""
        base = self.study.base
        if arm.equal:
            return self._equal_run(arm, seed)
        first = self.result(base, seed, 1.0)
        if arm is base and self.study.target == "baseline":
            return [first] if first else []
        if first is None:
            return []
        target = first.point.loss if self.study.target == "baseline" else float(self.study.target)
        lengths, at = self.study.lengths, self.study.lengths.index(arm.start)
        found: dict[int, Result] = {}
        while 0 <= at < len(lengths) and at not in found:
            result = self.result(arm, seed, lengths[at])
            if result is None:
                break
            found[at] = result
            at += -1 if result.point.loss <= target else 1
        # Controls of equal length, and the loss at the baseline's own length, are compared at full length.
        full = (
            self.result(arm, seed, 1.0)
            if arm.controls or any(arm.name in a.controls for a in self.arms.values())
            else None
        )
        results = {result.length: result for result in (*found.values(), *([full] if full else []))}
        return [results[length] for length in sorted(results)]

    def _equal_run(self, arm: Arm, seed: int) -> list[Result]:
        assert arm.equal
        other, own = self.result(self.arms[arm.equal.arm], seed, 1.0), self.result(arm, seed, 1.0)
        if other is None or own is None:
            return []
        share = costs_of(other.summary)[arm.equal.axis] / costs_of(own.summary)[arm.equal.axis]
        result = self.result(arm, seed, share)
        return [result] if result else []

    def all(self, jobs: int = 1) -> dict[str, dict[int, list[Result]]]:
        """Every search of the study: results by arm and seed.

        The baseline's come first, then seed by seed, so that arms share their hours.
        """
        swept = [arm for arm in self.arms.values() if arm.tune]
        values = [(arm, tune, value) for arm in swept if (tune := arm.tune) for value in tune.grid]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda v: self.result(v[0], v[1].seed, 1.0, {v[1].key: v[2]}), values))
            list(map(self.tune, swept))
            base = self.study.base
            others = [arm for arm in self.arms.values() if arm is not base]
            searches = [(base, seed) for seed in self.study.seeds]  # first, since all others wait for them
            searches += [(arm, seed) for seed in self.study.seeds for arm in others]

            def one(search: tuple[Arm, int]) -> list[Result]:
                before = self.made
                results = self.search(*search)
                with self._guard:
                    self.done += 1
                    self.searched += self.made > before  # what was there already took no time
                self._say(len(searches))
                return results

            found = list(pool.map(one, searches))
        table: dict[str, dict[int, list[Result]]] = {arm: {} for arm in self.arms}
        for (arm, seed), results in zip(searches, found, strict=True):
            if results:
                table[arm.name][seed] = results
        return table

    def there(self) -> list[str]:
        """Names of the arms that have a run, and the sweep that it needs; for one that starts nothing."""
        for arm in self.arms.values():
            if arm.tune:
                with suppress(UserError):
                    self.tune(arm)
        ready = [arm for arm in self.arms.values() if not arm.tune or arm.name in self.tuned]
        return [arm.name for arm in ready if any(self.search(arm, seed) for seed in self.study.seeds)]

    def _say(self, total: int) -> None:
        if self.start is None:
            return
        spent = time.monotonic() - self._began
        pace = spent / self.searched if self.searched else 0.0
        left = f", about {duration(pace * (total - self.done))} left" if pace else ""
        log.info("%d of %d arms and seeds done%s", self.done, total, left)


def conditions(results: dict[str, dict[int, list[Result]]], jobs: int) -> list[str]:
    """What a reader must know about the measurement of the seconds."""
    summaries = [r.summary for seeds in results.values() for runs in seeds.values() for r in runs]
    if not summaries:
        return ["No run has finished."]
    machines = {(s.get("device"), s.get("hardware"), s.get("cores"), s.get("threads")): s for s in summaries}
    said = [f"Machine: {s.get('assumption')}; {s.get('threads', '?')} thread(s) a run." for s in machines.values()]
    said.append(f"{jobs} run(s) at a time.")
    if len(machines) > 1:
        said.append(f"The runs are of {len(machines)} machines: seconds, joules and dollars compare only within one.")
    if all(map(is_cpu, summaries)):
        wall = sum(s["seconds_by_phase"]["train"] for s in summaries)
        quiet = sum(s["train_cpu_seconds"] / s["threads"] for s in summaries)
        said.append(
            "Seconds are processor seconds of training per thread and those of preparing data: what a "
            f"quiet machine takes. The clock showed {wall / quiet:.2f} times as many training seconds (1 on a quiet "
            "machine). Joules and dollars are estimates from these seconds."
        )
    else:
        said.append(
            "Seconds are those of the clock, of training and of preparing data: on a busy machine they mean little."
        )
    return said
