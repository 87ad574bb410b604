"""What a command does to the memory of its own process; the library leaves a user's as it is."""

from __future__ import annotations

import atexit
import gc
import sys
from contextlib import suppress

_USUAL = gc.get_threshold()
_RARE = 100_000
"""New objects after which Python looks for garbage while the command starts."""

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h of glibc


def collect_rarely() -> None:
    """Have Python seldom look for garbage: imports leave none, and of torch come 300,000 objects to look through."""
    gc.set_threshold(_RARE)
    atexit.register(gc.freeze)  # the process ends with a look through all that is left


def collect_as_usual() -> None:
    """Have Python look for garbage as it does again, but not in what was imported by now; before each model of many."""
    if gc.get_threshold()[0] == _RARE:
        gc.freeze()
        gc.set_threshold(*_USUAL)
    else:
        gc.collect()  # what is left of the model before: an exported program refers to itself, with its weights


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the rest of this process; elsewhere nothing is done.

    Large blocks are mapped anew for every activation of every batch, and the kernel clears each of their pages: a tenth
    to a fifth of a convolutional network's forward pass.
    """
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.mallopt(_MMAP_MAX, 0)
            library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            library.mallopt(_ARENA_MAX, 1)  # or each thread keeps memory of its own, in pieces that are handed back
