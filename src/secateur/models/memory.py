"""Keep the process at one block of memory: what is dropped goes back to the system (done for glibc only)."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 4 << 20


def large_tensors_apart() -> None:
    """Have glibc map every large tensor by itself, so that a dropped one's memory goes back to the system.

    By default it keeps up to 32 MiB at a time in its heap, in whose holes peak memory grows with depth.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back_memory() -> None:
    """Hand the heap's free pages back to the system."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
