"""A run's folder, `runs/<name>/<id>/`: everything that belongs to the run lies in it."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from frugal.errors import UserError


@dataclass(frozen=True)
class RunConfig:
    """How a run is called and where its results go.

    Args:
        name: the experiment's name; runs of one name lie in one folder and resume from one another.
        root: folder that holds all runs.
        project: W&B project.
        group: W&B group, for instance a study.
        tags: W&B tags.
        id: the run's folder under `name` and its W&B id; null makes one up. `--ckpt_path last` goes on in this folder.
        upload_checkpoint: send best.ckpt to W&B as an artifact; the data's fingerprint is always sent.
        wandb: auto (online with an API key and a network, offline otherwise), online, offline or disabled.
    """

    name: str = "base"
    root: str = "runs"
    project: str = "frugal"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    id: str | None = None
    upload_checkpoint: bool = False
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"

    def __post_init__(self) -> None:
        for key, value in (("name", self.name), ("id", self.id)):
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
                raise UserError(f"run.{key}: use letters, digits, '.', '_' and '-' only, got {value!r}")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder."""

    path: Path

    @property
    def id(self) -> str:
        """The run's id, in the file system and in W&B alike; ids sort by time."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of `last.ckpt` and `best.ckpt`."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: step, time and the metrics logged there."""
        return self.path / "metrics.jsonl"

    @property
    def expert_load(self) -> Path:
        """One JSON object per line: step, and per layer the share of tokens of each expert."""
        return self.path / "expert_load.jsonl"

    @property
    def freezing(self) -> Path:
        """One JSON object per line: each change of what is frozen, and each decision with its scores."""
        return self.path / "freezing.jsonl"

    @property
    def curriculum(self) -> Path:
        """One JSON object per line: each decision of an adaptive curriculum, with the losses behind it."""
        return self.path / "curriculum.jsonl"

    @property
    def summary(self) -> Path:
        """What the closing card shows, as JSON."""
        return self.path / "summary.json"

    @property
    def meter(self) -> Path:
        """What the run has spent so far, kept current so that a killed run's bill is known."""
        return self.path / "meter.json"

    @property
    def plots(self) -> Path:
        """Folder of the run's pictures."""
        return self.path / "plots"


def new_run(config: RunConfig) -> RunFolder:
    """Name a fresh folder (not made yet)."""
    run_id = config.id or time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
    return RunFolder(Path(config.root) / config.name / run_id)


def newest_run(config: RunConfig, checkpoint: str) -> RunFolder | None:
    """The newest run of this name (or the one of this id) that holds `checkpoints/<checkpoint>`, or None."""
    found = sorted((Path(config.root) / config.name).glob(f"{config.id or '*'}/checkpoints/{checkpoint}"))
    return RunFolder(found[-1].parent.parent) if found else None


def folder_of(checkpoint: Path) -> RunFolder | None:
    """The run that a checkpoint lies in, or None for a checkpoint from elsewhere."""
    folder = checkpoint.resolve().parent.parent
    return RunFolder(folder) if (folder / "config.yaml").is_file() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; what stands behind a line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Raises:
        UserError: something else stands in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); if the run can go on, --ckpt_path last writes it anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: it holds a {type(content).__name__}, not a run's figures")
    return content


def keep_steps(path: Path, last_step: int) -> None:
    """Drop lines of a JSON-lines file beyond `last_step`: steps that a resumed run is about to do again."""
    if path.is_file():
        rows = [row for row in read_lines(path) if row["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)


def write_json(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Write a file in one move, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    temporary.replace(path)
