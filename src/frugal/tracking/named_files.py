"""The files that a config names: what a run reads beside its config, as digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

LARGE = 64 * 2**20  # bytes of a file beyond which it is known by its size and time of change
MOST = 10_000  # files of a folder


def named_files(tree: Any, root: Path) -> dict[str, str]:
    """What lies under every path or pattern that a config names to read from, by file: a digest of its content.

    Of a file beyond `LARGE` bytes only its size and time of change count; of a folder its first `MOST` files.
    """
    if isinstance(tree, Mapping):  # what a run writes to is none of its inputs
        tree = [value for key, value in tree.items() if not str(key).endswith(("_dir", "root"))]
    if isinstance(tree, list):
        return {name: digest for value in tree for name, digest in named_files(value, root).items()}
    # Only names with a separator or an ending are paths; "auto" beside a folder of that name is none.
    if not isinstance(tree, str) or not re.fullmatch(r"[^\n]*[/.][^\n]{1,500}", tree):
        return {}
    try:
        paths = [Path(name) for name in glob(str(root / tree), recursive=True)]  # noqa: PTH207 (absolute patterns too)
        files = [p for path in paths for p in ([path] if path.is_file() else islice(path.rglob("*"), MOST))]
        return {str(p): _content(p) for p in sorted(files) if p.is_file()}
    except (OSError, ValueError):  # a text with a slash that is no path
        return {}


def _content(file: Path) -> str:
    stat = file.stat()
    if stat.st_size > LARGE:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    return _digest(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, changed: int) -> str:
    """Of a file of this size and time of change: read once."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
