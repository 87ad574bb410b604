"""Values in the order in which they are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deadcheck.layout import Plan


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

    def rows(self, index: Any) -> Ordered:
        """Return the chosen rows alone; all of them for None."""
        return self if index is None else Ordered(self.values[index], units_last=self.units_last)

    def units(self, index: Tensor) -> Ordered:
        """Return the chosen units alone."""
        return Ordered(self.values.index_select(self.unit_dim, index), units_last=self.units_last)

    def where_bad(self) -> Ordered:
        """Return where the values are NaN or infinite."""
        return Ordered(~self.values.isfinite(), units_last=self.units_last)


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
