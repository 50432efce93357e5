"""What a source gives: a text that knows where it comes from."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
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


def as_document(document: str | Document) -> Document:
    """A bare text as a document of no known origin."""
    return document if isinstance(document, Document) else Document(document)


def content_hash(text: str) -> bytes:
    """Hash of what a text says, the same for copies that differ in case, spacing or Unicode form only, 32 bytes."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(normal.encode()).digest()
