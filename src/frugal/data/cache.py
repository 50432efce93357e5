"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frugal.errors import UserError


@contextmanager
def new_folder(folder: Path, proof: str) -> Iterator[Path]:
    """A folder to write into that becomes `folder` in one step when the block ends well, and is gone when it does not.

    So an interrupted preparation leaves nothing that a later run would trust, and two processes do not harm each
    other: the first one's result stands. What a killed process of this machine left behind is removed.

    Args:
        folder: its final place.
        proof: the file whose presence there means that all of it is there.

    Raises:
        UserError: it cannot be written, for instance because the disk is full.
    """
    host = re.sub(r"[^\w-]", "-", f"{socket.gethostname()}-{_process_namespace()}")
    temporary = folder.with_name(f"{folder.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        for left in folder.parent.glob(f"{folder.name}.{host}.*.tmp"):
            if not _runs(int(left.name.split(".")[-3])):
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / proof).is_file():
                raise  # otherwise another process was faster: its result is the same
    except OSError as error:
        # Libraries that write in their own language give a message only.
        raise UserError(f"data.cache_dir: cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _process_namespace() -> str:
    """What tells containers apart that share a host's name: each numbers its own processes."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    if sys.platform == "win32":  # where signal 0 would interrupt it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
