"""Keeps freed memory in the process: large tensors come and go every step, and fresh pages cost more than the work."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BELOW = 1 << 30  # bytes; larger blocks still go back to the system at once


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse freed blocks up to 1 GiB instead of returning them; True where it has heard it.

    With its defaults every tensor above 32 MiB is mapped anew and cleared page by page by the kernel.
    """
    if not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BELOW)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BELOW))
