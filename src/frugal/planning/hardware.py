"""Rows of configs/hardware.yaml: what a device can do and what it costs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from frugal.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """One row of the hardware table.

    Args:
        name: how the row is called.
        match: whole words of the device's own name that choose this row.
        per_core: watts and dollars count per CPU core.
        watts: power under training load.
        dollars_per_hour: price of one device (or core) hour.
        memory_gib: device memory.
        bandwidth_gb_s: device memory bandwidth.
        link_gb_s: what a device can send to others of its machine, and receive at the same time.
        network_gb_s: the same to devices of other machines.
        per_machine: devices of one machine.
        peak_tflops: dense matrix products by precision.
        source: where the figures come from.
        date: when they were looked up.
    """

    name: str
    watts: float
    dollars_per_hour: float
    source: str
    date: str
    match: list[str] = field(default_factory=list)
    per_core: bool = False
    memory_gib: float | None = None
    bandwidth_gb_s: float | None = None
    link_gb_s: float | None = None
    network_gb_s: float | None = None
    per_machine: int = 8
    peak_tflops: dict[str, float] = field(default_factory=dict)

    def between(self, devices: int) -> float | None:
        """Bytes a second that each of so many devices can send: the slowest link of their ring; None if unknown."""
        link = self.link_gb_s if devices <= self.per_machine else self.network_gb_s
        return link and link * 1e9

    def joules(self, seconds: float, units: int) -> float:
        """Estimated energy of `units` devices (or cores) over `seconds`."""
        return self.watts * units * seconds

    def dollars(self, seconds: float, units: int) -> float:
        """Price of `units` devices (or cores) over `seconds`."""
        return self.dollars_per_hour * units * seconds / 3600

    def assumption(self, units: int) -> str:
        """The figures in words, for whoever reads the estimate."""
        unit = "core" if self.per_core else "device"
        return f"{self.name}: {self.watts:g} W and ${self.dollars_per_hour:g}/h per {unit}, {units} {unit}(s)"


def load_hardware(path: str) -> list[Hardware]:
    """Read the table; a missing file or a bad row is a UserError that names it."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"cost.hardware_file: no file {path}")
    rows = []
    for i, row in enumerate(yaml.safe_load(file.read_text(encoding="utf-8"))["rows"]):
        try:
            rows.append(Hardware(**{**row, "date": str(row.get("date", ""))}))
        except TypeError as error:
            raise UserError(f"{path}: row {i + 1} ({row.get('name', '?')}): {error}") from None
    return rows


def choose_hardware(
    rows: list[Hardware], device_name: str, wanted: str = "auto", key: str = "cost.hardware"
) -> Hardware | None:
    """The row called `wanted`, or for `auto` the one that matches the device's name; None if none does.

    Raises:
        UserError: no row is called `wanted`, which `key` has.
    """
    if wanted != "auto":
        named = [row for row in rows if row.name == wanted]
        if not named:
            raise UserError(f"{key}: no row {wanted!r}; there are {', '.join(row.name for row in rows)}")
        return named[0]
    matching = [row for row in rows if any(re.search(rf"\b{part}\b", device_name, re.I) for part in row.match)]
    return matching[0] if matching else None


def achieved_flops(row: Hardware, precision: str, mfu: float, tflops: float | None = None) -> tuple[float | None, str]:
    """FLOP/s that training is assumed to achieve, and the assumption in words; None for a row without that peak."""
    name = row.name
    if tflops is not None:
        if tflops <= 0:
            raise UserError(f"tflops: must be positive, got {tflops}")
        return tflops * 1e12, f"{tflops:g} TFLOP/s achieved, as given"
    if precision not in row.peak_tflops:
        known = ", ".join(row.peak_tflops) or "none"
        return None, f"unknown, {name} has no peak for {precision} (it has {known}); give --tflops"
    return row.peak_tflops[precision] * 1e12 * mfu, f"{name}, {mfu:.0%} of its {precision} peak assumed for every shape"
