"""Running statistics of one site, kept in memory that grows with the units and not with the samples.

Counts are exact integers. Sums are kept to twice the digits of a float64, so that they come out the same in whatever
order batches are added up: by one process, by several, or in shards.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deadcheck import kernel
from deadcheck.activations import Activation
from deadcheck.counting import Ordered, Scratch, counted, moments, ordered, positive_sum
from deadcheck.layout import Plan
from deadcheck.sites import SUMS, UNKNOWN, Family, Site, SiteStats, settled

_COUNTS = ("zeros", "positive", "flat", "nonfinite")
_WITNESSES = ("first_fired", "nonfinite")
"""What is kept of a unit that is asked no more."""


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

    @property
    def n_kept(self) -> int:
        """Rows that count."""
        if self.keep is None:
            return self.n_rows
        return self.n_samples if self.sample_of is None else len(self.sample_of)


class SiteCounter:
    """Adds up what one site does, call by call and batch by batch."""

    def __init__(
        self, activation: Activation, n_units: int, device: torch.device, scratch: Scratch, level: str = "full"
    ) -> None:
        self.activation = activation
        self.level = level
        self.n_units = n_units
        """Units that are still asked; all of the site's, but for ``verdict``."""
        self.n_all = n_units
        self.device = device
        self.observations = 0
        self.batches = 0
        self._samples = 0
        self._picked: Tensor | None = None
        """Samples that came here where rows were picked, in all batches; on the device."""
        self._scratch = scratch
        self._counts = {name: torch.zeros(n_units, dtype=torch.int64, device=device) for name in _COUNTS}
        # MPS has no float64; the sums and what rounding drops from them are two numbers, so that hardly a bit is lost.
        self._real = torch.float32 if device.type == "mps" else torch.float64
        self._batch_sums = torch.zeros(len(SUMS), n_units, dtype=self._real, device=device)
        self._sums, self._rest = torch.zeros_like(self._batch_sums), torch.zeros_like(self._batch_sums)
        inf = torch.full((n_units,), math.inf, dtype=self._real, device=device)
        self._extremes = {
            f"{side}_{end}": sign * inf for side in ("input", "output") for end, sign in (("min", 1), ("max", -1))
        }
        self._fired = torch.zeros(n_units, dtype=torch.int64, device=device)
        self._first_fired = torch.full((n_units,), -1, dtype=torch.int64, device=device)
        self._asked: Tensor | None = None
        """Which units are still held; None for all."""
        self._idle: Tensor | None = None
        """Which of those are asked no more, as the kernel passes over them; None for none."""
        self._settled = {name: torch.full((n_units,), UNKNOWN, dtype=torch.int64) for name in _WITNESSES}
        self._unfired = torch.ones(n_units, dtype=torch.bool, device=device)
        """Units that had not fired before this batch."""
        self._any_unfired = True
        self._on: Tensor | None = None
        """Which units were on in which sample of this batch, over all calls; shape (samples, units)."""
        self._held_on: Tensor | None = None
        self._reached: Tensor | None = None
        """Which samples of this batch came here, where rows were picked by index; None for all."""
        self._is_plain_relu = activation.family is Family.RECTIFIER and activation.low == 0
        self._kernel = self._compiled()
        self._is_empty = False
        self._in_kernel = False
        """Whether the input of the running call was counted by the kernel."""
        self._bad_input: Ordered | None = None
        """Where the input of the running call is not finite; None when it is everywhere."""

    @property
    def samples(self) -> int:
        """Samples that came here."""
        return self._samples + (0 if self._picked is None else int(self._picked))

    def _compiled(self) -> kernel.Kernel | None:
        """Return the kernel that adds to the totals of the units that are asked, where it can."""
        if not kernel.is_built() or self.device.type != "cpu" or self.activation.family is Family.NONZERO:
            return None
        sums = dict(zip(SUMS, self._batch_sums, strict=True))
        return kernel.Kernel(self.activation, {**self._counts, **self._extremes, **sums})

    @property
    def is_settled(self) -> bool:
        """Whether no unit is asked any more."""
        return self.n_units == 0 < self.n_all

    def pass_over(self, layout: Plan, rows: Rows) -> None:
        """Note one call of a settled site, which is not counted."""
        self._see_on(self._blank(rows.n_kept), rows)  # of no unit
        self.observations += rows.n_kept * (layout.n_values // max(rows.n_rows * self.n_all, 1))

    def rectify(self, tensor: Tensor, layout: Plan, rows: Rows, *, in_place: bool) -> Tensor | None:
        """Count one of ``kernel.WRITTEN`` and run it in the same pass over the memory; None, with nothing done, if not.

        The bits are those of torch (see ``kernel.writes_as_torch``).
        """
        compiled = self._takes(tensor, rows)
        if compiled is None or not compiled.rectifies:
            return None
        out = tensor if in_place else torch.empty_like(tensor)
        units_last = not layout.is_samples_first
        if not tensor.is_contiguous() or (units_last and not layout.is_units_last):
            z = ordered(tensor, layout, rows.n_rows)
            units_last = z.units_last
            if z.values.data_ptr() != tensor.data_ptr() or out.stride() != tensor.stride():
                return None
        n_positions = tensor.numel() // (rows.n_rows * self.n_units)
        unfired, on = self._unfired if self._any_unfired else None, self._blank(rows.n_rows)
        self._in_kernel = True
        compiled.rectify(tensor, rows.n_rows, n_positions, unfired, on, out, units_last=units_last)
        self._see_on(on, rows)
        self.observations += rows.n_rows * n_positions
        return out

    def _takes(self, tensor: Tensor, rows: Rows) -> kernel.Kernel | None:
        """Return the kernel where the memory of a tensor holds nothing but values that it is to count."""
        if self._kernel is None or self._asked is not None or rows.keep is not None or type(tensor) is not Tensor:
            return None
        is_plain = tensor.dtype is torch.float32 and tensor.layout is torch.strided and not tensor.is_neg()
        return self._kernel if is_plain and tensor.numel() else None

    def _at_once(self, tensor: Tensor, layout: Plan, rows: Rows) -> kernel.Kernel | None:
        """Return the kernel where it can take the tensor as it is, which is so in the most of all calls."""
        if not (layout.is_samples_first or layout.is_units_last):
            return None
        compiled = self._takes(tensor, rows)
        return compiled if compiled is not None and tensor.is_contiguous() else None

    def see_input(self, tensor: Tensor, layout: Plan, rows: Rows) -> None:
        """Count the input of one call; before the operator runs, since it may write in place."""
        compiled, n_rows = self._at_once(tensor, layout, rows), rows.n_rows
        if compiled is not None:
            unfired, on = self._unfired if self._any_unfired else None, self._blank(n_rows)
            positions, units_last = tensor.numel() // (n_rows * self.n_units), not layout.is_samples_first
            self._in_kernel = compiled.count_input(tensor, n_rows, positions, unfired, on, units_last=units_last)
            if self._in_kernel:
                self._is_empty, self._bad_input = False, None
                self._see_on(on, rows)
                return
        z = ordered(tensor, layout, rows.n_rows).rows(rows.keep)
        self._is_empty = z.values.numel() == 0  # rows that only fill up the batch
        if self._is_empty:
            return
        self._count_input(z if self._asked is None else z.units(self._asked), rows)

    def _count_input(self, z: Ordered, rows: Rows) -> None:
        if self._kernel is not None:
            on = self._blank(z.values.shape[0])
            unfired = self._unfired if self._any_unfired else None
            x, positions = z.values, z.n_positions
            self._in_kernel = x.dtype is torch.float32 and self._kernel.count_input(
                x, x.shape[0], positions, unfired, on, units_last=z.units_last
            )
            if self._in_kernel:
                self._bad_input = None
                self._see_on(on, rows)
                return
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
        compiled = self._at_once(tensor, layout, rows) if self._in_kernel else None
        if compiled is not None:
            n_rows, units_last = rows.n_rows, not layout.is_samples_first
            positions = tensor.numel() // (n_rows * self.n_units)
            if compiled.count_output(tensor, n_rows, positions, units_last=units_last):
                self.observations += n_rows * positions
                return
        if self._is_empty:
            return
        h = ordered(tensor, layout, rows.n_rows).rows(rows.keep)
        h = h if self._asked is None else h.units(self._asked)
        n = h.values.shape[0] * h.n_positions
        self.observations += n
        self._count_output(h, n, rows)

    def _count_output(self, h: Ordered, n: int, rows: Rows) -> None:
        if self._in_kernel and self._kernel is not None and h.values.dtype is torch.float32:
            x, positions = h.values, h.n_positions
            if self._kernel.count_output(x, x.shape[0], positions, units_last=h.units_last):
                return
        self._sum_output(h)
        is_zero_below = self.activation.low == 0 and self.activation.high > kernel.TINY
        if is_zero_below and self._bad_input is None and not self._in_kernel:
            # 0 exactly where the input is not above 0; but 0 * -inf, as in leaky_relu(x, 0), is NaN.
            self._counts["zeros"] += n - self._call_positive
        else:
            zeros = counted(h, torch.eq, 0.0, self._scratch)
            self._counts["zeros"] += zeros
            if self.activation.family is Family.NONZERO:
                self._counts["flat"] += zeros
                self._see_on(h.without_nan(0.0).absolute().per_sample(torch.amax) > 0, rows)

    def may_become(self, other: SiteCounter) -> bool:
        """Tell whether a first batch may yet come out as another counter's did: only a look, for equality is of all."""
        if self.observations != other.observations or self._batch_sums.shape != other._sums.shape:
            return True
        return np.array_equal(self._batch_sums.numpy(), other._sums.numpy(), equal_nan=True)

    def finish_batch(self, first_sample: int) -> None:
        """Close a forward pass whose first sample has this index in the data."""
        if self.n_units:
            self._settle_sums()
        if self._on is None:
            return
        on, self._on = self._on, None
        if self._reached is None:
            self._samples += on.shape[0]
        else:
            came = self._reached.sum()
            self._picked = came if self._picked is None else self._picked + came
        self.batches += 1
        if self.is_settled:
            return
        if self._kernel is not None:
            totals = (self._fired, self._first_fired, self._unfired)
            self._any_unfired = kernel.fire(on.contiguous(), first_sample, *totals)
        else:
            self._fire(on, first_sample)
        if self.level == "verdict" and self.n_units and self._may_settle:
            self._settle_units()

    @property
    def _may_settle(self) -> bool:
        # To drop units is to ask which, so it is done ever more rarely: after batch 1, 2, 4, 8, …
        return self.batches & (self.batches - 1) == 0

    def _fire(self, on: Tensor, first_sample: int) -> None:
        """Add a batch, shape (samples, units), to the samples fired."""
        fired = on.float().sum(0).long()  # sums of float are many times faster than those of bool
        self._fired += fired
        newly = (self._unfired & (fired > 0)).nonzero().squeeze(1)
        if newly.numel():
            self._first_fired[newly] = on[:, newly].byte().argmax(0) + first_sample
            self._unfired[newly] = False
            self._any_unfired = bool(self._unfired.any())

    def _settle_units(self) -> None:
        """Ask the units no more whose verdict no sample can change."""
        least, most = self._extremes["input_min"], self._extremes["input_max"]
        done = settled(self.activation.family, self._fired, self._counts["flat"], self.observations, least, most)
        if self._idle is not None:
            done |= self._idle
        newly = done if self._idle is None else done & ~self._idle
        if not bool(newly.any()):
            return
        asked = torch.arange(self.n_all, device=self.device) if self._asked is None else self._asked
        for name, values in (("first_fired", self._first_fired), ("nonfinite", self._counts["nonfinite"])):
            self._settled[name][asked[newly].cpu()] = values[newly].cpu()
        if self._kernel is not None and self._in_kernel and not bool(done.all()):
            # To pick the others would cost a copy of them, and a ReLU would run by itself.
            self._idle, self._kernel.asked = done, ~done
            return
        left = (~done).nonzero().squeeze(1)
        self._asked, self._idle, self.n_units = asked[left], None, len(left)
        self._counts = {name: values[left] for name, values in self._counts.items()}
        self._extremes = {name: values[left] for name, values in self._extremes.items()}
        self._batch_sums, self._sums, self._rest = (x[:, left] for x in (self._batch_sums, self._sums, self._rest))
        firing = (self._fired, self._first_fired, self._unfired)
        self._fired, self._first_fired, self._unfired = (x[left] for x in firing)
        self._any_unfired = bool(self._unfired.any())
        self._held_on, self._kernel = None, self._compiled()

    def freeze(self, site: Site) -> SiteStats:
        """Return the totals as a record."""
        counted = self._totals(site)
        if self.level == "counts":
            return counted.without_sums()
        return counted if self._asked is None and self._idle is None else self._with_settled(counted, site)

    def _with_settled(self, counted: SiteStats, site: Site) -> SiteStats:
        """Return the totals of the units that are asked beside what is left of those that are not."""
        held = np.arange(self.n_all) if self._asked is None else self._asked.cpu().numpy()
        is_asked = np.ones(len(held), bool) if self._idle is None else ~self._idle.numpy()
        asked, arrays = held[is_asked], dict[str, Any]()
        for item in fields(SiteStats):
            own = getattr(counted, item.name)
            if not isinstance(own, np.ndarray):
                continue
            if item.name in self._settled:
                array = self._settled[item.name].numpy().copy()
            else:
                fill = UNKNOWN if own.dtype == np.int64 else 0.0 if item.name == "rest" else math.nan
                array = np.full((*own.shape[:-1], self.n_all), fill, own.dtype)
            array[..., asked] = own[..., is_asked]
            arrays[item.name] = array
        return replace(counted, site=site, **arrays)

    def _totals(self, site: Site) -> SiteStats:
        """Return the totals of the units that are asked."""
        rounded = self._sums + self._rest
        dropped = (self._rest - (rounded - self._sums)).nan_to_num(0, 0, 0)
        sums, rest = (x.cpu().double().numpy().copy() for x in (rounded, dropped))
        fired = (self._first_fired >= 0).cpu().numpy()
        of_silent = [row for row, name in enumerate(SUMS) if name.startswith("silent")]
        for row in of_silent:
            sums[row, fired] = math.nan
            rest[row, fired] = 0.0
        return SiteStats(
            site=site,
            samples=self.samples,
            observations=self.observations,
            **{name: tensor.cpu().numpy().copy() for name, tensor in self._counts.items()},
            **{name: tensor.cpu().double().numpy().copy() for name, tensor in self._extremes.items()},
            fired=self._fired.cpu().numpy().copy(),
            first_fired=self._first_fired.cpu().numpy().copy(),
            **dict(zip(SUMS, sums, strict=True)),
            rest=rest,
        )

    def _settle_sums(self) -> None:
        """Add the sums of the batch to the totals, and what rounding drops to the rest."""
        if self._kernel is not None:
            kernel.settle(self._batch_sums, self._sums, self._rest)
            return
        a, b = self._sums, self._batch_sums
        total = a + b
        back = total - a
        self._rest += ((a - (total - back)) + (b - back)).nan_to_num_(0, 0, 0)  # Knuth's two-sum
        self._sums = total
        self._batch_sums.zero_()

    def _blank(self, n_rows: int) -> Tensor:
        """Return memory, not cleared, for what is on in each row: the same in every batch, as fresh memory is slow."""
        held = self._held_on
        if held is not None and held.shape[0] == n_rows and held is not self._on:
            return held
        self._held_on = torch.empty(n_rows, self.n_units, dtype=torch.bool, device=self.device)
        return self._held_on

    def _sum(self, name: str) -> Tensor:
        return self._batch_sums[SUMS.index(name)]

    def _extend(self, side: str, low: Tensor, high: Tensor) -> None:
        least, most = self._extremes[f"{side}_min"], self._extremes[f"{side}_max"]
        torch.minimum(least, low.to(self._real), out=least)
        torch.maximum(most, high.to(self._real), out=most)

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
            # A ceiling that rounds to 0 would count zeros on both sides.
            ceiling = max(act.high, 2.0**-149) if act.low == 0 and z.values.dtype == torch.float32 else act.high
            self._counts["flat"] += counted(z, torch.ge, ceiling, self._scratch)

    def _nan_counts(self, z: Ordered) -> Tensor | int:
        if self._bad_input is None:
            return 0
        return z.values.isnan().sum((0, z.position_dim))

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
        if not self._any_unfired:
            return
        silent = self._unfired.nonzero().squeeze(1)
        chosen = z if len(silent) == self.n_units else z.units(silent)
        total, squares = moments(chosen)
        if not bool(squares.isfinite().all()):  # NaN, or a square beyond float32
            total, squares = moments(Ordered(chosen.values.double(), units_last=z.units_last))
        self._sum("silent_input_sum").index_add_(0, silent, total)
        self._sum("silent_input_square_sum").index_add_(0, silent, squares)

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
        self._sum("output_sum").add_(total)
        self._sum("output_abs_sum").add_(total if self.activation.low == 0 else self._absolute_sum(h, total, low))
        self._sum("output_square_sum").add_(squares)

    def _absolute_sum(self, h: Ordered, total: Tensor, low: Tensor) -> Tensor:
        """Sum of |h|: twice the positive part less the sum."""
        if bool((low >= 0).all()):
            return total
        return 2 * positive_sum(h, self._scratch) - total
