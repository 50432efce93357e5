"""A job is one training run to be done: its folder, its command, its priority. Nothing here needs torch."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from frugal.errors import UserError
from frugal.launch.snapshot import take_snapshot
from frugal.overlay import overlaid
from frugal.tracking.run_folder import RunConfig, RunFolder, new_run, read_lines

STOPPED = 75  # exit code of a run that was told to stop, saved its state and wants to be continued (EX_TEMPFAIL)
REFUSED = 2  # exit code of a fault of the user's: trying again would not help


@dataclass(frozen=True)
class Job:
    """One run of `train.py fit`.

    Args:
        folder: the run's folder.
        options: of `train.py fit`, all but the run's place and checkpoint.
        priority: higher goes first, and makes lower ones give way.
        submitted: seconds since 1970; of equal priority the earliest goes first.
        where: the folder that relative paths of the config start from.
        cluster: local or slurm.
        slurm_id: number (of the array's element) that Slurm gave.
    """

    folder: Path
    options: tuple[str, ...]
    priority: int = 0
    submitted: float = field(default_factory=time.time)
    where: Path = field(default_factory=Path.cwd)
    cluster: str = "local"
    slurm_id: str | None = None

    @property
    def id(self) -> str:
        """The run's id."""
        return self.folder.name

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.folder.parent.name

    @property
    def place(self) -> Path:
        """Folder of what belongs to launching: the job itself, the code, the output."""
        return self.folder / "launch"

    @property
    def output(self) -> Path:
        """What the run prints."""
        return self.place / "output.log"

    @property
    def command(self) -> list[str]:
        """Arguments of the process; it goes on where the run stands, from the code as it was when submitted."""
        run = {"name": self.name, "root": str(self.folder.parent.parent), "id": self.id}
        placed = [word for key, value in run.items() for word in (f"--run.{key}", value)]
        script = str(self.place / "code/train.py")
        return [sys.executable, script, "fit", *self.options, *placed, "--ckpt_path", "last"]

    @property
    def environment(self) -> dict[str, str]:
        """What the process must see beside the environment of the caller."""
        code = self.place / "code"
        return {"PYTHONPATH": str(code / "src"), "FRUGAL_BASE_CONFIG": str(code / "configs/base.yaml")}

    def save(self) -> None:
        """Write the job into its run's folder."""
        self.place.mkdir(parents=True, exist_ok=True)
        write_whole(self.place / "job.json", {**asdict(self), "folder": str(self.folder), "where": str(self.where)})


def write_whole(path: Path, content: Any) -> None:
    """Write JSON in one move: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_job(folder: Path) -> Job:
    """The job of a run's folder."""
    stored = json.loads((folder / "launch/job.json").read_text(encoding="utf-8"))
    for key, kind in {"folder": Path, "where": Path, "options": tuple}.items():
        stored[key] = kind(stored[key])
    return Job(**stored)


def all_jobs(root: Path) -> list[Job]:
    """Every job ever launched under a folder of runs, oldest first."""
    jobs = [load_job(path.parent.parent) for path in root.glob("*/*/launch/job.json")]
    return sorted(jobs, key=lambda job: (job.submitted, job.id))


def jobs_for(
    configs: Sequence[str],
    seeds: Sequence[int] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
    options: Sequence[str] = (),
    priority: int = 0,
    cluster: str = "local",
) -> list[Job]:
    """One job for each config, point of the grid and seed; code and configs are copied into each run's folder.

    Args:
        configs: overlays; several that belong to one run are joined by '+'. None, or base, means the default run.
        seeds: of each run; none leaves the config's.
        grid: values to try by key, in every combination.
        options: further options of `train.py fit`, for all jobs.
        priority: higher goes first.
        cluster: local or slurm.

    Raises:
        UserError: a config or the project's root folder is missing, or an option is the launcher's own.
    """
    where = Path.cwd()
    if not (where / "configs/base.yaml").is_file():
        raise UserError("no configs/base.yaml here: run from the project's root folder")
    for option in options:
        if re.match(r"--(run\.(id|root|name)|ckpt_path)(=|$)", option) and "name" not in option:
            raise UserError(f"{option.split('=')[0]}: the launcher sets it; leave it out")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"seeds: each only once, got {' '.join(map(str, seeds))}")
    points = [
        list(zip(grid or {}, values, strict=True)) for values in itertools.product(*(grid or {}).values())
    ]  # one empty point without a grid
    found = []
    every_seed: Sequence[int | None] = list(seeds) or [None]
    layered = [[where / part for part in config.split("+") if part not in ("", "base")] for config in configs or [""]]
    if missing := [path for overlays in layered for path in overlays if not path.is_file()]:
        raise UserError(f"configs: no file {missing[0]}")
    for overlays, point, seed in itertools.product(layered, points, every_seed):
        run = _run_of([where / "configs/base.yaml", *overlays], options)
        folder = _new_folder(where, run)
        varied = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in point]
        varied += [] if seed is None else [f"--seed_everything={seed}"]
        copies = [str(copy) for copy in take_snapshot(where, folder / "launch/code", overlays)]
        layers = [word for copy in copies for word in ("--config", copy)]
        found.append(Job(folder, (*layers, *options, *varied), priority, where=where, cluster=cluster))
        found[-1].save()
    return found


def _new_folder(where: Path, run: RunConfig) -> Path:
    """Make a run's folder; of many runs made in one second two may draw the same id."""
    while True:
        folder = where / new_run(run).path
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def _run_of(layers: Sequence[Path], options: Sequence[str]) -> RunConfig:
    """The run's name and root as the layers of config and the options say."""
    found: dict[str, Any] = {}
    for layer in layers:
        content = yaml.safe_load(layer.read_text(encoding="utf-8"))
        found |= (content or {}).get("run") or {}
    for word, following in zip(options, [*options, ""][1:], strict=True):
        if match := re.fullmatch(r"--run\.name(?:=(.*))?", word, re.DOTALL):
            found["name"] = following if match[1] is None else match[1]
    return RunConfig(**{key: found[key] for key in ("name", "root") if key in found})


def config_of(job: Job) -> dict[str, Any]:
    """What the job's layers and options come to, key by key; nothing is checked."""
    whole = yaml.safe_load((job.place / "code/configs/base.yaml").read_text(encoding="utf-8"))
    words = [part for word in job.options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options = [(word[2:], value) for word, value in itertools.pairwise(words) if word.startswith("--")]
    for key, value in options:
        if key == "config":
            whole = overlaid(whole, yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {})
    for key, value in options:
        if key != "config":
            above = _value(value)
            for part in reversed(key.split(".")):
                above = {part: above}
            whole = overlaid(whole, above)
    return whole


def _value(text: str) -> Any:
    """An option's value; what is no YAML is a string."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def steps_of(job: Job) -> tuple[int, dict[str, float]]:
    """The step that a run has reached, and its newest metrics."""
    rows = read_lines(RunFolder(job.folder).metrics)
    latest: dict[str, float] = {}
    for row in rows:
        latest |= row
    return (int(rows[-1]["step"]) + 1 if rows else 0), latest
