"""The runs of a study: which are there, which are missing, and in what order they are made."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml

from frugal.errors import UserError, require
from frugal.provenance import source
from frugal.tracking.processes import RUNNING, STOPPED, TOLD, start_process, tell
from frugal.tracking.run_costs import Result, costs_of
from frugal.tracking.run_folder import read_lines, write_json
from frugal.tracking.study import Arm, RunSpec, Study, run_spec
from frugal.units import duration

log = logging.getLogger(__name__)
BESIDE = "study.json"  # in a run's folder: how many ran at a time
Start = Callable[[list[str], Path], int]  # command of train.py, log file -> exit status


def _shorter_may_do(losses: list[float], target: float) -> bool:
    """Whether a run shorter than all of these may reach the target first.

    It may where the shortest has, and where none has and the loss rises with the length (a text learnt by heart).
    """
    rises = len(losses) > 1 and losses[0] == min(losses) < losses[-1]
    return losses[0] <= target or (min(losses) > target and rises)


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
        self.done = self.made = self.searched = self.of_other_code = 0
        self._met: set[str] = set()  # runs that were asked for
        self.jobs = 1
        self.stopped = False
        TOLD.clear()
        self._began = time.monotonic()

    # --- one run

    def result(self, arm: Arm, seed: int, length: float, trial: dict[str, float] | None = None) -> Result | None:
        """The run at a share of the study's steps, made if it is missing; None if it failed.

        Args:
            trial: values that stand for what the arm's own sweep will choose.
        """
        tuned = self.tuned if trial is None else {**self.tuned, arm.name: trial}
        spec = run_spec(self.study, arm, seed, max(2, round(length * self.study.steps)), tuned)
        key = spec.name.split("_", 1)[1]  # arms that come to the same config share a run
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            summary = self._summary(key)
            if summary is None:
                summary = self._make(spec, key)
            elif key not in self._met and summary.get("source") not in (None, source()):
                self.of_other_code += 1
            self._met.add(key)
        if summary and summary["loss"] is None:  # made by an earlier call: making it again would not help
            self.failures[spec.name] = f"its metrics have no finite {self.study.metric}"
            return None
        return Result(spec, length, summary) if summary else None

    def _summary(self, key: str) -> dict[str, Any] | None:
        found = sorted((self.out / "runs").glob(f"*_{key}/*/summary.json"))
        if not found:
            return None
        try:
            summary = json.loads(found[-1].read_text(encoding="utf-8"))
            if any(cost <= 0 for cost in costs_of(summary).values()):
                raise ValueError("a run that cost nothing")
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            raise UserError(f"{found[-1]}: damaged; remove its folder and the run is made again") from None
        rows = [row for row in read_lines(found[-1].with_name("metrics.jsonl")) if self.study.metric in row]
        loss = rows[-1][self.study.metric] if rows else None
        summary["loss"] = loss if isinstance(loss, float | int) and math.isfinite(loss) else None
        if self.study.clock == "wall":
            summary.pop("train_cpu_seconds", None)
        beside = found[-1].with_name(BESIDE)
        summary["at_a_time"] = (read_lines(beside) or [{}])[0].get("at_a_time")
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
        if status and summary and summary["loss"] is not None and summary.get("global_step") == spec.steps:
            log.warning("%s: ended with exit status %s after its last step; it counts (%s)", spec.name, status, output)
        elif status or summary is None or summary["loss"] is None:
            lines = output.read_text(encoding="utf-8").strip().splitlines() if output.is_file() else []
            own = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
            no_loss = not status and summary is not None
            why = f"its metrics have no finite {self.study.metric}" if no_loss else f"exit status {status}"
            self.failures[spec.name] = own[-1] if own and not no_loss else why
            log.warning("%s failed: %s (%s)", spec.name, self.failures[spec.name], output)
            return None
        for folder in (self.out / "runs").glob(f"*_{key}/*"):
            write_json(folder / BESIDE, {"study": self.name, "at_a_time": self.jobs})
        self.made += 1
        log.info("%s: %s %.4f in %s", spec.name, self.study.metric, summary["loss"], duration(time.monotonic() - began))
        return summary

    def samples(self) -> list[Path]:
        """An overlay, NAME.yaml, of each arm that has no run yet, to be looked at before hours go into the others."""
        guess = {arm.name: {arm.tune.key: arm.tune.grid[0]} for arm in self.arms.values() if arm.tune}
        files = []
        for arm in self.arms.values():
            if any((self.out / "runs").glob(f"{arm.name}_*/*/summary.json")):
                continue
            steps = max(2, round(arm.start * self.study.steps))
            spec = run_spec(self.study, arm, self.study.seeds[0], steps, guess)
            file = self.out / "overlays" / "samples" / f"{arm.name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(spec.overlay, sort_keys=False), encoding="utf-8")
            files.append(file)
        return files

    def stop(self, number: int, _: object = None) -> None:
        """Begin no further run and pass a signal on to those that run; a handler for `signal.signal`."""
        self.stopped = True
        TOLD[:] = [number]
        for process in tuple(RUNNING):
            tell(process, number)

    def interrupt(self, number: int, _: object = None) -> NoReturn:
        """A handler for Ctrl-C, which the runs on this terminal have had too; those behind a launcher are told."""
        self.stopped = True
        for process, launched in tuple(RUNNING.items()):
            if launched:
                tell(process, number)
        raise KeyboardInterrupt

    # --- sweeps

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

    def _rounds_of_sweeps(self) -> list[list[Arm]]:
        """Arms with sweeps, those first whose values others take: the baseline's, then what `tuned_by` names."""
        swept = [arm for arm in self.arms.values() if arm.tune]
        rounds: list[list[Arm]] = []
        named: set[str] = set()
        while left := [arm for arm in swept if arm.name not in named]:
            waits = {arm.name: {self.study.base.name, *arm.tuned_by} - {arm.name} for arm in left}
            waiting = {arm.name for arm in left}
            ready = [arm for arm in left if not waits[arm.name] & waiting]
            require(bool(ready), f"arms: {', '.join(waiting)}: tuned_by goes round in a circle")
            rounds.append(ready)
            named |= {arm.name for arm in ready}
        return rounds

    # --- all of them

    def search(self, arm: Arm, seed: int) -> list[Result]:
        """Runs around the target: from the arm's start to longer or shorter ones until the target lies between two.

        None where one of them failed or was not made yet: a search that is cut off says nothing of what lies beyond.
        The baseline is searched like any other: where it has the loss of its full length earlier, that is what it
        needs.
        """
        base = self.study.base
        if arm.equal:
            return self._equal_run(arm, seed)
        first = self.result(base, seed, 1.0)
        if first is None:
            return []
        target = first.point.loss if self.study.target == "baseline" else float(self.study.target)
        found = self._around(arm, seed, target)
        if not found:
            return []
        # Controls of equal length, and the loss at the baseline's own length, are compared at full length.
        compared = arm is base or arm.controls or any(arm.name in a.controls for a in self.arms.values())
        full = self.result(arm, seed, 1.0) if compared else None
        results = {result.length: result for result in (*found, *([full] if full else []))}
        return [results[length] for length in sorted(results)]

    def _around(self, arm: Arm, seed: int, target: float) -> list[Result]:
        lengths, at = self.study.lengths, self.study.lengths.index(arm.start)
        found: dict[int, Result] = {}
        while 0 <= at < len(lengths) and at not in found:
            result = self.result(arm, seed, lengths[at])
            if result is None:
                return []
            found[at] = result
            at += -1 if result.point.loss <= target else 1
        at = min(found) - 1
        while at >= 0 and _shorter_may_do([found[i].point.loss for i in sorted(found)], target):
            result = self.result(arm, seed, lengths[at])
            if result is None:
                return []
            found[at] = result
            at -= 1
        return list(found.values())

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

        Seed by seed, so that what is compared shares its hours: a machine is not as fast at noon as at night.
        """
        self.jobs = jobs
        with ThreadPoolExecutor(jobs) as pool:
            for swept in self._rounds_of_sweeps():
                values = [(arm, tune, value) for arm in swept if (tune := arm.tune) for value in tune.grid]
                list(pool.map(lambda v: self.result(v[0], v[1].seed, 1.0, {v[1].key: v[2]}), values))
                list(map(self.tune, swept))
            searches = self._order(jobs)

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

    def _order(self, jobs: int) -> list[tuple[Arm, int]]:
        """Searches as they begin: baselines lead by a seed for each run at a time, so that no arm waits for its own."""
        base, seeds = self.study.base, self.study.seeds
        others = [arm for arm in self.arms.values() if arm is not base]
        order = [(base, seed) for seed in seeds[:jobs]]
        for number, seed in enumerate(seeds):
            order += [(arm, seed) for arm in others]
            order += [(base, later) for later in seeds[number + jobs : number + jobs + 1]]
        return order

    def there(self) -> list[str]:
        """Names of the arms that have a run, and the sweep that it needs; for one that starts nothing."""
        for arm in (arm for swept in self._rounds_of_sweeps() for arm in swept):
            with suppress(UserError):
                self.tune(arm)
        able = set(self.tuned)
        ready = [
            arm for arm in self.arms.values() if not ({*arm.tuned_by} | ({arm.name} if arm.tune else set())) - able
        ]
        return [arm.name for arm in ready if any(self.search(arm, seed) for seed in self.study.seeds)]

    def _say(self, total: int) -> None:
        if self.start is None:
            return
        spent = time.monotonic() - self._began
        pace = spent / self.searched if self.searched else 0.0
        left = f", about {duration(pace * (total - self.done))} left" if pace else ""
        log.info("%d of %d arms and seeds done%s", self.done, total, left)
