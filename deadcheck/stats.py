"""Running per-unit counts of one site, kept in memory that grows with the units and not with the samples.

Counts are exact: comparisons are summed in float32 only over fewer than 2**24 elements at a time, and then as int64.
A comparison into a float buffer followed by a matrix-vector product is the fastest count torch has on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deadcheck.activations import Activation
from deadcheck.layout import Plan
from deadcheck.sites import Family, FloatArray, Site, SiteStats

_BLOCK = 1 << 18
"""Elements per block: 1 MiB of float32, which stays in the second-level cache."""

_COUNTS = ("zeros", "positive", "flat", "nonfinite")
_SUMS = ("output", "output_abs", "output_square", "silent_input", "silent_input_square")

Scratch = dict[str, Tensor]
"""Work memory shared by the sites of one scan."""


class Ordered:
    """A tensor of activations in the order (samples, units, positions) or (samples, positions, units)."""

    def __init__(self, values: Tensor, *, units_last: bool) -> None:
        self.values = values
        """Three axes, contiguous, of a real floating dtype."""
        self.units_last = units_last
        self.unit_dim = 2 if units_last else 1
        self.position_dim = 1 if units_last else 2

    @property
    def n_positions(self) -> int:
        """Positions per sample."""
        return self.values.shape[self.position_dim]

    def blocks(self) -> Iterator[Tensor]:
        """Yield pieces that fit the cache: (samples, units, positions), or (rows, units) where units are last."""
        values = self.values
        if self.units_last:
            values = values.reshape(-1, values.shape[2])
        rows = max(1, _BLOCK // max(math.prod(values.shape[1:]), 1))
        yield from values.split(rows) if rows < values.shape[0] else (values,)

    def rows(self, index: Any) -> Ordered:
        """Return the chosen rows alone; all of them for None."""
        return self if index is None else Ordered(self.values[index], units_last=self.units_last)

    def units(self, index: Tensor) -> Ordered:
        """Return the chosen units alone."""
        return Ordered(self.values.index_select(self.unit_dim, index), units_last=self.units_last)

    def without_nan(self, value: float) -> Ordered:
        """Return the values with NaN replaced; infinities stay."""
        return Ordered(self.values.nan_to_num(value, math.inf, -math.inf), units_last=self.units_last)

    def where_bad(self) -> Ordered:
        """Return where the values are NaN or infinite."""
        return Ordered(~self.values.isfinite(), units_last=self.units_last)

    def absolute(self) -> Ordered:
        """Return the absolute values."""
        return Ordered(self.values.abs(), units_last=self.units_last)

    def per_sample(self, reduce: Any) -> Tensor:
        """Reduce over positions with ``torch.amax`` or ``torch.amin``; shape (samples, units)."""
        if self.n_positions == 1:
            return self.values.squeeze(self.position_dim)
        result: Tensor = reduce(self.values, dim=self.position_dim)
        return result

    def per_unit(self, reduce: Any) -> Tensor:
        """Reduce over samples and positions; shape (units,)."""
        rows = self.values.reshape(-1, self.values.shape[2]) if self.units_last else self.per_sample(reduce)
        result: Tensor = reduce(rows, dim=0)
        return result


def _stride_order(values: Tensor, layout: Plan) -> tuple[tuple[int, ...], bool]:
    """Choose the permutation that needs no copy, if there is one."""
    for order, units_last in ((layout.samples_first, False), (layout.units_last, True)):
        if values.permute(order).is_contiguous():
            return order, units_last
    return layout.samples_first, False


def ordered(tensor: Tensor, layout: Plan, n_samples: int) -> Ordered:
    """Bring a tensor into counting order; no copy where the memory allows it.

    Integer and half precision values become float64 and float32, which hold them exactly.
    """
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if not tensor.is_floating_point():
        tensor = tensor.double()
    elif tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    values = tensor.reshape(layout.split)
    order, units_last = _stride_order(values, layout)
    values = values.permute(order)
    n_units = layout.n_units
    shape = (n_samples, -1, n_units) if units_last else (n_samples, n_units, -1)
    return Ordered(values.reshape(shape).contiguous(), units_last=units_last)


def counted(values: Ordered, compare: Any, border: float, scratch: Scratch) -> Tensor:
    """Count per unit the elements for which ``compare(x, border)`` holds; float64, exact below 2**53."""
    total: Tensor | None = None
    for block in values.blocks():
        buffer = _buffer(scratch, block)
        compare(block, border, out=buffer)
        counts = _row_sums(buffer, units_last=values.units_last).double()
        total = counts if total is None else total.add_(counts)
    assert total is not None
    return total


def _buffer(scratch: Scratch, like: Tensor) -> Tensor:
    held = scratch.get("buffer")
    if held is None or held.numel() < like.numel() or held.device != like.device:
        held = scratch["buffer"] = torch.empty(max(like.numel(), _BLOCK), device=like.device)
    return held[: like.numel()].view(like.shape)


def _row_sums(block: Tensor, *, units_last: bool) -> Tensor:
    """Sum a block of 0 and 1 to one number per unit."""
    # Not torch.mv: it runs on the BLAS library's threads, and handing the cores to and fro costs more than the sum.
    return block.sum(0) if units_last else block.sum((0, 2))


def moments(values: Ordered) -> tuple[Tensor, Tensor]:
    """Return the sum and the sum of squares per unit, in float64.

    The backward of batch norm with mean 0 and deviation 1 computes both in one pass over the memory.
    """
    total: Tensor | None = None
    squares: Tensor | None = None
    for block in values.blocks():
        n_units = block.shape[1]
        zero, one = block.new_zeros(n_units), block.new_ones(n_units)
        _, square, plain = torch.ops.aten.native_batch_norm_backward(
            block, block, None, None, None, zero, one, True, 0.0, [False, True, True]
        )
        plain, square = plain.double(), square.double()
        total = plain if total is None else total.add_(plain)
        squares = square if squares is None else squares.add_(square)
    assert total is not None
    assert squares is not None
    return total, squares


class Rows(NamedTuple):
    """Which samples the rows of a call belong to."""

    n_rows: int
    """Rows of the values, the first axis in counting order."""

    n_samples: int
    """Samples of the forward pass."""

    sample_of: Tensor | None = None
    """Sample of each row that counts; None where row i is sample i."""

    keep: Any = None
    """Index of the rows that count, where some are there only to fill up a batch; None for all."""


class SiteCounter:
    """Adds up what one site does, call by call and batch by batch."""

    def __init__(self, activation: Activation, n_units: int, device: torch.device, scratch: Scratch) -> None:
        self.activation = activation
        self.n_units = n_units
        self.device = device
        self.samples = 0
        self.observations = 0
        self._scratch = scratch
        self._counts = {name: torch.zeros(n_units, dtype=torch.float64, device=device) for name in _COUNTS}
        self._sums = {name: torch.zeros(n_units, dtype=torch.float64, device=device) for name in _SUMS}
        inf = torch.full((n_units,), math.inf, dtype=torch.float64, device=device)
        self._low = {"input": inf.clone(), "output": inf.clone()}
        self._high = {"input": -inf, "output": -inf.clone()}
        self._fired = torch.zeros(n_units, dtype=torch.int64, device=device)
        self._first_fired = torch.full((n_units,), -1, dtype=torch.int64, device=device)
        self._silent: Tensor | None = None
        """Indices of the units that had not fired before this batch; None for all of them."""
        self._on: Tensor | None = None
        """Which units were on in which sample of this batch, over all calls; shape (samples, units)."""
        self._reached: Tensor | None = None
        """Which samples of this batch came here, where rows were picked by index; None for all."""
        self._is_plain_relu = activation.family is Family.RECTIFIER and activation.low == 0
        self._bad_input: Ordered | None = None
        """Where the input of the running call is not finite; None when it is everywhere."""

    def see_input(self, tensor: Tensor, layout: Plan, rows: Rows) -> None:
        """Count the input of one call; before the operator runs, since it may write in place."""
        z = ordered(tensor, layout, rows.n_rows).rows(rows.keep)
        peak = z.per_sample(torch.amax)
        low, high = z.per_unit(torch.amin), peak.amax(0)
        clean = bool((low.isfinite() & high.isfinite()).all())
        self._bad_input = None if clean else z.where_bad()
        if not clean:
            peak = z.without_nan(-math.inf).per_sample(torch.amax)
            low, high = z.without_nan(math.inf).per_unit(torch.amin), peak.amax(0)
        self._call_range = low, high
        self._extend("input", low, high)
        self._count_slopes(z, low, high)
        if self.activation.family is Family.SQUASHING:
            self._see_on(self._between_rails(z, low, high), rows)
        elif self.activation.family is not Family.NONZERO:
            self._see_on(peak > self.activation.on, rows)
            self._sum_silent(z)

    def see_output(self, tensor: Tensor, layout: Plan, rows: Rows) -> None:
        """Count the output of one call."""
        h = ordered(tensor, layout, rows.n_rows).rows(rows.keep)
        n = h.values.shape[0] * h.n_positions
        self.observations += n
        self._sum_output(h)
        if self.activation.low == 0 and self._bad_input is None:
            # 0 exactly where the input is not above 0; but 0 * -inf, as in leaky_relu(x, 0), is NaN.
            self._counts["zeros"] += n - self._call_positive
        else:
            zeros = counted(h, torch.eq, 0.0, self._scratch)
            self._counts["zeros"] += zeros
            if self.activation.family is Family.NONZERO:
                self._counts["flat"] += zeros
                self._see_on(h.without_nan(0.0).absolute().per_sample(torch.amax) > 0, rows)

    def finish_batch(self, first_sample: int) -> None:
        """Close a forward pass whose first sample has this index in the data."""
        if self._on is None:
            return
        # Sums of float are many times faster than those of bool.
        on, self._on = self._on.float(), None
        self.samples += on.shape[0] if self._reached is None else int(self._reached.sum())
        self._fired += on.sum(0).long()
        if self._silent is None:
            self._silent = torch.arange(self.n_units, device=on.device)
        if self._silent.numel():
            rows = on.index_select(1, self._silent)
            newly = rows.amax(0) > 0
            self._first_fired[self._silent[newly]] = rows[:, newly].argmax(0) + first_sample
            self._silent = self._silent[~newly]

    def freeze(self, site: Site) -> SiteStats:
        """Return the totals as a record."""
        silent = (self._first_fired < 0).cpu().numpy()

        def of_silent(name: str) -> FloatArray:
            return np.where(silent, self._sums[name].cpu().numpy(), np.nan)

        counts = {name: tensor.round().to(torch.int64).cpu().numpy() for name, tensor in self._counts.items()}
        return SiteStats(
            site=site,
            samples=self.samples,
            observations=self.observations,
            **counts,
            fired=self._fired.cpu().numpy(),
            first_fired=self._first_fired.cpu().numpy(),
            input_min=self._low["input"].cpu().numpy(),
            input_max=self._high["input"].cpu().numpy(),
            output_min=self._low["output"].cpu().numpy(),
            output_max=self._high["output"].cpu().numpy(),
            output_sum=self._sums["output"].cpu().numpy(),
            output_abs_sum=self._sums["output_abs"].cpu().numpy(),
            output_square_sum=self._sums["output_square"].cpu().numpy(),
            silent_input_sum=of_silent("silent_input"),
            silent_input_square_sum=of_silent("silent_input_square"),
        )

    def _extend(self, side: str, low: Tensor, high: Tensor) -> None:
        self._low[side] = torch.minimum(self._low[side], low.double())
        self._high[side] = torch.maximum(self._high[side], high.double())

    def _count_slopes(self, z: Ordered, low: Tensor, high: Tensor) -> None:
        """Count the inputs above 0 and those where the slope is flat."""
        act = self.activation
        n = z.values.shape[0] * z.n_positions
        self._call_positive = counted(z, torch.gt, 0.0, self._scratch)
        self._call_nan = self._nan_counts(z)
        self._counts["positive"] += self._call_positive
        if act.low == 0:
            self._counts["flat"] += n - self._call_positive - self._call_nan
        elif act.low > -math.inf and bool((low <= act.low).any()):
            self._counts["flat"] += counted(z, torch.le, act.low, self._scratch)
        if act.high < math.inf and bool((high >= act.high).any()):
            self._counts["flat"] += counted(z, torch.ge, act.high, self._scratch)

    def _nan_counts(self, z: Ordered) -> Tensor | float:
        if self._bad_input is None:
            return 0.0
        return z.values.isnan().sum((0, z.position_dim)).double()

    def _between_rails(self, z: Ordered, low: Tensor, high: Tensor) -> Tensor:
        act = self.activation
        if bool(((low > act.low) & (high < act.high)).all()) and self._bad_input is None:
            return torch.ones(z.values.shape[0], self.n_units, dtype=torch.bool, device=low.device)
        inside = (z.values > act.low) & (z.values < act.high)
        return inside.any(z.position_dim)

    def _see_on(self, on: Tensor, rows: Rows) -> None:
        reached: Tensor | None = None
        if rows.sample_of is not None:
            of = rows.sample_of
            on = torch.zeros(rows.n_samples, self.n_units, device=on.device).index_add_(0, of, on.float()) > 0
            reached = torch.zeros(rows.n_samples, dtype=torch.bool, device=on.device)
            reached[of] = True
        if self._on is None:
            self._on, self._reached = on, reached
        elif self._on.shape == on.shape:
            self._on |= on
            self._reached = None if reached is None or self._reached is None else self._reached | reached
        else:
            # One call could tell its samples apart and another could not: the whole batch is one sample.
            self._on, self._reached = (self._on.any(0) | on.any(0)).unsqueeze(0), None

    def _sum_silent(self, z: Ordered) -> None:
        """Add the input's moments for units that have never fired: only their depth is ever asked for."""
        if self._silent is None:
            total, squares = moments(z)
            self._sums["silent_input"] += total
            self._sums["silent_input_square"] += squares
        elif self._silent.numel():
            total, squares = moments(z.units(self._silent))
            self._sums["silent_input"].index_add_(0, self._silent, total)
            self._sums["silent_input_square"].index_add_(0, self._silent, squares)

    def _sum_output(self, h: Ordered) -> None:
        total, squares = moments(h)
        bad = self._bad_input
        clean = bad is None and bool((total.isfinite() & squares.isfinite()).all())
        if clean and self._is_plain_relu:
            low, high = (bound.clamp(min=0) for bound in self._call_range)
        elif clean:
            low, high = h.per_unit(torch.amin), h.per_unit(torch.amax)
        else:
            low, high = h.without_nan(math.inf).per_unit(torch.amin), h.without_nan(-math.inf).per_unit(torch.amax)
        self._extend("output", low, high)
        if not clean:
            bad_output = h.where_bad().values
            if bad is not None:
                bad_output |= bad.values if bad.units_last == h.units_last else bad.values.transpose(1, 2)
            self._counts["nonfinite"] += bad_output.sum((0, h.position_dim))
            h = Ordered(h.values.double().nan_to_num(0.0, 0.0, 0.0), units_last=h.units_last)
            total, squares = moments(h)
        self._sums["output"] += total
        self._sums["output_abs"] += total if self.activation.low == 0 else self._absolute_sum(h, total, low)
        self._sums["output_square"] += squares

    def _absolute_sum(self, h: Ordered, total: Tensor, low: Tensor) -> Tensor:
        """Sum of |h|: twice the positive part less the sum."""
        if bool((low >= 0).all()):
            return total
        positive = torch.zeros_like(total)
        for block in h.blocks():
            part = _buffer(self._scratch, block) if block.dtype == torch.float32 else torch.empty_like(block)
            torch.clamp_min(block, 0.0, out=part)
            positive += _row_sums(part, units_last=h.units_last)
        return 2 * positive - total
