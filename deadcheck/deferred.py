"""Counts on a device that runs on its own, as a GPU does: nothing is read from it before the scan ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deadcheck.activations import Activation
from deadcheck.counting import Ordered, Scratch
from deadcheck.sites import Family
from deadcheck.stats import Rows, SiteCounter


def runs_on_its_own(device: torch.device) -> bool:
    """Tell whether a device works while Python goes on, so that reading one number from it means to wait for it all."""
    return device.type != "cpu"


def counter_of(
    activation: Activation, n_units: int, device: torch.device, scratch: Scratch, level: str = "full"
) -> SiteCounter:
    """Return what counts the site of an activation on a device."""
    kind = DeferredCounter if runs_on_its_own(device) else SiteCounter
    return kind(activation, n_units, device, scratch, level)


class DeferredCounter(SiteCounter):
    """Computes every figure of every unit in every batch, where ``SiteCounter`` looks first at what is needed.

    The counts are the same integers. That nothing is NaN, or that a unit has fired before, is not asked but masked.
    """

    def _compiled(self) -> None:
        return None

    def _count_input(self, z: Ordered, rows: Rows) -> None:
        act, family = self.activation, self.activation.family
        values, nan = z.values, z.values.isnan()
        peak = torch.where(nan, -math.inf, values).amax(z.position_dim)
        self._bad_input = z.where_bad()
        self._extend("input", torch.where(nan, math.inf, values).amin(_over(z)), peak.amax(0))
        positive = _number(values > 0, z)
        self._counts["positive"] += positive
        if act.low == 0:
            self._counts["flat"] += values.shape[0] * z.n_positions - positive - _number(nan, z)
        elif act.low > -math.inf:
            self._counts["flat"] += _number(values <= act.low, z)
        if act.high < math.inf:
            self._counts["flat"] += _number(values >= act.high, z)
        if family is Family.SQUASHING:
            self._see_on(((values > act.low) & (values < act.high)).any(z.position_dim), rows)
        elif family is not Family.NONZERO:
            self._see_on(peak > act.on, rows)
            self._sum("silent_input_sum").add_(torch.where(self._unfired, self._total(values, z), 0))
            self._sum("silent_input_square_sum").add_(torch.where(self._unfired, self._squares(z), 0))

    def _count_output(self, h: Ordered, n: int, rows: Rows) -> None:
        values, nan = h.values, h.values.isnan()
        zeros = _number(values == 0, h)
        self._counts["zeros"] += zeros
        if self.activation.family is Family.NONZERO:
            self._counts["flat"] += zeros
            self._see_on(((values != 0) & ~nan).any(h.position_dim), rows)
        assert self._bad_input is not None
        bad, source = h.where_bad().values, self._bad_input
        worse = bad | (source.values if source.units_last == h.units_last else source.values.transpose(1, 2))
        self._counts["nonfinite"] += _number(worse, h)
        low = torch.where(nan, math.inf, values).amin(_over(h))
        self._extend("output", low, torch.where(nan, -math.inf, values).amax(_over(h)))
        good = Ordered(torch.where(bad, 0, values), units_last=h.units_last)
        self._sum("output_sum").add_(self._total(good.values, h))
        self._sum("output_abs_sum").add_(self._total(good.values.abs(), h))
        self._sum("output_square_sum").add_(self._squares(good))

    def _fire(self, on: Tensor, first_sample: int) -> None:
        self._fired += on.sum(0)
        newly = self._unfired & on.any(0)
        self._first_fired = torch.where(newly, on.byte().argmax(0) + first_sample, self._first_fired)
        self._unfired = self._unfired & ~newly

    def _total(self, values: Tensor, like: Ordered) -> Tensor:
        return values.sum(_over(like), dtype=self._real)

    def _squares(self, z: Ordered) -> Tensor:
        return z.values.to(self._real).square().sum(_over(z))


def _over(values: Ordered) -> tuple[int, int]:
    """Axes of samples and positions."""
    return (0, values.position_dim)


def _number(mask: Tensor, like: Ordered) -> Tensor:
    """Count per unit where a mask holds; int64."""
    return mask.sum(_over(like))
