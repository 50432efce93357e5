"""What a source gives: a text that knows where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        text: what it says.
        source: which source it comes from, as losses are logged.
        level: its difficulty where the source knows one.
    """

    text: str
    source: str = ""
    level: int | None = None
