"""Runs on a Slurm cluster: submitted with submitit, requeued by themselves when they are told to stop.

A job that is preempted, or comes near its time limit, gets a signal (`--signal`, or SIGTERM). The training behind it
saves its state and ends with code 75; then, and only then, is the job requeued, here. Neither Lightning's nor
submitit's own requeueing is used: the handlers of both are replaced.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from frugal.errors import UserError
from frugal.launch.jobs import REFUSED, STOPPED, Job, config_of, load_job
from frugal.launch.state import note
from frugal.planning.calibration import recall
from frugal.planning.hardware import choose_hardware, load_hardware
from frugal.planning.offers import make_offer
from frugal.planning.run_config import read_run

log = logging.getLogger(__name__)
TOLD = (STOPPED, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2)  # the last three: before it had begun to train


@dataclass(frozen=True)
class Cluster:
    """How jobs of a cluster are submitted; one file of `configs/cluster/`.

    Args:
        nodes: machines of one run.
        tasks_per_node: processes on each, one for each GPU; becomes trainer.devices.
        cpus_per_task: CPU cores of each process.
        gpus_per_node: GPUs on each machine.
        mem_gb: memory of each machine, GB.
        hours: time limit, if none is given with the launch; with `hardware`, the most that a plan may ask for.
        hardware: which row of configs/hardware.yaml its GPUs (or cores) are: the time limit is then taken from a plan.
        warning_seconds: how long before the time limit a run is told to save its state.
        at_once: elements of an array that run at the same time.
        setup: lines of shell before the run: modules, environments.
        slurm: further options of sbatch: account, qos, constraint, ...
        by_priority: options of sbatch from a priority on, such as {0: {partition: low}, 10: {partition: high}}.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    mem_gb: float | None = None
    hours: float = 24.0
    hardware: str | None = None
    warning_seconds: int = 120
    at_once: int = 256
    setup: list[str] = field(default_factory=list)
    slurm: dict[str, Any] = field(default_factory=dict)
    by_priority: dict[int, dict[str, Any]] = field(default_factory=dict)

    def parameters(self, priority: int, hours: float | None) -> dict[str, Any]:
        """What submitit's executor is told."""
        least = max((step for step in self.by_priority if step <= priority), default=None)
        options = {**self.slurm, **(self.by_priority[least] if least is not None else {})}
        found: dict[str, Any] = {
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "time": max(1, round(60 * (self.hours if hours is None else hours))),
            "signal_delay_s": self.warning_seconds,
            "array_parallelism": self.at_once,
            "srun_args": ["--kill-on-bad-exit=1"],  # a process that dies ends the others
            "additional_parameters": {"requeue": True, **options},
            "stderr_to_stdout": True,
        }
        if self.setup:
            found["setup"] = self.setup
        if self.gpus_per_node:
            found["gpus_per_node"] = self.gpus_per_node
        if self.mem_gb:
            found["mem"] = f"{round(self.mem_gb * 1024)}MB"
        return found


def load_cluster(path: Path) -> Cluster:
    """Read a cluster's file.

    Raises:
        UserError: it is missing, or has a key or value that does not exist.
    """
    if not path.is_file():
        raise UserError(f"cluster: no file {path}")
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    fields = {f.name: f.type for f in dataclasses.fields(Cluster)}
    for key, value in content.items():
        if key not in fields:
            raise UserError(f"cluster: {path}: there is no key {key}; known are {', '.join(fields)}")
        kind = {"int": int, "str | None": str, "float": (int, float), "list[str]": list}.get(
            str(fields[key]), (dict, int, float)
        )
        if not isinstance(value, kind) or (isinstance(value, int | float) and value < 0):  # type: ignore[arg-type]
            raise UserError(f"cluster: {path}: {key}: expected {fields[key]}, got {value!r}")
    return Cluster(**content)


class TrainingRun:
    """What runs on the cluster, once in each process of a job: the training, and the requeueing if it was stopped."""

    def __init__(self, folder: Path, retries: int) -> None:
        self.folder, self.retries = folder, retries

    def __call__(self) -> int:
        """Train until the run is done, refused, cancelled, requeued, or has crashed too often."""
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        for told in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(told, lambda *_: None)  # they reach the training too, which decides
        job = load_job(self.folder)
        number = f"{os.environ.get('SLURM_ARRAY_JOB_ID', '')}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}".strip("_")
        number = number or os.environ["SLURM_JOB_ID"]
        for attempt in range(self.retries + 1):
            if rank == 0:
                note(job, "running", slurm_id=number, attempt=attempt)
            code = self._train(job, rank)
            if code == 0 or code in TOLD or code == REFUSED:
                break
        if code in TOLD and rank > 0:
            return 0  # the first process decides
        if code in TOLD and not (job.place / "cancelled").is_file() and slurm_states().get(number) == "RUNNING":
            note(job, "waiting", slurm_id=number, code=code)
            subprocess.run(["scontrol", "requeue", number], check=True)
            time.sleep(60)  # until Slurm ends this process
        state = "done" if code == 0 else "cancelled" if code in TOLD else "failed"
        if rank == 0:
            note(job, state, slurm_id=number, code=code)
        if code:
            sys.exit(code if code > 0 else 128 - code)
        return 0

    @staticmethod
    def _train(job: Job, rank: int) -> int:
        output = job.output if rank == 0 else job.output.with_suffix(f".{rank}.log")
        with output.open("ab") as file:
            return subprocess.run(
                job.command,
                cwd=job.where,
                env={**os.environ, **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode


def planned_hours(jobs: Sequence[Job], cluster: Cluster) -> float | None:
    """Time limit of an array by the plans of its jobs: the longest one and half as much again, and ten minutes.

    None where that cannot be said: the cluster's file names no hardware, or a run cannot be planned.
    A run that takes longer is requeued and goes on.

    Raises:
        UserError: there is no such row in configs/hardware.yaml.
    """
    if cluster.hardware is None:
        return None
    row = choose_hardware(load_hardware("configs/hardware.yaml"), "", cluster.hardware, "cluster: hardware")
    assert row is not None
    devices = cluster.nodes * cluster.tasks_per_node * (cluster.cpus_per_task if row.per_core else 1)
    longest = 0.0
    for job in jobs:
        file = job.place / "planned.yaml"
        try:
            file.write_text(yaml.safe_dump(config_of(job)), encoding="utf-8")
            seconds = make_offer(read_run(str(file)), row, devices, calibrations=recall()).seconds
        except Exception as error:  # whatever a config holds: the run itself tells what is wrong with it
            log.warning("no time limit by plan for %s: %s", job.id, error)
            return None
        if seconds is None:
            return None
        longest = max(longest, seconds)
    return min(cluster.hours, 1.5 * longest / 3600 + 1 / 6)


def require_slurm(cluster: Cluster) -> None:
    """Refuse what cannot be submitted, before any folder is made.

    Raises:
        UserError: there is no sbatch or no submitit here, or no such row of hardware.
    """
    if shutil.which("sbatch") is None:
        raise UserError("launch: no sbatch here; run on a machine of the cluster, or use `frugal launch local`")
    if importlib.util.find_spec("submitit") is None:
        raise UserError('launch: Slurm needs submitit: pip install -e ".[slurm]"')
    if cluster.hardware is not None:
        choose_hardware(load_hardware("configs/hardware.yaml"), "", cluster.hardware, "cluster: hardware")


def submit(jobs: Sequence[Job], cluster: Cluster, hours: float | None = None, retries: int = 2) -> list[Job]:
    """Submit jobs of one priority as an array (a single one as such); returns them with Slurm's numbers.

    Raises:
        UserError: there is no Slurm here, or it refuses.
    """
    require_slurm(cluster)
    import submitit

    hours = planned_hours(jobs, cluster) if hours is None else hours
    folder = jobs[0].folder.parent.parent / ".queue/slurm"
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=10**6)
    name = jobs[0].name if len({job.name for job in jobs}) == 1 else "frugal"
    executor.update_parameters(job_name=name, **cluster.parameters(jobs[0].priority, hours))
    placed = []
    for job in jobs:
        sizes = {"devices": cluster.tasks_per_node, "num_nodes": cluster.nodes}
        given = [
            f"--trainer.{key}={value}" for key, value in sizes.items() if cluster.nodes * cluster.tasks_per_node > 1
        ]
        placed.append(dataclasses.replace(job, cluster="slurm", options=(*job.options, *given)))
    for job in placed:
        (job.place / "cancelled").unlink(missing_ok=True)
        job.save()
        note(job, "waiting")
    try:
        with executor.batch():
            submitted = [executor.submit(TrainingRun(job.folder, retries)) for job in placed]
    except Exception as error:  # submitit has a class for each
        for job in placed:
            note(job, "failed")
        told = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"launch: Slurm refuses the job: {told[-1] if told else error}") from None
    numbered = [dataclasses.replace(job, slurm_id=sent.job_id) for job, sent in zip(placed, submitted, strict=True)]
    for job in numbered:
        job.save()
    return numbered


def slurm_states() -> dict[str, str]:
    """State of each of the user's jobs that Slurm still knows, by number: RUNNING, PENDING, ..."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {}
    return dict(line.split("|", 1) for line in lines if "|" in line)


def cancel(job: Job) -> None:
    """Take a job back: a running one saves its state and ends."""
    (job.place / "cancelled").touch()
    if job.slurm_id and slurm_states().get(job.slurm_id) == "PENDING":
        note(job, "cancelled")
    subprocess.run(["scancel", job.slurm_id or ""], check=False)
