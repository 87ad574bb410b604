"""The count of one site in torch's fastest operators, for where the compiled kernel is not built or takes another type.

Counts are exact: comparisons are summed in the type of the values, over fewer than 2**24 at a time. What is left to do
with a number per unit is done in NumPy: right after a layer, whose work has emptied the processor's caches, an operator
of torch takes 40 to 90 microseconds however little it has to do, and a call into NumPy a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deadcheck.activations import Activation
from deadcheck.kernel import TINY
from deadcheck.sites import Family

_BLOCK = 1 << 20
"""Values that are compared or squared at a time: 4 MiB of float32, so that what came out is in a cache for its sum."""

_MOST_POSITIONS = 1 << 24
"""Positions of a sample from which on a float32 does not hold their number exactly."""

Scratch = dict[torch.dtype, Tensor]
"""Work memory shared by the sites of one scan."""

Vector = np.ndarray[Any, np.dtype[Any]]


class _Values:
    """The values of a call as a matrix: a row of positions for each unit of each sample, or a column for each unit.

    What comes of a reduction of its rows, or of its columns, has the shape (some, units).
    """

    def __init__(self, x: Tensor, n_units: int, positions: int, *, units_last: bool) -> None:
        self.units_last = units_last or positions == 1  # the same memory, and rows of 1 are slow
        self.n_units = n_units
        self.positions = positions
        self.matrix = x.view(-1, n_units if self.units_last else positions)
        self.over = 0 if self.units_last else 1
        """Axis that reductions go over."""

    @property
    def by_sample(self) -> Tensor:
        """The values in the shape (samples, positions, units)."""
        if self.units_last:
            return self.matrix.view(-1, self.positions, self.n_units)
        return self.matrix.view(-1, self.n_units, self.positions).transpose(1, 2)

    def in_rows(self, index: Tensor | None = None) -> _Values:
        """Return a copy with rows for each unit, of all units or those chosen.

        The sum of a row is always the same; that of a column depends on the columns beside it.
        """
        units = self.by_sample.transpose(1, 2)
        units = units if index is None else units.index_select(1, index)
        units = units.permute(2, 1, 0) if self.positions == 1 else units
        return _Values(units.contiguous(), units.shape[1], units.shape[2], units_last=False)

    def peaks(self) -> Vector:
        """Return the largest value of each unit in each sample; in all samples where they have one position."""
        if self.units_last and self.positions > 1:
            return self.matrix.view(-1, self.positions, self.n_units).amax(1).numpy()
        return self.matrix.amax(self.over).numpy().reshape(-1, self.n_units)

    def least(self) -> Vector:
        """Return the least value of each unit."""
        least: Vector = self.matrix.amin(self.over).numpy().reshape(-1, self.n_units).min(0)
        return least

    def blocks(self) -> Iterator[Tensor]:
        """Yield the values in blocks of whole rows."""
        rows = max(1, _BLOCK // self.matrix.shape[1])
        yield from self.matrix.split(rows) if rows < len(self.matrix) else (self.matrix,)

    def summed(self, blocks: Iterator[Tensor]) -> Vector:
        """Sum blocks that come instead of those of the values; in float64, and the same on any number of threads."""
        sums = [self._sum(block) for block in blocks]
        return (np.concatenate(sums) if len(sums) > 1 else sums[0]).reshape(-1, self.n_units).astype(np.float64)

    def _sum(self, block: Tensor) -> Vector:
        # A sum to one number alone is what torch divides among its threads.
        is_one = block.shape[1 - self.over] == 1
        total: Vector = block.numpy().sum(self.over) if is_one else block.sum(self.over).numpy()
        return total


class TorchKernel:
    """Counts the calls of one site into totals that stay where they are, as ``kernel.Kernel`` does.

    It takes float32 and float64 on a CPU, where all values are finite.
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
        self._zeros_ones: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._positive = np.zeros(0, np.int64)
        """Inputs above 0 per unit in the call whose output comes next."""
        self._range = self._positive, self._positive
        """Least and largest input per unit in that call."""
        self._least_square = 0.0
        """Least square among the values whose moments were summed last, or less; where it is above 0, none is 0."""

    def count_input(
        self, z: Tensor, rows: int, positions: int, unfired: Tensor | None, on: Tensor, *, units_last: bool
    ) -> bool:
        """Count an input and set ``on``, shape (rows, units), to what was on; if it cannot, return False.

        ``z`` is contiguous, of shape (rows, units, positions), or (rows, positions, units). Its moments are summed for
        the units that are ``unfired``, and not on in it. For NONZERO ``on`` is left as it was.
        """
        if not _takes(z, positions):
            return False
        act, values = self._act, _Values(z, self._n_units, positions, units_last=units_last)
        peaks = values.peaks()
        low, high = values.least(), peaks.max(0)
        least, most = float(low.min()), float(high.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            return False
        self._extend("input", low, high)
        fires = on.numpy()
        number = None if self._has_border and positions == 1 and act.on == 0 else self._number(values, torch.gt, 0.0)
        if act.family is Family.SQUASHING:
            self._see_between(values, on, is_inside=least > act.low and most < act.high)
        elif self._has_border and positions == 1:
            torch.gt(values.matrix, act.on, out=on)
        elif self._has_border:
            np.greater(peaks, act.on, out=fires)
        positive = added_up(fires) if number is None else _whole(number)
        self._positive, self._range = positive, (low, high)
        self._totals["positive"] += positive
        if act.low == 0:
            self._totals["flat"] += rows * positions - positive
        elif act.low > -math.inf and least <= act.low:
            self._totals["flat"] += _whole(self._number(values, torch.le, act.low))
        if act.high < math.inf and most >= act.high:
            # A ceiling that rounds to 0 would count zeros on both sides.
            ceiling = max(act.high, 2.0**-149) if act.low == 0 and z.dtype == torch.float32 else act.high
            self._totals["flat"] += _whole(self._number(values, torch.ge, ceiling))
        if unfired is not None and self._has_border:
            self._sum_silent(values, unfired.numpy() & ~fires.any(0))
        return True

    def count_output(self, h: Tensor, rows: int, positions: int, *, units_last: bool) -> bool:
        """Count the output of the call whose input was counted last; if it cannot, return False."""
        if not _takes(h, positions):
            return False
        act, values = self._act, _Values(h, self._n_units, positions, units_last=units_last)
        if self._level == "verdict" and values.units_last:
            values = values.in_rows()  # the more units are settled, the fewer are counted
        if act.family is Family.RECTIFIER and act.low == 0:
            low, high = (np.maximum(end, 0) for end in self._range)
        else:
            low, high = values.least(), values.peaks().max(0)
        total, squares = self._moments(values) if self._level != "counts" else (low, high)
        if not all(math.isfinite(end) for end in (low.min(), high.max(), squares.sum())):
            return False
        self._extend("output", low, high)
        if self._level != "counts":
            self._totals["output_sum"] += total
            self._totals["output_abs_sum"] += total if low.min() >= 0 else 2 * self._sum_positive(values) - total
            self._totals["output_square_sum"] += squares
        if self._is_zero_below:
            zeros = rows * positions - self._positive
        elif self._level != "counts" and self._least_square > 0:
            zeros = np.zeros(values.n_units, np.int64)
        else:
            zeros = _whole(self._number(values, torch.eq, 0.0))
        self._totals["zeros"] += zeros
        if act.family is Family.NONZERO:
            self._totals["flat"] += zeros
        return True

    def _extend(self, side: str, low: Vector, high: Vector) -> None:
        least, most = self._totals[f"{side}_min"], self._totals[f"{side}_max"]
        np.minimum(least, low, out=least)
        np.maximum(most, high, out=most)

    def _work(self, like: Tensor) -> Tensor:
        """Return memory of the shape of a block."""
        held = self._scratch.get(like.dtype)
        if held is None or held.numel() < like.numel():
            held = self._scratch[like.dtype] = torch.empty(max(like.numel(), _BLOCK), dtype=like.dtype)
        return held[: like.numel()].view(like.shape)

    def _number(self, values: _Values, compare: Callable[..., Tensor], border: float) -> Vector:
        """Count the values for which a comparison holds, shape (some, units)."""
        return values.summed(compare(block, border, out=self._work(block)) for block in values.blocks())

    def _sum_positive(self, values: _Values) -> Vector:
        """Sum the values above 0 per unit, in float64."""
        above = (torch.clamp_min(block, 0.0, out=self._work(block)) for block in values.blocks())
        total: Vector = values.summed(above).sum(0)
        return total

    def _moments(self, values: _Values) -> tuple[Vector, Vector]:
        """Return the sum and the sum of squares per unit, in float64.

        The backward of batch norm with mean 0 and deviation 1 computes both in one pass over the memory. Where units
        are last, it gives each thread rows to add up, so that what comes out depends on the number of threads.
        """
        self._least_square = 0.0
        if values.units_last:
            return values.summed(values.blocks()).sum(0), values.summed(self._squares(values)).sum(0)
        x, held = values.by_sample.transpose(1, 2), self._zeros_ones.get(values.matrix.dtype)
        if held is None or len(held[0]) != values.n_units:
            held = x.new_zeros(values.n_units), x.new_ones(values.n_units)
            self._zeros_ones[x.dtype] = held
        _, square, plain = torch.ops.aten.native_batch_norm_backward.default(
            x, x, None, None, None, *held, True, 0.0, [False, True, True]
        )
        return plain.double().numpy(), square.double().numpy()

    def _squares(self, values: _Values) -> Iterator[Tensor]:
        least = math.inf
        for block in values.blocks():
            squares = torch.mul(block, block, out=self._work(block))
            least = 0.0 if self._is_zero_below else min(least, float(squares.amin()))
            yield squares
        self._least_square = least

    def _see_between(self, values: _Values, on: Tensor, *, is_inside: bool) -> None:
        """Set ``on`` to where a value was between the rails; it may be known that they all are."""
        if is_inside:
            on.fill_(True)
        else:
            x = values.by_sample
            torch.any((x > self._act.low) & (x < self._act.high), 1, out=on)

    def _sum_silent(self, values: _Values, silent: Vector) -> None:
        """Add the input's moments for silent units: only their depth is ever asked for."""
        index = silent.nonzero()[0]
        if not len(index):
            return
        if values.units_last or len(index) < self._n_units:
            values = values.in_rows(torch.from_numpy(index))
        total, squares = self._moments(values)
        if not math.isfinite(float(squares.sum())):  # a square beyond float32
            values.matrix = values.matrix.double()
            total, squares = self._moments(values)
        self._totals["silent_input_sum"][index] += total
        self._totals["silent_input_square_sum"][index] += squares


def _takes(x: Tensor, positions: int) -> bool:
    return x.dtype in (torch.float32, torch.float64) and x.numel() > 0 and positions < _MOST_POSITIONS


def _whole(number: Vector) -> Vector:
    """Add up whole numbers, shape (some, units); int64."""
    total: Vector = number.sum(0).astype(np.int64)
    return total


def added_up(on: Vector) -> Vector:
    """Count per unit the samples in which it was on, shape (samples, units); int64."""
    total, ones = np.zeros(on.shape[1], np.int64), on.view(np.uint8)
    for start in range(0, len(on), 255):  # a byte holds no more
        total += np.add.reduce(ones[start : start + 255], axis=0, dtype=np.uint8)
    return total


def fire(on: Tensor, first_sample: int, fired: Tensor, first_fired: Tensor, unfired: Tensor) -> bool:
    """Add a batch, shape (samples, units), to the samples fired; return whether a unit is still unfired."""
    seen, silent, total = on.numpy(), unfired.numpy(), fired.numpy()
    counts = added_up(seen)
    total += counts
    newly = (silent & (counts > 0)).nonzero()[0]
    if len(newly):
        first_fired.numpy()[newly] = seen[:, newly].argmax(0) + first_sample
        silent[newly] = False
    return bool(silent.any())
