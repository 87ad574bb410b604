"""Reductions of values that have a column for each unit, in NumPy, block by block.

Torch goes down a few columns at a time, whose rows lie far apart in memory. What comes out here is the same on any
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from deadcheck.scratch import Scratch

Vector = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 1 << 19
"""Values of a block: 2 MiB of float32, and as much for what is computed of them."""

_WIDE = 1 << 11
"""Values in a row from which on a call per row costs little."""


class Seen(NamedTuple):
    """What is asked of every input, per unit."""

    peaks: Vector
    """Largest value in each sample, shape (samples, units); in all samples, where they have one position."""

    least: Vector
    positive: Vector
    """How many values are above 0."""


class Measured(NamedTuple):
    """What is asked of every output, per unit; without meaning where it was not asked."""

    low: Vector
    high: Vector
    total: Vector
    absolute: Vector
    """Sum of the absolute values."""

    squares: Vector
    zeros: Vector
    """How many values are 0."""


class Columns:
    """The values of a call whose units are last in memory, or whose samples have one position."""

    def __init__(self, x: Tensor, n_units: int, positions: int, scratch: Scratch) -> None:
        self._n_units = n_units
        self._positions = positions
        self._rows: Vector = x.view(-1, n_units).numpy()
        """Shape (samples * positions, units)."""

        self._scratch = scratch

    @np.errstate(over="ignore", invalid="ignore")
    def seen(self, on: Vector, *, with_nan: bool = False) -> Seen:
        """Go once over inputs; where samples have one position, set ``on``, (samples, units), to what is above 0.

        Peaks and the least value are those of the numbers, infinities too, where NaN is expected, else NaN.
        """
        top, bottom = (np.fmax, np.fmin) if with_nan else (np.maximum, np.minimum)
        peaks, lows, positive = list[Vector](), list[Vector](), np.zeros(self._n_units, np.int64)
        is_single, work = self._positions == 1, self._work(bool)
        for first, rows in self._blocks():
            block = self._rows[rows]
            peak = _over_rows(top, block)[None] if is_single else _over_positions(top, self._split(block))
            if peaks and (is_single or rows.start > first * self._positions):
                top(peaks[-1], peak, out=peaks[-1])
            else:
                peaks.append(peak)
            lows.append(_over_rows(bottom, block))
            add_up(np.greater(block, 0, out=on[rows] if is_single else _like(block, work)), positive)
        peak, least = peaks[0] if len(peaks) == 1 else np.concatenate(peaks), _among(bottom, lows)
        if with_nan:
            peak[np.isnan(peak)], least[np.isnan(least)] = -np.inf, np.inf
        return Seen(peak, least, positive)

    def nan(self) -> Vector:
        """Count NaN per unit."""
        return self._number(lambda block, out: np.isnan(block, out=out))

    def is_bad(self) -> Vector:
        """Return where values are NaN or infinite, shape (samples * positions, units)."""
        bad: Vector = ~np.isfinite(self._rows)
        return bad

    def number(self, compare: np.ufunc, border: float) -> Vector:
        """Count per unit the values for which a comparison holds."""
        return self._number(lambda block, out: compare(block, border, out=out))

    def see_above(self, border: float, on: Vector) -> None:
        """Set ``on``, shape (samples, units), to what is above a border; samples have one position."""
        np.greater(self._rows, border, out=on)

    def see_between(self, low: float, high: float, on: Vector) -> None:
        """Set ``on``, shape (samples, units), to where a value was between two others."""
        on[:] = False
        work = self._work(bool)
        for first, rows in self._blocks():
            block = self._rows[rows]
            is_between = np.greater(block, low, out=_like(block, work))
            np.logical_and(is_between, block < high, out=is_between)
            within = np.logical_or.reduce(self._split(is_between), axis=1)
            on[first : first + len(within)] |= within

    @np.errstate(over="ignore", invalid="ignore")
    def measured(self, *, ends: bool, sums: bool, zeros: bool) -> Measured:
        """Go once over outputs; where their ends are not asked, none is below 0."""
        lows, highs = list[Vector](), list[Vector]()
        total, absolute, squares = np.zeros((3, self._n_units))
        number, work, sizes = np.zeros(self._n_units, np.int64), self._work(bool), self._work(self._rows.dtype)
        for _, rows in self._blocks():
            block, least = self._rows[rows], 0.0
            if ends:
                highs.append(_over_rows(np.maximum, block))
                lows.append(_over_rows(np.minimum, block))
                least = lows[-1].min()
            if sums:
                added = _over_rows(np.add, block)
                total += added
                squares += _over_rows(np.add, block, squared=True)
                if least < 0:
                    size = np.abs(block, out=_like(block, sizes))
                    added = _over_rows(np.add, size)
                    least = size.min() if zeros else 0.0
                absolute += added
            if zeros and least <= 0:
                add_up(np.equal(block, 0, out=_like(block, work)), number)
        low, high = (_among(np.minimum, lows), _among(np.maximum, highs)) if ends else (total, total)
        return Measured(low, high, total, absolute, squares, number)

    @np.errstate(over="ignore", invalid="ignore")
    def measured_beside(self, bad: Vector) -> Measured:
        """Go once over outputs; sums, in float64, leave out what is ``bad``, and ends leave out NaN."""
        lows, highs = list[Vector](), list[Vector]()
        total, absolute, squares = np.zeros((3, self._n_units))
        number, work, finite = np.zeros(self._n_units, np.int64), self._work(bool), self._work(np.float64)
        for _, rows in self._blocks():
            block = self._rows[rows]
            highs.append(_over_rows(np.fmax, block))
            lows.append(_over_rows(np.fmin, block))
            add_up(np.equal(block, 0, out=_like(block, work)), number)
            good = _like(block, finite)
            good[:] = block
            np.copyto(good, 0.0, where=bad[rows])
            total += _over_rows(np.add, good)
            squares += _over_rows(np.add, good, squared=True)
            absolute += _over_rows(np.add, np.abs(good, out=good))
        low, high = _among(np.fmin, lows), _among(np.fmax, highs)
        low[np.isnan(low)], high[np.isnan(high)] = np.inf, -np.inf
        return Measured(low, high, total, absolute, squares, number)

    def _number(self, holds: Callable[[Vector, Vector], Vector]) -> Vector:
        total, work = np.zeros(self._n_units, np.int64), self._work(bool)
        for _, rows in self._blocks():
            block = self._rows[rows]
            add_up(holds(block, _like(block, work)), total)
        return total

    def _work(self, dtype: Any) -> Vector:
        """Return memory for a block."""
        return self._scratch.blank(max(_BLOCK, self._n_units), dtype)

    def _split(self, block: Vector) -> Vector:
        """Return a block in the shape (samples, positions, units)."""
        return block.reshape(-1, min(len(block), self._positions), self._n_units)

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        """Yield the first sample and the rows of each block: some whole samples, or a part of one."""
        positions, end = self._positions, len(self._rows)
        at_most = _power_of_two(_BLOCK // self._n_units)
        step = _power_of_two(at_most // positions)
        length = min(at_most, step * positions)
        for first in range(0, end // positions, step):
            stop = min((first + step) * positions, end)
            for start in range(first * positions, stop, length):
                yield first, slice(start, min(start + length, stop))


def add_up(on: Vector, total: Vector) -> None:
    """Add to a total per unit, int64, where it is true, shape (some, units)."""
    if not on.size:
        return
    fold = _fold(*on.shape)
    wide = on.view(np.uint8).reshape(-1, fold * len(total))
    for start in range(0, len(wide), 255):  # a byte holds no more
        part = np.add.reduce(wide[start : start + 255], axis=0, dtype=np.uint8)
        total += part if fold == 1 else part.reshape(fold, -1).sum(0, dtype=np.int64)


def _among(by: np.ufunc, parts: list[Vector]) -> Vector:
    out: Vector = parts[0] if len(parts) == 1 else by.reduce(parts)
    return out


def _like(block: Vector, work: Vector) -> Vector:
    like: Vector = work[: block.size].reshape(block.shape)
    return like


def _power_of_two(at_most: int) -> int:
    return 1 << max(0, at_most.bit_length() - 1)


def _fold(rows: int, units: int) -> int:
    """Return how many rows to put side by side, as a call per short row would take longer than what is in it."""
    return min(rows & -rows, _power_of_two(min(_WIDE // units, rows // 8)))


def _over_rows(by: np.ufunc, block: Vector, *, squared: bool = False) -> Vector:
    """Reduce rows, or their squares, shape (units,)."""
    rows, units = block.shape
    fold = _fold(rows, units)
    wide = block.reshape(-1, fold * units)
    out: Vector = np.einsum("ru,ru->u", wide, wide) if squared else by.reduce(wide, axis=0)
    if fold > 1:
        out = by.reduce(out.reshape(fold, units), axis=0)
    return out


def _over_positions(by: np.ufunc, block: Vector) -> Vector:
    """Reduce values of the shape (samples, positions, units) over the positions."""
    samples, positions, units = block.shape
    fold = _fold(positions, units)
    out: Vector = by.reduce(block.reshape(samples, -1, fold * units), axis=1)
    if fold > 1:
        out = by.reduce(out.reshape(samples, fold, units), axis=1)
    return out
