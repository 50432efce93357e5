"""Which code and which libraries made a result."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parent
COMMIT = "COMMIT"  # in a copy of the code: the commit it was taken from


def commit() -> str:
    """The commit of the code, `-dirty` if there are changes beyond it."""
    note = PACKAGE.parent.parent / COMMIT
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "not under git"


@cache
def source() -> str:
    """A digest of the package's code as it lies here: two commits that differ in documents alone have the same one."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    found = {"python": platform.python_version()}
    for name in ("torch", "lightning", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
