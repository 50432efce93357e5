"""Text that a model wrote and verifiers kept, as a source: a jsonl file beside a record of how it came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frugal.data.documents import Document
from frugal.data.sources import Source
from frugal.errors import UserError


def record_of(path: Path) -> Path:
    """The record beside a generated file."""
    return path.with_suffix(".meta.json")


class Generated(Source):
    """What `frugal synthesize` wrote; the seconds it took are charged to every run that trains on it.

    Args:
        path: the .jsonl file; its record (.meta.json) must lie beside it.
        share_of_seconds: share of the generation's seconds that this run pays; below 1 if several runs use the text.
    """

    def __init__(self, path: str, share_of_seconds: float = 1.0) -> None:
        if not 0 <= share_of_seconds <= 1:
            raise UserError(f"data.source.share_of_seconds: must lie in [0, 1], got {share_of_seconds}")
        self.path, self.share_of_seconds = path, share_of_seconds

    @property
    def name(self) -> str:
        """The path as given."""
        return self.path

    def record(self) -> dict[str, Any]:
        """Model, settings, counts of kept and refused texts, seconds.

        Raises:
            UserError: no file, no record, or a record of another file.
        """
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"data.source.path: no file {self.path}; `frugal synthesize` writes one")
        try:
            record = json.loads(record_of(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"data.source.path: no record {record_of(path)} beside the text") from None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if not isinstance(record, dict) or record.get("sha256") != digest:
            raise UserError(f"data.source.path: {record_of(path)} is the record of another text than {self.path}")
        return record

    def seconds_by_stage(self) -> dict[str, float]:
        """Seconds of generation and verification that a run on this source is charged."""
        return {"synthesis": self.share_of_seconds * self.record()["seconds"]}

    def documents(self) -> Iterator[Document]:
        """The kept texts; a task's level where the prompt was a task."""
        self.record()  # whose hash tells that the file is whole
        with Path(self.path).expanduser().open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield Document(row["text"], source=self.name, level=row["level"])

    def fingerprint(self) -> str:
        """Hash of the text and of what a run pays for it."""
        return hashlib.sha256(f"generated {self.record()['sha256']} {self.share_of_seconds}".encode()).hexdigest()
