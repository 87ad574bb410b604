"""The count of one site by torch and NumPy, for where the compiled kernel is not built or takes another type.

Counts are exact: comparisons are summed in bytes, or in the type of the values over fewer than 2**24 at a time. What is
left to do with a number per unit is done in NumPy: right after a layer, whose work has emptied the processor's caches,
an operator of torch takes 40 to 90 microseconds however little it has to do, and a call into NumPy a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deadcheck.activations import Activation
from deadcheck.columns import Columns, Measured, Seen, Vector, add_up
from deadcheck.kernel import TINY
from deadcheck.scratch import Scratch
from deadcheck.sites import Family

_BLOCK = 1 << 20
"""Values that are compared or squared at a time: 4 MiB of float32, so that what came out is in a cache for its sum."""

_MOST_POSITIONS = 1 << 24
"""Positions of a sample from which on a float32 does not hold their number exactly."""

_TORCH: dict[np.ufunc, Callable[..., Tensor]] = {
    np.greater: torch.gt, np.greater_equal: torch.ge, np.less_equal: torch.le, np.equal: torch.eq,
}  # fmt: skip


class _Lines:
    """The values of a call with a line of positions for each unit of each sample; see ``Columns``.

    What comes of a reduction of its lines has the shape (samples, units).
    """

    def __init__(self, x: Tensor, n_units: int, positions: int, scratch: Scratch) -> None:
        self._x = x.view(-1, n_units, positions)
        self._lines = x.view(-1, positions)
        self._n_units = n_units
        self._scratch = scratch

    def seen(self, on: Vector) -> Seen:
        """Return what is asked of every input."""
        return Seen(self._peaks(), self._least(), self.number(np.greater, 0.0))

    def number(self, compare: np.ufunc, border: float) -> Vector:
        """Count per unit the values for which a comparison holds."""
        with_torch = _TORCH[compare]
        number = self._summed(with_torch(block, border, out=self._work(block)) for block in self._blocks())
        return number.astype(np.int64)

    def see_above(self, border: float, on: Vector) -> None:
        """Set ``on``, shape (samples, units), to where a value was above a border."""
        np.greater(self._peaks(), border, out=on)

    def see_between(self, low: float, high: float, on: Vector) -> None:
        """Set ``on``, shape (samples, units), to where a value was between two others."""
        torch.any((self._x > low) & (self._x < high), 2, out=torch.from_numpy(on))

    def measured(self, *, ends: bool, sums: bool, zeros: bool) -> Measured:
        """Return what is asked of every output; where its ends are not asked, it is not negative."""
        nothing = np.zeros(self._n_units)
        low, high = (self._least(), self._peaks().max(0)) if ends else (nothing, nothing)
        total, squares = self.moments() if sums else (nothing, nothing)
        absolute = total
        if sums and low.min() < 0:
            absolute = self._summed(torch.abs(block, out=self._work(block)) for block in self._blocks())
        number = self.number(np.equal, 0.0) if zeros else nothing
        return Measured(low, high, total, absolute, squares, number)

    def moments(self, dtype: torch.dtype | None = None) -> tuple[Vector, Vector]:
        """Return the sum and the sum of squares per unit, in float64; computed in another type if it is given.

        The backward of batch norm with mean 0 and deviation 1 computes both in one pass over the memory.
        """
        x = self._x.to(dtype or self._x.dtype)
        _, square, plain = torch.ops.aten.native_batch_norm_backward.default(
            x, x, None, None, None, *_zeros_ones(self._n_units, x.dtype), True, 0.0, [False, True, True]
        )
        return plain.double().numpy(), square.double().numpy()

    def _peaks(self) -> Vector:
        peaks: Vector = self._lines.amax(1).numpy().reshape(-1, self._n_units)
        return peaks

    def _least(self) -> Vector:
        least: Vector = self._lines.amin(1).numpy().reshape(-1, self._n_units).min(0)
        return least

    def _blocks(self) -> Iterator[Tensor]:
        """Yield the values in blocks of whole lines."""
        lines = max(1, _BLOCK // self._lines.shape[1])
        yield from self._lines.split(lines) if lines < len(self._lines) else (self._lines,)

    def _work(self, like: Tensor) -> Tensor:
        """Return memory of the shape of a block."""
        blank = self._scratch.blank(like.numel(), np.float32 if like.dtype == torch.float32 else np.float64)
        return torch.from_numpy(blank.reshape(like.shape))

    def _summed(self, blocks: Iterator[Tensor]) -> Vector:
        """Sum blocks per unit, in float64, and the same on any number of threads."""
        # A sum to one number alone is what torch divides among its threads.
        sums = [block.numpy().sum(1) if len(block) == 1 else block.sum(1).numpy() for block in blocks]
        total: Vector = np.concatenate(sums).reshape(-1, self._n_units).sum(0, dtype=np.float64)
        return total


@lru_cache(1024)
def _zeros_ones(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, dtype=dtype, device="cpu"), torch.ones(n, dtype=dtype, device="cpu")


class TorchKernel:
    """Counts the calls of one site into totals that stay where they are, as ``kernel.Kernel`` does.

    It takes float32 and float64 on a CPU, and in columns also what is not finite.
    """

    def __init__(
        self, activation: Activation, totals: Mapping[str, Tensor], scratch: Scratch, level: str = "full"
    ) -> None:
        self._act = activation
        self._totals = {name: total.numpy() for name, total in totals.items()}
        self._n_units = len(totals["zeros"])
        self._scratch = scratch
        self._level = level
        self._has_border = activation.family not in (Family.SQUASHING, Family.NONZERO)
        """Whether a unit is on where its input is above a border."""
        self._is_zero_below = activation.low == 0 and activation.high > TINY
        """Whether an output is 0 exactly where the input is not above 0."""
        self._positive = np.zeros(0, np.int64)
        """Inputs above 0 per unit in the call whose output comes next."""
        self._range = self._positive, self._positive
        """Least and largest input per unit in that call."""
        self._bad: Vector | None = None
        """Where its input was not finite, shape (samples * positions, units); None for nowhere."""

    def count_input(
        self, z: Tensor, rows: int, positions: int, unfired: Tensor | None, on: Tensor, *, units_last: bool
    ) -> bool:
        """Count an input and set ``on``, shape (rows, units), to what was on; return True.

        ``z`` is contiguous, of shape (rows, units, positions), or (rows, positions, units). Its moments are summed for
        the units that are ``unfired``, and not on in it.
        """
        act, fires = self._act, on.numpy()
        values = self._values(z, positions, units_last=units_last)
        peaks, least, positive = values.seen(fires)
        nan, self._bad = np.zeros(self._n_units, np.int64), None
        if not (math.isfinite(least.min()) and math.isfinite(peaks.max())):
            values = self._columns(z, positions, units_last=units_last)
            peaks, least, positive = values.seen(fires, with_nan=True)
            nan, self._bad = values.nan(), values.is_bad()
        high = peaks.max(0)
        lowest, highest = float(least.min()), float(high.max())
        self._extend("input", least, high)
        if act.family is Family.SQUASHING and lowest > act.low and highest < act.high and not nan.any():
            fires[:] = True
        elif act.family is Family.SQUASHING:
            values.see_between(act.low, act.high, fires)
        elif positions > 1:
            np.greater(peaks, act.on, out=fires)
        elif act.on != 0:
            values.see_above(act.on, fires)
        self._positive, self._range = positive, (least, high)
        self._totals["positive"] += positive
        if act.low == 0:
            self._totals["flat"] += rows * positions - positive - nan
        elif act.low > -math.inf and lowest <= act.low:
            self._totals["flat"] += values.number(np.less_equal, act.low)
        if act.high < math.inf and highest >= act.high:
            # A ceiling that rounds to 0 would count zeros on both sides.
            ceiling = max(act.high, 2.0**-149) if act.low == 0 and z.dtype == torch.float32 else act.high
            self._totals["flat"] += values.number(np.greater_equal, ceiling)
        if unfired is not None and self._has_border:
            silent = unfired.numpy() & ~fires.any(0)
            self._totals["silent_input_sum"][silent & (nan > 0)] = math.nan
            self._totals["silent_input_square_sum"][silent & (nan > 0)] = math.nan
            self._sum_silent(z, positions, silent & (nan == 0), units_last=units_last)
        return True

    def count_output(self, h: Tensor, rows: int, positions: int, *, units_last: bool, knows_input: bool = True) -> bool:
        """Count the output of the call whose input was counted last, by this one if it ``knows_input``; return True."""
        bad = self._bad if knows_input else None
        got: Measured | None = None
        if bad is None:
            got = self._measured(h, rows, positions, units_last=units_last, knows_input=knows_input)
        if got is None:
            columns = self._columns(h, positions, units_last=units_last)
            is_bad = columns.is_bad()
            got = columns.measured_beside(is_bad)
            add_up(is_bad if bad is None else is_bad | bad, self._totals["nonfinite"])
        self._extend("output", got.low, got.high)
        if self._level != "counts":
            self._totals["output_sum"] += got.total
            self._totals["output_abs_sum"] += got.absolute
            self._totals["output_square_sum"] += got.squares
        self._totals["zeros"] += got.zeros
        if self._act.family is Family.NONZERO:
            self._totals["flat"] += got.zeros
        return True

    def _measured(
        self, h: Tensor, rows: int, positions: int, *, units_last: bool, knows_input: bool
    ) -> Measured | None:
        """Measure an output; None where a value is not finite, or a sum of squares."""
        act, values = self._act, self._values(h, positions, units_last=units_last)
        if self._level == "verdict" and isinstance(values, Columns):
            # The more units are settled, the fewer are counted.
            values = self._copied(h, positions, slice(None), units_last=units_last)
        is_zero_below = self._is_zero_below and knows_input
        follows = act.family is Family.RECTIFIER and act.low == 0 and is_zero_below
        got = values.measured(ends=not follows, sums=self._level != "counts", zeros=not is_zero_below)
        if follows:
            got = got._replace(low=np.maximum(self._range[0], 0), high=np.maximum(self._range[1], 0))
        if is_zero_below:
            got = got._replace(zeros=rows * positions - self._positive)
        is_finite = all(math.isfinite(end) for end in (got.low.min(), got.high.max(), got.squares.sum()))
        return got if is_finite else None

    def _extend(self, side: str, low: Vector, high: Vector) -> None:
        least, most = self._totals[f"{side}_min"], self._totals[f"{side}_max"]
        np.minimum(least, low, out=least)
        np.maximum(most, high, out=most)

    def _values(self, x: Tensor, positions: int, *, units_last: bool) -> Columns | _Lines:
        # Where samples have one position it is the same memory, and lines of 1 are slow.
        if units_last or positions == 1 or positions >= _MOST_POSITIONS:
            return self._columns(x, positions, units_last=units_last)
        return _Lines(x, self._n_units, positions, self._scratch)

    def _columns(self, x: Tensor, positions: int, *, units_last: bool) -> Columns:
        if not units_last and positions > 1:
            x = x.view(-1, self._n_units, positions).transpose(1, 2).contiguous()
        return Columns(x, self._n_units, positions, self._scratch)

    def _copied(self, x: Tensor, positions: int, index: Any, *, units_last: bool) -> _Lines:
        """Return a copy with lines for each unit, of all units or those chosen.

        The sum of a line is always the same; that of a column depends on how many are beside it.
        """
        if units_last or positions == 1:
            units = x.view(-1, positions, self._n_units).transpose(1, 2)[:, index]
        else:
            units = x.view(-1, self._n_units, positions)[:, index]
        units = units.permute(2, 1, 0) if positions == 1 else units
        return _Lines(units.contiguous(), units.shape[1], units.shape[2], self._scratch)

    def _sum_silent(self, z: Tensor, positions: int, silent: Vector, *, units_last: bool) -> None:
        """Add the input's moments for silent units: only their depth is ever asked for."""
        index = silent.nonzero()[0]
        if not len(index):
            return
        values = self._copied(z, positions, torch.from_numpy(index), units_last=units_last)
        total, squares = values.moments()
        if not math.isfinite(float(squares.sum())):  # a square beyond float32
            total, squares = values.moments(torch.float64)
        self._totals["silent_input_sum"][index] += total
        self._totals["silent_input_square_sum"][index] += squares


def fire(on: Tensor, first_sample: int, fired: Tensor, first_fired: Tensor, unfired: Tensor) -> bool:
    """Add a batch, shape (samples, units), to the samples fired; return whether a unit is still unfired."""
    seen, silent, total = on.numpy(), unfired.numpy(), fired.numpy()
    counts = np.zeros_like(total)
    add_up(seen, counts)
    total += counts
    newly = (silent & (counts > 0)).nonzero()[0]
    if len(newly):
        first_fired.numpy()[newly] = seen[:, newly].argmax(0) + first_sample
        silent[newly] = False
    return bool(silent.any())


def settle(batch: Tensor, sums: Tensor, rest: Tensor) -> None:
    """Add the sums of a batch to the totals, and what rounding drops to the rest; clear the batch."""
    a, b, dropped = sums.numpy(), batch.numpy(), rest.numpy()
    with np.errstate(invalid="ignore"):
        total = a + b
        back = total - a
        low = (a - (total - back)) + (b - back)  # Knuth's two-sum
    np.copyto(low, 0.0, where=~np.isfinite(low))
    dropped += low
    a[:], b[:] = total, 0.0
