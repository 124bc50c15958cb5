"""What a sequence of allocations costs the process: the same sizes asked of the same allocator, and never touched.

Tensors that are alive at once are not all that a process needs: blocks of many sizes leave holes between them. A block
that nobody writes to costs no memory, so the allocator itself can be asked how far its heap would grow.
"""

from __future__ import annotations

import ctypes
import os

ALIGNMENT = 64  # of torch's tensors on a processor
WORTH_LOOKING = 1 << 20  # bytes; only larger blocks move the heap's size enough to look at it


FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


class Heap:
    """glibc's heap, asked for blocks that stay untouched; `growth` is by how many bytes it has grown at most.

    Without glibc (2.33 or later) `growth` is what was alive at once. Every block has a number.
    """

    def __init__(self) -> None:
        self._libc = _glibc()
        self._blocks: dict[int, tuple[ctypes.c_void_p | None, int]] = {}
        self._next = self._alive = 0
        self._size_at_start = self._size()
        self.growth = 0

    def take(self, size: int) -> int:
        """A block of `size` bytes; its number."""
        self._next += 1
        self._alive += size
        block = None
        if self._libc is not None and size:
            block = ctypes.c_void_p()
            if self._libc.posix_memalign(ctypes.byref(block), ALIGNMENT, size):
                block = None  # more than the system gives to anybody: then only `alive` tells
        self._blocks[self._next] = (block, size)
        if size >= WORTH_LOOKING:
            self.growth = max(self.growth, self._alive, self._size() - self._size_at_start)
        return self._next

    def give_back(self, number: int) -> None:
        """Free a block."""
        block, size = self._blocks.pop(number, (None, 0))  # nothing, after `close`
        self._alive -= size
        if block is not None:
            assert self._libc is not None
            self._libc.free(block)

    def close(self) -> None:
        """Give everything back."""
        for number in list(self._blocks):
            self.give_back(number)

    def _size(self) -> int:
        if self._libc is None:
            return 0
        info = self._libc.mallinfo2()
        return info.arena + info.hblkhd


def _glibc() -> ctypes.CDLL | None:
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _Mallinfo
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc
