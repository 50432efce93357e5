"""The verb that curates a run's documents in many tasks, here or on a cluster."""

from __future__ import annotations

from typing import Literal


def curate(
    experiment: str,
    out: str,
    executor: Literal["local", "slurm"] = "local",
    tasks: int = 4,
    workers: int | None = None,
    partition: str | None = None,
    time: str = "24:00:00",
    memory_gb: int = 4,
    qos: str | None = None,
) -> None:
    """Curate a run's documents in many tasks, here or on Slurm; training on the same config finds the result.

    Args:
        experiment: a config with data.curation and data.split hash.
        out: folder for what the stages write: what is left after each, what was dropped and why, logs. The same
            command again goes on where an earlier one stopped.
        executor: local, or slurm, which must see the same folders.
        tasks: parts that the work on single documents is divided into; documents are compared in one.
        workers: tasks at once; null: one per core here, all of them on Slurm.
        partition: Slurm's.
        time: limit of a Slurm job.
        memory_gb: of a Slurm job; the comparing stages and the last one hold all text that is left.
        qos: Slurm's, where the cluster has them.
    """
    from pathlib import Path

    from frugal.cli.train import build
    from frugal.data.curation.pipeline import cores
    from frugal.data.datamodule import TextDataModule
    from frugal.errors import UserError, require

    try:
        from frugal.data.curation.cluster import Job
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("frugal"):
            raise
        raise UserError("executor: needs datatrove; pip install -e '.[cluster]'") from None
    require(tasks > 0, f"tasks: must be positive, got {tasks}")
    require(workers is None or workers > 0, f"workers: must be positive, got {workers}")
    require(executor == "local" or partition is not None, "partition: slurm needs one")
    data = build(["fit", "--config", experiment, "--trainer.logger", "false"]).datamodule
    if not isinstance(data, TextDataModule) or data.curation is None:
        raise UserError(f"experiment: {experiment} has no data.curation")
    require(
        data.split == "hash",
        "data.split: many tasks need hash, by which each document says alone whether it is held out",
    )
    cache_dir = Path(data.cache_dir).expanduser().resolve()
    job = Job(data.source, data.curation, data.val_fraction, cache_dir, Path(out).expanduser().resolve(), tasks)
    if executor == "slurm":
        limits = {"workers": workers or -1, "mem_per_cpu_gb": memory_gb, "qos": qos}
        jobs = job.submit(partition=partition, time=time, **limits)
        print(f"submitted jobs {', '.join(jobs) or '(all stages are complete)'}; the result will be in {job.folder}")
        return
    job.run_local(workers or cores())
    print(f"{job.folder / 'curation.md'} says what was left out and why, {job.out / 'dropped'} has it all")
