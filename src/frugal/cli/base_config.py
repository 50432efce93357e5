"""The defaults below an experiment, where it trains a model of another kind or on data of another kind."""

from __future__ import annotations

import atexit
import importlib
import inspect
import tempfile
from pathlib import Path
from typing import Any

import yaml


def base_for(path: str, args: list[str]) -> str:
    """The default config itself, or a copy of it for the classes that an overlay or an option names.

    jsonargparse merges an argument of the same name although it is of another type in the new class, where the keys of
    the old one are refused or, worse, fit. So the copy keeps only what the new class has under the same name and type.
    """
    base = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    changed = False
    for part in ("model", "data"):
        wanted, there = _class_of(part, args), base[part]["class_path"]
        theirs, ours = _arguments(wanted or there), _arguments(there)
        shared = {key: value for key, value in base[part]["init_args"].items() if theirs.get(key) == ours.get(key)}
        if wanted is not None and theirs and any(key in theirs for key in base[part]["init_args"].keys() - shared):
            base[part] = {"class_path": wanted, "init_args": shared}
            changed = True
    if not changed:
        return path
    with tempfile.NamedTemporaryFile("w", prefix="frugal-base-", suffix=".yaml", delete=False) as file:
        yaml.safe_dump(base, file, sort_keys=False)
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return file.name


def _class_of(part: str, args: list[str]) -> str | None:
    """The class path that overlays and options give to `part`, the last one wins; None where they leave the default."""
    found = None
    for key, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, own = key.partition("=")
        text = own if equals else value
        if name in ("-c", "--config") and Path(text).is_file():
            try:
                overlay = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue  # the parser says it in a line
            values = overlay.get(part) if isinstance(overlay, dict) else None
            found = (values.get("class_path") if isinstance(values, dict) else None) or found
        elif name in (f"--{part}", f"--{part}.class_path"):
            found = text
    return found


def _arguments(class_path: str) -> dict[str, Any]:
    """The declared type of each argument; nothing where there is no such class."""
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "frugal.cli.train"), name)
        return {key: argument.annotation for key, argument in inspect.signature(kind).parameters.items()}
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}
