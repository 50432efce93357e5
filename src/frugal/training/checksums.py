"""Checkpoint files that are whole or not there, and that know their own checksum.

A file is written beside its place, forced to the disk and then moved there in one step, so a crash at any moment leaves
the one before. Its SHA-256 stands in the comment at the end of the archive (torch's format is zip, which allows one):
it travels with the file, and torch and zip tools read the file as any other. torch.load checks no checksum itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

from frugal.errors import UserError

META = "meta.pt"  # of a sharded checkpoint, which is a folder (frugal.training.sharded)
MARK = b"frugal sha256 "
SEAL = len(MARK) + 64  # bytes of the comment
ARCHIVE_END = 22  # bytes of a zip archive's last record, without its comment
CHUNK = 1 << 22


class _Hashing:
    """A file that hashes what is written; keeps the error that torch's writer would hide behind one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_sealed(content: Any, path: Path) -> None:
    """Save with torch, sealed, in one move.

    Raises:
        UserError: the disk is full or cannot be written; what was there before is untouched.
    """
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    hashing: _Hashing | None = None
    try:
        with temporary.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(content, hashing)  # type: ignore[arg-type]
            seal = MARK + hashing.digest.hexdigest().encode()
            file.flush()
            file.seek(-2, os.SEEK_END)  # the length of the archive's comment, 0 so far
            file.write(len(seal).to_bytes(2, "little") + seal)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else hashing.error if hashing else None
        if cause is None:
            raise
        before = f"{path} of before is untouched" if path.exists() else "there was none before"
        raise UserError(
            f"checkpoint: {path} cannot be written ({cause.strerror}); {before}; make room, then go on with "
            "--ckpt_path last"
        ) from None


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_sealed(path: Path) -> bool:
    """Whether the file ends with a checksum; of a folder of shards, the file that has theirs."""
    return _seal(path / META if path.is_dir() else path) is not None


def _seal(path: Path) -> bytes | None:
    size = path.stat().st_size
    if size < SEAL + ARCHIVE_END:
        return None
    with path.open("rb") as file:
        file.seek(size - SEAL)
        seal = file.read()
    return seal if seal.startswith(MARK) else None


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. A file without a checksum counts as good if it is complete."""
    if (path / META).is_file():
        from frugal.training.sharded import shard_damage

        return damage(path / META) or shard_damage(path)
    if not path.is_file():
        return "it is not there"
    seal = _seal(path)
    if seal is None:
        with path.open("rb") as file:
            file.seek(-min(ARCHIVE_END, path.stat().st_size), os.SEEK_END)
            end = file.read()
        complete = len(end) == ARCHIVE_END and end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")
        return None if complete else "it is cut short, or no checkpoint"
    left, digest = path.stat().st_size - SEAL - 2, hashlib.sha256()
    with path.open("rb") as file:
        while left:
            block = file.read(min(CHUNK, left))
            digest.update(block)
            left -= len(block)
    digest.update(b"\0\0")  # the length of the comment before there was one
    return None if digest.hexdigest().encode() == seal.removeprefix(MARK) else "its checksum differs"
