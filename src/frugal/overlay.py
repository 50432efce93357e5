"""Overlays as the command line merges them, for those that read configs without it."""

from __future__ import annotations

from typing import Any


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One config tree upon another: mappings key by key; lists, values and null replace; `key+` lists are joined.

    Another `class_path` drops the settings of the class before it; settings may be written without `init_args`.
    """
    if "class_path" in above and _class_name(above) != _class_name(below):
        return above
    if isinstance(below.get("init_args"), dict) and not above.keys() & {"class_path", "init_args"}:
        above = {"init_args": above}
    merged = below | above
    for key in below.keys() & above.keys():
        under, over = below[key], above[key]
        if isinstance(under, dict) and isinstance(over, dict):
            merged[key] = overlaid(under, over)
        elif key.endswith("+") and isinstance(under, list):
            merged[key] = [*under, *over]
    return merged


def _class_name(values: dict[str, Any]) -> str:
    return str(values.get("class_path", "")).rpartition(".")[2]
