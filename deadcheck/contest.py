"""Tells which of two ways to run batches takes less time, by running some each way in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

GAIN = 0.97
"""Share of the time that batches take one after the other in which they have to run together to go on like that."""

_WARM, _FEW = 4, 8
"""Batches together after which the time is taken, since each thread has things to set up, and over how many."""

_ALONE = 4
"""Batches one after the other, of which the first is not timed."""

_TURN = _WARM + 1 + _FEW + _ALONE
_TURNS = 2
"""How often each way has its turn: other work on the machine, or memory that is new to the process, slows one."""


class Contest:
    """Lets batches run together and one after the other in turn, and then the way that took less time."""

    def __init__(self) -> None:
        self._number = 0
        self._started = self._together = 0.0
        self._alone: list[float] = []

    @property
    def is_together(self) -> bool:
        """Whether the next batch is to run together with others."""
        if self._number < _TURN * _TURNS:
            return self._number % _TURN < _TURN - _ALONE
        return self._together / (_FEW * _TURNS) < statistics.median(self._alone) * GAIN

    def started_together(self) -> None:
        """Note that a batch was started, and that all but those which run beside it are done."""
        place, now = self._number % _TURN, time.monotonic()
        if self._number < _TURN * _TURNS:
            if place == _WARM:
                self._started = now
            elif place == _WARM + _FEW:
                self._together += now - self._started
            self._number += 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Time a batch that runs by itself."""
        started = time.monotonic()
        yield
        if self._number < _TURN * _TURNS:
            if self._number % _TURN > _TURN - _ALONE:
                self._alone.append(time.monotonic() - started)
            self._number += 1
