"""What a study declared before its first run, kept beside the runs: a later change is told with the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugal.errors import require
from frugal.tracking.run_folder import read_json, write_json
from frugal.tracking.study import Study

FILE = "declared.json"
KEYS = ("steps", "seeds", "target", "metric", "margin", "lengths")


def declare(folder: Path, study: Study, files: Sequence[Path]) -> None:
    """Keep what decides a verdict, once: before the first run.

    Raises:
        UserError: the folder holds a study of another file.
    """
    now = {"files": [_shown(file) for file in files], **{key: getattr(study, key) for key in KEYS}}
    kept = folder / FILE
    if not (folder / "runs").is_dir():
        write_json(kept, now, indent=1)
    elif kept.is_file():
        names = read_json(kept).get("files") or ["?"]
        told = f"study: {folder} holds runs of {'+'.join(names)}; rename yours, or give another --out"
        require(names == now["files"], told)


def said_of_declaration(folder: Path, study: Study, used: Sequence[int]) -> list[str]:
    """For the report: declared beforehand, changed since, or not known.

    Args:
        folder: of the study.
        study: as its file has it now.
        used: seeds of this report.
    """
    kept = folder / FILE
    said = []
    if kept.is_file():
        then: dict[str, Any] = read_json(kept)
        changed = [(key, then.get(key), getattr(study, key)) for key in KEYS if then.get(key) != getattr(study, key)]
        said.append("Target, margin, lengths and seeds were declared before the first run.")
        if changed:
            said = [f"Changed since the first run: {', '.join(f'{key} from {a} to {b}' for key, a, b in changed)}."]
    if list(used) != study.seeds:
        said.append(f"Of the declared seeds {study.seeds} only {list(used)}.")
    return said


def _shown(file: Path) -> str:
    """Relative to the project, wherever that lies."""
    path = file.resolve()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.as_posix()
