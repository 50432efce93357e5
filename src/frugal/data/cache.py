"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frugal.errors import UserError


@contextmanager
def new_folder(folder: Path, proof: str) -> Iterator[Path]:
    """A folder to write into that becomes `folder` in one step when the block ends well, and is gone when it does not.

    So an interrupted preparation leaves nothing that a later run would trust, and two processes do not harm each
    other: the first one's result stands.

    Args:
        folder: its final place.
        proof: the file whose presence there means that all of it is there.

    Raises:
        UserError: it cannot be written, for instance because the disk is full.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / proof).is_file():
                raise  # otherwise another process was faster: its result is the same
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
