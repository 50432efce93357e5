"""`frugal launch`: runs through a queue on this machine; what they do; taking them back."""

from __future__ import annotations

import sys
from typing import Any

DEFAULT_ROOT = "runs"


def local(
    configs: list[str],
    seeds: list[int] = [],  # noqa: B006 (never changed; jsonargparse shows it)
    grid: list[str] = [],  # noqa: B006
    at_once: int = 1,
    devices: list[str] = [],  # noqa: B006
    priority: int = 0,
    retries: int = 2,
    options: list[str] = [],  # noqa: B006
    root: str = DEFAULT_ROOT,
) -> None:
    """Run experiments on this machine, so many at once, by priority; without a config, go on with what was stopped.

    Args:
        configs: overlays, one experiment each; a+b loads both; base is the default run.
        seeds: one run of each experiment per seed.
        grid: values to try, in every combination: key=value,value.
        at_once: runs at the same time, together with those of other terminals.
        devices: CUDA_VISIBLE_DEVICES of each of the runs at once.
        priority: higher goes first; a run that must give way saves its state and goes on later.
        retries: how often a run that crashes goes on from its last checkpoint.
        options: for train.py fit; all that stands behind --.
        root: folder of runs whose stopped jobs to go on with.
    """
    from frugal.errors import UserError, require
    from frugal.launch.jobs import jobs_for
    from frugal.launch.local import run_jobs

    require(at_once > 0, f"at_once: must be positive, got {at_once}")  # before any folder is made
    if configs:
        jobs = jobs_for(configs, seeds, parse_grid(grid), options, priority)
    else:
        jobs = [job for job, state in _states(root) if state == "stopped" and job.cluster == "local"]
        if not jobs:
            raise UserError(f"configs: name one; no stopped job lies under {root}/")
    try:
        entries = run_jobs(jobs, at_once, devices, retries)
    except KeyboardInterrupt:
        print("stopped; `frugal launch local` goes on with what is unfinished", file=sys.stderr)
        sys.exit(130)
    if failed := [entry.job.id for entry in entries if entry.state == "failed"]:
        raise UserError(f"{len(failed)} of {len(entries)} runs failed: {' '.join(failed)}")


def slurm(
    configs: list[str],
    cluster: str = "configs/cluster/example.yaml",
    seeds: list[int] = [],  # noqa: B006
    grid: list[str] = [],  # noqa: B006
    hours: float | None = None,
    priority: int = 0,
    retries: int = 2,
    options: list[str] = [],  # noqa: B006
    root: str = DEFAULT_ROOT,
) -> None:
    """Submit experiments to Slurm, as an array if there are several; without a config, submit again what was stopped.

    Args:
        configs: overlays, one experiment each; a+b loads both; base is the default run.
        cluster: a file of configs/cluster/.
        seeds: one run of each experiment per seed.
        grid: values to try, in every combination: key=value,value.
        hours: time limit; else half as much again as `frugal plan` says for the hardware in the cluster's file, at most
            the hours there. A run that reaches it is requeued and goes on.
        priority: chooses partition or QOS by the cluster's file.
        retries: how often a run that crashes goes on from its last checkpoint.
        options: for train.py fit; all that stands behind --.
        root: folder of runs whose stopped jobs to submit again.
    """
    from pathlib import Path

    from frugal.errors import UserError
    from frugal.launch.jobs import jobs_for
    from frugal.launch.slurm import load_cluster, require_slurm, submit

    profile = load_cluster(Path(cluster))
    if hours is not None and hours <= 0:
        raise UserError(f"hours: must be positive, got {hours}")
    require_slurm(profile)
    if configs:
        jobs = jobs_for(configs, seeds, parse_grid(grid), options, priority, "slurm")
    else:
        jobs = [job for job, state in _states(root) if state == "stopped" and job.cluster == "slurm"]
        if not jobs:
            raise UserError(f"configs: name one; no stopped job lies under {root}/")
    for job in submit(jobs, profile, hours, retries):
        print(f"{job.name} {job.id}: slurm {job.slurm_id}; {job.output}")


def status(root: str = DEFAULT_ROOT, json: bool = False) -> None:
    """List the launched runs: state, step, newest losses.

    Args:
        root: folder of runs.
        json: print JSON instead of a table.
    """
    from json import dumps

    from frugal.launch.jobs import steps_of

    rows: list[dict[str, Any]] = []
    for job, state in _states(root):
        step, latest = steps_of(job)
        losses = {key: latest.get(f"{key}/loss") for key in ("train", "val")}
        rows.append(
            {"id": job.id, "name": job.name, "where": (job.slurm_id and f"slurm {job.slurm_id}") or job.cluster}
            | {"state": state, "priority": job.priority, "step": step, **losses}
        )
    if json:
        print(dumps(rows, indent=2))
    elif rows:
        shown = [
            {k: "" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in r.items()} for r in rows
        ]
        widths = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
        for row in [{key: key for key in widths}, *shown]:
            print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    else:
        print(f"nothing was launched under {root}/")


def cancel(runs: list[str], root: str = DEFAULT_ROOT) -> None:
    """Take runs back: those that wait never start, those that run save their state and end.

    Args:
        runs: ids of runs, names of experiments, or all.
        root: folder of runs.
    """
    from frugal.errors import UserError, require
    from frugal.launch.slurm import cancel as cancel_slurm
    from frugal.launch.state import cancel as cancel_local

    require(bool(runs), "runs: name at least one, or all; see `frugal launch status`")
    open_jobs = [(job, state) for job, state in _states(root) if state in ("waiting", "running", "stopped")]
    for wanted in runs:
        if not any(wanted in ("all", job.id, job.name) for job, _ in open_jobs):
            raise UserError(f"runs: no unfinished run {wanted} under {root}/; see `frugal launch status`")
    for job, state in open_jobs:
        if {"all", job.id, job.name} & set(runs):
            (cancel_slurm if job.cluster == "slurm" else cancel_local)(job)
            print(f"{job.name} {job.id}: cancelled ({state})")


def parse_grid(words: list[str]) -> dict[str, list[Any]]:
    """`key=a,b` as {key: [a, b]}; a value with commas of its own is written as a YAML list: `key=[[1,2],[3,4]]`."""
    import yaml

    from frugal.errors import UserError

    found: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not key or not equals or not text:
            raise UserError(f"grid: write key=value,value; got {word!r}")
        values = yaml.safe_load(text) if text.startswith("[") else text.split(",")
        if not isinstance(values, list):
            raise UserError(f"grid: {key}: not a list: {text!r}")
        found[key.removeprefix("--")] = values
    return found


def _states(root: str) -> list[tuple[Any, str]]:
    from pathlib import Path

    from frugal.launch.jobs import all_jobs
    from frugal.launch.slurm import slurm_states
    from frugal.launch.state import state_of

    jobs = all_jobs(Path(root))
    alive = slurm_states() if any(job.cluster == "slurm" for job in jobs) else {}
    return [(job, state_of(job, job.slurm_id in alive)["state"]) for job in jobs]
