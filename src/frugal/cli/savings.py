"""The verb that runs a savings study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

RESTARTS = 20  # of a run whose place in the queue was taken away


def savings(
    study: str,
    out: str = "runs/studies",
    steps: int | None = None,
    seeds: int | None = None,
    arms: list[str] | None = None,
    jobs: int = 1,
    devices: list[str] | None = None,
    launcher: str | None = None,
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto",
    report_only: bool = False,
) -> None:
    """Run a savings study: what each technique needs to reach the same loss, on five cost axes, with a verdict.

    Args:
        study: a file of configs/studies/; a+b lays b upon a.
        out: folder for the runs and the report; finished runs in it are used, interrupted ones go on.
        steps: of the baseline, in place of the study's: a smaller or larger copy of it, with a folder of its own.
        seeds: how many of the study's seeds.
        arms: run these alone, with the baseline and their controls; the others can follow, in the same folder. The
            report has every arm of the study that has been run there.
        jobs: runs at a time; on a machine without a GPU each has one thread (OMP_NUM_THREADS sets another number), on
            others its share of the cores.
        devices: CUDA_VISIBLE_DEVICES of each of the runs at a time, as 0 1 2 3; their number takes the place of jobs.
        launcher: what to put before each run's command, such as "srun --ntasks 1 --gpus 1 --cpus-per-task 4": then
            each of the runs at a time waits in Slurm's queue for a place of its own.
        wandb: auto, online, offline or disabled.
        report_only: write the report of what is there and start nothing.
    """
    import os
    import shlex
    import shutil
    import signal
    import sys
    from dataclasses import replace
    from functools import partial
    from pathlib import Path
    from queue import SimpleQueue

    from frugal.errors import UserError, require
    from frugal.tracking.declared import declare, said_of_declaration
    from frugal.tracking.processes import SIGNALS, STOPPED, start_process
    from frugal.tracking.receipts import result_of, write_result
    from frugal.tracking.run_costs import conditions
    from frugal.tracking.run_folder import RunConfig
    from frugal.tracking.savings import compare
    from frugal.tracking.savings_report import markdown, write_report
    from frugal.tracking.study import read_study, study_files
    from frugal.tracking.study_runs import StudyRuns

    require(jobs > 0, f"jobs: must be positive, got {jobs}")
    require(Path("train.py").is_file(), "no train.py here: run from the project's root folder")
    wanted = read_study(study)
    declared, name = wanted, "_".join(file.stem for file in study_files(study))
    if seeds is not None:
        require(0 < seeds <= len(wanted.seeds), f"seeds: the study has {len(wanted.seeds)}, got {seeds}")
        wanted = replace(wanted, seeds=wanted.seeds[:seeds])
    if arms:
        wanted = replace(wanted, only=arms)
    if steps is not None and steps != wanted.steps:
        wanted, declared = replace(wanted, steps=steps), replace(declared, steps=steps)
        name = f"{name}_{steps}_steps"
    folder = Path(out).resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted.clock == "processor" and not any(Path("/dev").glob("nvidia[0-9]*")):
        cores = jobs  # of one thread the processor's seconds are exact; several wait for each other
    free: SimpleQueue[str] | None = None
    if devices:
        free, jobs = SimpleQueue(), len(devices)
        for device in devices:
            free.put(device)
    if report_only:  # what was never run is no part of it
        there = StudyRuns(name, replace(wanted, only=[]), folder, wandb, None).there()
        require(bool(there), f"report_only: no finished run of {name} in {folder}; run the study first")
        wanted = replace(wanted, only=[*(arms or []), *there])
    start = None if report_only else partial(start_process, threads=max(1, cores // jobs), devices=free)
    if start and launcher is not None:
        require(not devices, "devices: the launcher gives each run its own; leave one of the two out")
        try:
            words = shlex.split(launcher)
        except ValueError as error:
            raise UserError(f"launcher: {launcher!r} cannot be split into words ({error})") from None
        found = bool(words and shutil.which(words[0]))
        require(found, f"launcher: there is no program {words[0] if words else repr(launcher)} here")
        start = partial(start_process, launcher=words)
    runs = StudyRuns(name, wanted, folder, wandb, start, restarts=RESTARTS if launcher else 0)
    if start:
        refuse_faulty(runs.samples())
        declare(folder, declared, study_files(study))
    earlier: dict[int, Any] = {number: signal.signal(number, runs.stop) for number in SIGNALS}
    earlier[signal.SIGINT] = signal.signal(signal.SIGINT, runs.interrupt)
    try:
        results, sweeps = runs.all(jobs), runs.sweeps
    except KeyboardInterrupt:
        raise UserError(f"{name}: interrupted after {runs.made} new run(s); the same command goes on") from None
    except UserError as error:
        if not runs.stopped:
            raise
        print(error, file=sys.stderr)
        sys.exit(STOPPED)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if arms and not report_only:  # beside those named now, the report keeps what earlier calls have made
        there = StudyRuns(name, replace(wanted, only=[]), folder, wandb, None).there()
        wanted = replace(wanted, only=[*arms, *there])
        report = StudyRuns(name, wanted, folder, wandb, None)
        results, sweeps = report.all(), report.sweeps
    points = {arm: {s: [(r.length, r.point) for r in rs] for s, rs in seeds.items()} for arm, seeds in results.items()}
    findings = compare(wanted, points, sweeps)
    said = [*said_of_declaration(folder, declared, wanted.seeds), *conditions(results)]
    text = markdown(name, wanted, points, findings, said, sweeps, runs.failures)
    paths = write_report(folder, name, wanted, points, findings, text)
    write_result(result_of(name, wanted, findings, said, sweeps, points), folder / f"{name}.json")
    if runs.made and wandb != "disabled":
        from frugal.training.loggers import log_study  # imports torch, as the runs did

        log_study(
            RunConfig(name=name, root=str(folder), group=name, tags=["study", "report"], wandb=wandb), findings, paths
        )
    print(text.split("## The runs")[0].strip())
    print(f"\nwritten to {', '.join(str(path) for path in paths.values())}")
    if runs.of_other_code:
        print(
            f"{name}: {runs.of_other_code} run(s) were made by other code than this; to make them again, remove "
            f"{folder / 'runs'}",
            file=sys.stderr,
        )
    if runs.failures:
        failed = "; ".join(f"{run}: {why}" for run, why in runs.failures.items())
        print(f"{name}: {len(runs.failures)} run(s) failed ({failed}); see {folder / 'overlays'}", file=sys.stderr)
        sys.exit(1)


def refuse_faulty(samples: list[Path]) -> None:
    """Refuse arms whose overlays train.py would, in a process of its own: this one needs no torch.

    Raises:
        UserError: the first fault, with the arms that have it.
    """
    import logging
    import subprocess
    import sys

    from frugal.errors import UserError

    if not samples:
        return
    logging.getLogger(__name__).info("parsing the configs of %d arms before the first run", len(samples))
    command = [sys.executable, "-m", "frugal.cli.check_configs", *map(str, samples)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    found: dict[str, list[str]] = {}
    for line in said:
        for file in samples:
            if line.startswith(f"{file}: "):
                found.setdefault(line.removeprefix(f"{file}: "), []).append(file.stem)
    if found:
        fault, arms = next(iter(found.items()))
        raise UserError(f"arms: {', '.join(arms)}: {fault}")
