"""Overlays as the command line merges them, for those that read configs without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from frugal.errors import UserError, require


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One config tree upon another: mappings key by key; lists, values and null replace; `key+` adds to a list.

    A class may be written as its name alone, its settings without `init_args`. Unlike the command line, which keeps
    those settings of the class before that another `class_path` also accepts, this drops all of them: it imports no
    class and cannot know.
    """
    if "class_path" in above and _class_name(above) != _class_name(below):
        return above
    if isinstance(below.get("init_args"), dict) and not above.keys() & {"class_path", "init_args"}:
        above = {"init_args": above}
    merged = dict(below)
    for key in sorted(above, key=lambda key: str(key).endswith("+")):  # a list is replaced before it is added to
        under, over = merged.get(key), above[key]
        if isinstance(under, dict) and isinstance(over, str) and "class_path" in under:
            over = {"class_path": over}
        if isinstance(under, dict) and isinstance(over, dict):
            over = overlaid(under, over)
        elif str(key).endswith("+"):
            target = key[:-1] if key[:-1] in merged else key
            key, over = target, [*_items(merged.get(target)), *_items(over)]
        else:
            merged.pop(f"{key}+", None)
        merged[key] = over
    return merged


def read_mapping(file: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys; an empty one holds none.

    Raises:
        UserError: not text, no YAML, or a list or value.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: is no YAML ({' '.join(str(error).split())})") from None
    require(content is None or isinstance(content, dict), f"{file}: must hold keys, not a {type(content).__name__}")
    return content or {}


def _items(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _class_name(values: dict[str, Any]) -> str:
    return str(values.get("class_path", "")).rpartition(".")[2]
