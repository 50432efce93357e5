"""Runs as data: from a run's folder, from W&B's offline files, or from a W&B project. No torch."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from frugal.errors import UserError, require
from frugal.overlay import read_mapping
from frugal.tracking.run_folder import RunFolder, read_json, read_lines


@dataclass(frozen=True)
class RunData:
    """A run: its config by dotted key, its logged rows in order, and its closing figures."""

    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A config tree by dotted key as users write it: `init_args` is left out."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, prefix if key == "init_args" else f"{prefix}.{key}".lstrip("."))
    return found


def read_runs(sources: Iterable[str]) -> list[RunData]:
    """Read runs from what users name; one that is named twice is read once.

    Different runs that are called alike get as much of the path that leads to them as tells them apart.

    Args:
        sources: a run's folder, or one that holds runs at any depth; a .wandb file, or a folder that holds one;
            `ENTITY/PROJECT` or `ENTITY/PROJECT/RUN_ID` of the W&B server.

    Raises:
        UserError: nothing there, or the server does not answer.
    """
    parts: dict[PurePath, dict[PurePath, RunData]] = {}
    for source in sources:
        for (origin, file), run in _read(source).items():
            parts.setdefault(origin, {})[file] = run
    found = {origin: _joined(origin, runs) for origin, runs in parts.items()}
    alike: dict[str, list[PurePath]] = {}
    for origin, run in found.items():
        alike.setdefault(run.name, []).append(origin)
    leading = {origin: lead for name, origins in alike.items() for origin, lead in _leading(name, origins).items()}
    return [replace(run, name=str(PurePath(*leading[o], run.name))) if leading[o] else run for o, run in found.items()]


def _leading(name: str, origins: Sequence[PurePath]) -> dict[PurePath, tuple[str, ...]]:
    """The fewest folders before the name by which runs of this name differ; none for a single one."""
    own = PurePath(name).parts
    paths = {o: o.parts[: -len(own)] if o.parts[-len(own) :] == own else o.parts for o in origins}
    for n in range(max(map(len, paths.values())) + 1):
        ends = {origin: parts[max(len(parts) - n, 0) :] for origin, parts in paths.items()}
        if len(set(ends.values())) == len(origins):
            break
    return ends


def _joined(origin: PurePath, parts: Mapping[PurePath, RunData]) -> RunData:
    """One run of the W&B files of its parts, in the order of their dates; its own folder holds all of it.

    A part that goes on from an earlier checkpoint does steps again: its rows replace those of the part before it.
    """
    if origin in parts:
        return parts[origin]
    first, *others = (parts[file] for file in sorted(parts, key=lambda f: f.parent.name.removeprefix("offline-")))
    for part in others:
        begins = min((row["step"] for row in part.rows if len(row) > 1), default=math.inf)  # pictures have no step
        rows = [row for row in first.rows if row["step"] < begins] + part.rows
        first = RunData(part.name, part.config or first.config, rows, first.summary | part.summary)
    return first


def _read(source: str) -> dict[tuple[PurePath, PurePath], RunData]:
    """Runs by where they are and by the file they were read from; W&B's file in a run's folder is that run."""
    path = Path(source)
    if path.is_file() and path.suffix == ".wandb":
        return {(_origin(path), path.resolve()): read_wandb_file(path)}
    if path.is_dir():
        folders = sorted({file.parent for file in path.rglob("metrics.jsonl")})
        if folders:
            return {(folder.resolve(),) * 2: read_folder(folder) for folder in folders}
        if files := sorted(path.rglob("*.wandb")):
            return {(_origin(file), file.resolve()): read_wandb_file(file) for file in files}
        raise UserError(f"runs: {source} holds neither a run (metrics.jsonl) nor W&B's files (*.wandb)")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", source):
        return {(origin, origin): run for origin, run in read_online(source).items()}
    raise UserError(f"runs: no run {source}: name a folder, a .wandb file, or ENTITY/PROJECT")


def _origin(file: Path) -> PurePath:
    """The run's folder that W&B's file lies in, as wandb/offline-run-DATE-ID/run-ID.wandb; without one, the file.

    A run that went on has several such files, of the same name.
    """
    file = file.resolve()
    place = file.parent
    if not re.match(r"(offline-)?run-", place.name):
        return file
    folder = place.parent.parent
    return folder if (folder / "metrics.jsonl").is_file() else place.parent / file.name


def read_folder(folder: Path) -> RunData:
    """A run's own files; `summary.json` is there once it has ended."""
    run = RunFolder(folder)
    file = folder / "config.yaml"
    config = read_mapping(file) if file.is_file() else {}
    summary = read_json(run.summary) if run.summary.is_file() else {}
    # A row without a step, or a value that is null, is no measurement.
    logged = [row for row in read_lines(run.metrics) if row.get("step") is not None]
    rows = [{key: value for key, value in row.items() if value is not None} for row in logged]
    place = folder.resolve()
    return RunData(f"{place.parent.name}/{place.name}", flat(config), rows, summary)


def read_wandb_file(file: Path) -> RunData:
    """W&B's own file of a run, as `wandb leet inspect` tells it."""
    beside = Path(sys.executable).parent / "wandb"
    program = str(beside) if beside.is_file() else shutil.which("wandb") or "wandb"
    made = subprocess.run(
        [program, "leet", "inspect", "--json", str(file)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        lines = made.stderr.strip().splitlines()
        raise UserError(f"runs: wandb cannot read {file}: {lines[-1] if lines else 'no reason given'}")
    name, rows = file.stem, []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for line in filter(str.strip, made.stdout.splitlines()):
        record = json.loads(line)
        kind = record["type"]
        if kind == "run":
            name = record["run"].get("display_name") or name
        elif kind == "config":
            config |= record["config"].get("update", {})
        elif kind == "summary":
            summary |= record["summary"].get("update", {})
        elif kind == "history":
            rows.append(_row(record["history"]["item"]))
    if not config and not rows:
        raise UserError(f"runs: wandb cannot read {file}: there is no run in it")
    return RunData(name, flat({k: v for k, v in config.items() if k != "_wandb"}), rows, summary)


def _row(item: Mapping[str, Any]) -> dict[str, Any]:
    """A row of W&B's history as metrics.jsonl has it."""
    row = {key: value for key, value in item.items() if not key.startswith("_") and isinstance(value, int | float)}
    return {"step": item.get("trainer/global_step", item.get("_step")), **row}


def read_online(path: str) -> dict[PurePath, RunData]:
    """Runs of a W&B project, or one of them by its id, by ENTITY/PROJECT/ID."""
    import wandb

    try:
        api = wandb.Api(timeout=20)
        # No list() around these: it asks for the length first, and takes an error in that for an empty project.
        found = {
            PurePath(*path.split("/")[:2], str(run.id)): RunData(
                str(run.name), flat(dict(run.config)), [_row(row) for row in run.scan_history()], dict(run.summary)
            )
            for run in ([api.run(path)] if path.count("/") == 2 else api.runs(path))
        }
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"runs: there is no folder {path}, and W&B has no such project or does not answer: {reason[0]}"
        ) from None
    require(bool(found), f"runs: the W&B project {path} has no runs")
    return found
