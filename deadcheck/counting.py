"""Values in the order in which they are counted, and the fastest ways torch has to count and sum them.

Counts are exact: comparisons are summed in float32 only over fewer than 2**24 elements at a time, and then as int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deadcheck.layout import Plan

_BLOCK = 1 << 18
"""Elements per block: 1 MiB of float32, which stays in the second-level cache."""

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
    if tensor.dtype == torch.float32 and tensor.layout is torch.strided and tensor.is_contiguous():
        if layout.is_samples_first:  # the most of all calls; each operator here costs time in every batch
            return Ordered(tensor.view(n_samples, layout.n_units, -1), units_last=False)
        if layout.is_units_last:
            return Ordered(tensor.view(n_samples, -1, layout.n_units), units_last=True)
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
    """Count per unit the elements for which ``compare(x, border)`` holds; int64."""
    total: Tensor | None = None
    for block in values.blocks():
        buffer = _buffer(scratch, block)
        compare(block, border, out=buffer)
        counts = _row_sums(buffer, units_last=values.units_last).long()
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


def positive_sum(values: Ordered, scratch: Scratch) -> Tensor:
    """Sum the values above 0 per unit, in float64."""
    total: Tensor | None = None
    for block in values.blocks():
        part = _buffer(scratch, block) if block.dtype == torch.float32 else torch.empty_like(block)
        torch.clamp_min(block, 0.0, out=part)
        sums = _row_sums(part, units_last=values.units_last).double()
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total
