"""What becomes of jobs, as files and locks that every process can look at."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from frugal.launch.jobs import Job, write_whole


def lock(path: Path) -> int | None:
    """Take a file's lock; None if somebody has it. The descriptor holds the lock until it is closed everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether a process holds a file's lock."""
    if not path.is_file():
        return False
    if (descriptor := lock(path)) is None:
        return True
    os.close(descriptor)
    return False


def queue_folder(job: Job) -> Path:
    """Where the queue of this job's folder of runs lies."""
    return job.folder.parent.parent / ".queue"


def note(job: Job, state: str, **more: Any) -> None:
    """Write a job's state: waiting, running, done, failed, cancelled or stopped."""
    rank = {"priority": job.priority, "submitted": job.submitted}
    write_whole(job.place / "state.json", {"state": state, **rank, "time": time.time(), **more})


def state_of(job: Job, alive: bool = False) -> dict[str, Any]:
    """A job's state; waiting or running without a process that cares for it is `stopped`.

    Args:
        job: which.
        alive: whether Slurm knows the job still.
    """
    path = job.place / "state.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"state": "stopped"}
    if found["state"] in ("waiting", "running") and not alive and not is_locked(queue_folder(job) / job.id):
        found["state"] = "stopped"
    return found


def cancel(job: Job) -> None:
    """Take a job back: whoever holds it stops it; nobody starts it again."""
    state = state_of(job)
    (job.place / "cancelled").touch()
    if state["state"] == "stopped":
        note(job, "cancelled")
    elif state["state"] == "running":  # its launcher would see the mark too, but may be gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(state["pid"], signal.SIGTERM)
