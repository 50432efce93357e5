"""Energy as the machine itself counts it: NVIDIA's NVML for GPUs, RAPL for the processor's packages.

Both are running totals, so joules are a difference of two readings; nothing samples in the background. Neither torch
nor Lightning is needed here.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class EnergyCounter(Protocol):
    """Something that counts joules."""

    name: str

    def joules(self) -> float:
        """Joules since the last call; the first call counts from when the counter was made."""

    def watts(self) -> float:
        """What is drawn now; zero where only totals are counted."""


class Rapl:
    """All processor packages of the machine, whatever else runs on them (Linux powercap, Intel and AMD).

    Args:
        root: the powercap folder.

    Raises:
        OSError: there is no package there, or its counter may not be read.
    """

    name = "RAPL, all of this machine's processor packages"

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it that the package's count includes.
        self.packages = [path for path in sorted(root.glob("intel-rapl:*")) if path.name.count(":") == 1]
        self.packages = [p for p in self.packages if _text(p / "name").startswith("package")]
        if not self.packages:
            raise FileNotFoundError(f"no processor package under {root}")
        self._range = [int(_text(path / "max_energy_range_uj")) for path in self.packages]
        self._last = self._read()

    def _read(self) -> list[int]:
        return [int(_text(path / "energy_uj")) for path in self.packages]

    def joules(self) -> float:
        """Since the last call; a counter that has started again from zero is put right."""
        last, self._last = self._last, self._read()
        return self._joules(last, self._last)

    def _joules(self, before: list[int], after: list[int]) -> float:
        return sum((a - b) % (size + 1) for a, b, size in zip(after, before, self._range, strict=True)) / 1e6

    def watts(self) -> float:
        """Over a twentieth of a second in which one core is busy, as it is while a program starts."""
        before, began = self._read(), time.perf_counter()
        while time.perf_counter() - began < 0.05:
            pass
        return self._joules(before, self._read()) / (time.perf_counter() - began)


class Nvml:
    """Some GPUs of this machine, Volta or newer.

    Args:
        uuids: which, as `torch.cuda.get_device_properties(i).uuid` names them.
        library: the module `pynvml` of the package nvidia-ml-py.

    Raises:
        Exception: whatever NVML says where it is missing or the GPU does not count energy.
    """

    def __init__(self, uuids: Sequence[str], library: Any) -> None:
        self.library = library
        library.nvmlInit()
        self.handles = [
            library.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}") for uuid in uuids
        ]
        self.name = f"NVML, {len(self.handles)} GPU(s)"
        self._last = self._read()

    def _read(self) -> int:
        return sum(self.library.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self.handles)

    def joules(self) -> float:
        """Since the last call; NVML counts millijoules since its driver was loaded."""
        last, self._last = self._last, self._read()
        return (self._last - last) / 1e3

    def watts(self) -> float:
        """Of all of them, over the last second or less; zero where one does not tell."""
        try:
            return sum(self.library.nvmlDeviceGetPowerUsage(handle) for handle in self.handles) / 1e3
        except Exception:
            return 0.0


def open_counters(uuids: Sequence[str] = (), root: Path = POWERCAP, library: Any = None) -> list[EnergyCounter]:
    """The counters that work here: NVML for the GPUs in use, RAPL for the processors; without any, an empty list.

    A run on GPUs that NVML cannot count gets none: the processors alone would pass for all of it.
    """
    counters: list[EnergyCounter] = []
    if uuids:
        try:
            counters.append(Nvml(uuids, library or importlib.import_module("pynvml")))
        except Exception:
            return []
    with contextlib.suppress(OSError, ValueError):  # no such folder, or it is readable by root only
        counters.append(Rapl(root))
    return counters


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()
