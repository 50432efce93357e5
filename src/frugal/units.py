"""Numbers for the eye."""

from __future__ import annotations


def short(value: float, unit: str = "") -> str:
    """Four significant digits with a decimal prefix: 3868928 -> '3.869M'."""
    for factor, prefix in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{' ' if unit else ''}{prefix}{unit}"
    return f"{value:.4g}{' ' + unit if unit else ''}"


def duration(seconds: float) -> str:
    """Seconds as '5 min 12 s', '2 h 03 min' or '56 d 17 h'."""
    total = round(seconds)
    if total >= 3 * 86400:
        return f"{total // 86400:,} d {total % 86400 // 3600:02d} h"
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 60} min {total % 60:02d} s" if total >= 60 else f"{seconds:.1f} s"


def gib(size: float) -> str:
    """Bytes as '1.25 GiB', or MiB below 128 of them."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"
