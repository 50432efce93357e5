"""How the process treats freed memory."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it after every step.

    A training step allocates and frees the same large blocks again and again; handing each back to the kernel costs
    tens of thousands of page faults a step on a CPU.
    """
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap
        except OSError:
            pass  # another C library
