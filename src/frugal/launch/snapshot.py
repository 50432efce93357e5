"""The code and configs as they are when a job is submitted, copied into its run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from frugal.errors import UserError
from frugal.provenance import COMMIT, PACKAGE, commit


def take_snapshot(where: Path, target: Path, overlays: Sequence[Path] = ()) -> list[Path]:
    """Copy `train.py`, `src/`, `configs/` and the overlays; note the commit.

    Args:
        where: the project's root folder.
        target: folder to make; must not exist.
        overlays: config files that the run loads.

    Returns:
        The copies of the overlays, in order.
    """
    script = next((f / "train.py" for f in (where, PACKAGE.parent.parent) if (f / "train.py").is_file()), None)
    if script is None:
        raise UserError(f"no train.py in {where}: run from the project's root folder")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    shutil.copytree(where / "configs", target / "configs", ignore=skip)
    shutil.copytree(PACKAGE, target / "src/frugal", ignore=skip)
    shutil.copyfile(script, target / "train.py")
    (target / COMMIT).write_text(commit() + "\n", encoding="utf-8")
    copies = []
    for number, overlay in enumerate(overlays):
        inside = overlay.resolve().is_relative_to((where / "configs").resolve())
        if inside:
            copy = target / "configs" / overlay.resolve().relative_to((where / "configs").resolve())
        else:
            copy = target / f"overlay{number}-{overlay.name}"
            shutil.copyfile(overlay, copy)
        copies.append(copy)
    return copies
