"""Runs as processes: started with their share of the machine, told to stop by signals that reach them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 75  # exit code of a run that was told to stop
RUNNING: dict[subprocess.Popen[bytes], bool] = {}  # and whether a launcher stands before it
TOLD: list[int] = []  # the signal that has told all runs to stop


def start_process(
    command: list[str],
    log_file: Path,
    threads: int | None = None,
    devices: SimpleQueue[str] | None = None,
    launcher: Sequence[str] = (),
) -> int:
    """Run one command to its end; its output goes to the log file.

    Args:
        threads: of this machine that the run may use; null leaves it to the launcher.
        devices: values of CUDA_VISIBLE_DEVICES that no run uses now; one is taken for the time.
        launcher: words before the command: a program that waits for a place, runs it there and passes signals on.
    """
    environment = {**({} if threads is None else {"OMP_NUM_THREADS": str(threads)}), **os.environ}
    command = [*launcher, *command]
    device = devices.get() if devices else None
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    try:
        with log_file.open("a", encoding="utf-8") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        RUNNING[process] = bool(launcher)
        try:
            if TOLD:  # between the check of the study and now
                tell(process, TOLD[0])
            return process.wait()
        finally:
            RUNNING.pop(process, None)
    finally:
        if devices and device is not None:
            devices.put(device)


def tell(process: subprocess.Popen[bytes], number: int) -> None:
    """Pass a signal on. Slurm's srun makes SIGKILL of SIGTERM, but hands SIGUSR1 to the run, which stops by it too."""
    process.send_signal(signal.SIGUSR1 if RUNNING.get(process) else number)
