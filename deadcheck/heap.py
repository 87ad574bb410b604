"""Keeps the C library from handing memory back between two forward passes, only to ask for it again."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the rest of this process; elsewhere nothing is done.

    Large blocks are mapped anew for every activation of every batch, and the kernel clears each of their pages: a tenth
    to a fifth of a convolutional network's forward pass. For a process of our own; a user's keeps its allocator.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            library.mallopt(_ARENA_MAX, 1)  # or each thread keeps memory of its own, in pieces that are handed back
