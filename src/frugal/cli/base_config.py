"""The defaults below an experiment, where it trains a model of another kind or on data of another kind."""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import inspect
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from frugal.cli.errors import keys_of
from frugal.errors import UserError
from frugal.model.config import TransformerConfig
from frugal.model.vision_config import VisionConfig
from frugal.overlay import read_mapping


def base_for(path: str, args: list[str]) -> str:
    """The default config itself, or a copy of it for the classes that an overlay or an option names.

    jsonargparse merges an argument of the same name although it is of another type in the new class, where the keys of
    the old one are refused or, worse, fit. So the copy keeps only what the new class has under the same name and type.

    Raises:
        UserError: a model on data that it cannot read.
    """
    base = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    model, data = (_load(_class_of(part, args) or base[part]["class_path"]) for part in ("model", "data"))
    reads, gives = getattr(model, "reads", ""), getattr(data, "gives", "")
    if reads and gives and reads != gives:
        raise UserError(
            f"data.class_path: {model.__name__} trains on {reads}, and {data.__name__} gives {gives}; set data and "
            "model to classes of one kind"
        )
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


def class_keys(path: str, args: list[str]) -> list[str]:
    """Every key of the run's model and data classes, nested dataclasses included, as users write them."""
    base = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    kinds = {part: _load(_class_of(part, args) or base[part]["class_path"]) for part in ("model", "data")}
    return [key for part, kind in kinds.items() if kind is not None for key in keys_of(kind, part)]


def passed_the_wrong_way(args: list[str], keys: Iterable[str]) -> str | None:
    """How a YAML file among the arguments is to be passed, where its content says that it is passed wrongly.

    Args:
        args: the command line.
        keys: what an overlay may set at its top: run, data, model, trainer, ...
    """
    for option, value in _pairs(args):
        file = Path(value)
        try:
            content = read_mapping(file) if file.suffix in (".yaml", ".yml") and file.is_file() else {}
        except UserError:  # the parser's to refuse
            content = {}
        right = _option_for(content, set(keys))
        if right is None or not option.startswith("-"):
            continue
        if option in ("-c", "--config") and right != "--config":
            return f"{file}: is no overlay but a value of {right[2:]}; pass it as {right} {file}"
        if option not in ("-c", "--config") and option.replace(".init_args", "") != right:
            what = f"an overlay (it sets {', '.join(content)})" if right == "--config" else f"a value of {right[2:]}"
            return f"{option[2:]}: {file} is {what}; pass it as {right} {file}"
    return None


def _option_for(content: dict[str, Any], keys: set[str]) -> str | None:
    """The option that takes a file of this content; None if that cannot be told."""
    shape = {field.name for kind in (TransformerConfig, VisionConfig) for field in dataclasses.fields(kind)}
    kind = _load(str(content.get("class_path", "")))
    if isinstance(kind, type) and issubclass(kind, (pl.LightningModule, pl.LightningDataModule)):
        return "--model" if issubclass(kind, pl.LightningModule) else "--data"
    if content and content.keys() <= keys:
        return "--config"
    # One misspelt key makes no other file of it.
    return "--model.transformer" if 2 * len(content.keys() & shape) > len(content) else None


def _pairs(args: list[str]) -> list[tuple[str, str]]:
    """Each argument with its value: what stands behind `=`, or else the next argument."""
    pairs = []
    for key, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, own = key.partition("=")
        pairs.append((name, own if equals else following))
    return pairs


def _overlays(args: list[str]) -> list[dict[str, Any]]:
    """What the `--config` files among the arguments hold; one that is not there is the parser's to refuse."""
    found = []
    for name, value in _pairs(args):
        file = Path(value)
        if name in ("-c", "--config") and file.is_file():
            found.append(read_mapping(file))
    return found


def _class_of(part: str, args: list[str]) -> str | None:
    """The class path that options or else overlays give to `part`; None where they leave the default."""
    for name, value in _pairs(args):
        if name in (f"--{part}", f"--{part}.class_path"):
            return value
    named = [values.get("class_path") for overlay in _overlays(args) if isinstance(values := overlay.get(part), dict)]
    return next((name for name in reversed(named) if name), None)


def _load(class_path: str) -> Any:
    """The class, or None."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module or "frugal.cli.train"), name, None)
    except (ImportError, ValueError):
        return None


def _arguments(class_path: str) -> dict[str, Any]:
    """The declared type of each argument; nothing where there is no such class."""
    if (kind := _load(class_path)) is None:
        return {}
    return {key: argument.annotation for key, argument in inspect.signature(kind).parameters.items()}
