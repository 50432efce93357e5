"""The most memory that a run needed."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak since `start`, in bytes.

    On CUDA it is what torch has allocated. On a CPU it is how far the process has grown beyond its size at the start,
    before the model is built: tensors, and what libraries allocate or load when they are first used. None where the
    system does not tell (only Linux does).
    """

    def __init__(self) -> None:
        self._before: int | None = None

    def start(self, device: torch.device) -> None:
        """Forget earlier peaks."""
        if device.type == "cuda":
            self.forget(device)
            return
        try:
            CLEAR.write_text("5")  # resets VmHWM (Linux, proc(5))
            self._before = _status("VmRSS")
        except (OSError, KeyError):
            self._before = None

    def forget(self, device: torch.device) -> None:
        """Leave out what a GPU has held for a while and given back; on a CPU it is too little to count."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self, device: torch.device) -> int | None:
        """The peak so far."""
        if device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(device))
        try:
            return None if self._before is None else max(_status("VmHWM") - self._before, 0)
        except (OSError, KeyError):
            return None

    @staticmethod
    def what(device: torch.device) -> str:
        """What `bytes` counts, in words."""
        return "allocated by torch" if device.type == "cuda" else "growth of the process, libraries included"


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[key].split()[0]) * 1024
