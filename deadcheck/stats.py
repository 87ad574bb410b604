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

from deadcheck import kernel, torch_kernel
from deadcheck.activations import Activation
from deadcheck.kernel import Kernel
from deadcheck.layout import Plan
from deadcheck.ordered import Ordered, ordered
from deadcheck.scratch import Scratch
from deadcheck.sites import SUMS, UNKNOWN, Family, Site, SiteStats, settled
from deadcheck.torch_kernel import TorchKernel

_COUNTS = ("zeros", "positive", "flat", "nonfinite")
_EXTREMES = ("input_min", "input_max", "output_min", "output_max")
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


def runs_on_its_own(device: torch.device) -> bool:
    """Tell whether a device works while Python goes on, so that reading one number from it means to wait for it all."""
    return device.type != "cpu"


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
        counts = torch.zeros(len(_COUNTS), n_units, dtype=torch.int64, device=device)
        self._counts = dict(zip(_COUNTS, counts, strict=True))
        # MPS has no float64; the sums and what rounding drops from them are two numbers, so that hardly a bit is lost.
        self._real = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(3, len(SUMS), n_units, dtype=self._real, device=device)
        self._batch_sums, self._sums, self._rest = sums.unbind()
        extremes = torch.full((len(_EXTREMES), n_units), math.inf, dtype=self._real, device=device)
        extremes[1::2].neg_()  # the largest
        self._extremes = dict(zip(_EXTREMES, extremes, strict=True))
        self._fired = torch.zeros(n_units, dtype=torch.int64, device=device)
        self._first_fired = torch.full((n_units,), -1, dtype=torch.int64, device=device)
        self._asked: Tensor | None = None
        """Which units are still held; None for all."""
        self._idle: Tensor | None = None
        """Which of those are asked no more, as the kernel passes over them; None for none."""
        settled = torch.full((len(_WITNESSES), n_units), UNKNOWN, dtype=torch.int64)
        self._settled = dict(zip(_WITNESSES, settled, strict=True))
        self._unfired = torch.ones(n_units, dtype=torch.bool, device=device)
        """Units that had not fired before this batch."""
        self._any_unfired = True
        self._on: Tensor | None = None
        """Which units were on in which sample of this batch, over all calls; shape (samples, units)."""
        self._held_on: Tensor | None = None
        self._reached: Tensor | None = None
        """Which samples of this batch came here, where rows were picked by index; None for all."""
        self._kernels = self._fastest()
        self._is_empty = False
        self._took: Kernel | TorchKernel | None = None
        """What counted the input of the running call; None where it was counted by masks."""
        self._bad_input: Ordered | None = None
        """Where the input of the running call is not finite, if it was counted by masks."""

    @property
    def samples(self) -> int:
        """Samples that came here."""
        return self._samples + (0 if self._picked is None else int(self._picked))

    def _fastest(self) -> dict[torch.dtype, Kernel | TorchKernel]:
        """Return what adds to the totals of the units that are asked, for each type that can be counted in passes."""
        if runs_on_its_own(self.device):
            return {}
        totals = {**self._counts, **self._extremes, **dict(zip(SUMS, self._batch_sums, strict=True))}
        self._alone = TorchKernel(self.activation, totals, self._scratch, self.level)
        is_compiled = kernel.is_built() and self.activation.family is not Family.NONZERO
        compiled = Kernel(self.activation, totals) if is_compiled else self._alone
        return {torch.float64: self._alone, torch.float32: compiled}

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
        if not isinstance(compiled, Kernel) or not compiled.rectifies:
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
        self._took = compiled
        compiled.rectify(tensor, rows.n_rows, n_positions, unfired, on, out, units_last=units_last)
        self._see_on(on, rows)
        self.observations += rows.n_rows * n_positions
        return out

    def _takes(self, tensor: Tensor, rows: Rows) -> Kernel | TorchKernel | None:
        """Return the kernel where the memory of a tensor holds nothing but values that it is to count."""
        found = self._kernels.get(tensor.dtype)
        if found is None or self._asked is not None or rows.keep is not None or type(tensor) is not Tensor:
            return None
        is_plain = tensor.layout is torch.strided and not tensor.is_neg()
        return found if is_plain and tensor.numel() else None

    def _at_once(self, tensor: Tensor, layout: Plan, rows: Rows) -> Kernel | TorchKernel | None:
        """Return the kernel where it can take the tensor as it is, which is so in the most of all calls."""
        if not (layout.is_samples_first or layout.is_units_last):
            return None
        found = self._takes(tensor, rows)
        return found if found is not None and tensor.is_contiguous() else None

    def see_input(self, tensor: Tensor, layout: Plan, rows: Rows) -> None:
        """Count the input of one call; before the operator runs, since it may write in place."""
        found, n_rows, self._is_empty = self._at_once(tensor, layout, rows), rows.n_rows, False
        if found is not None:
            positions = tensor.numel() // (n_rows * self.n_units)
            self._count_input(found, tensor, n_rows, positions, rows, units_last=not layout.is_samples_first)
            return
        z = ordered(tensor, layout, rows.n_rows).rows(rows.keep)
        self._is_empty = z.values.numel() == 0  # rows that only fill up the batch
        if self._is_empty:
            return
        z = z if self._asked is None else z.units(self._asked)
        x, found = z.values, self._kernels.get(z.values.dtype)
        if found is None:
            self._mask_input(z, rows)
        else:
            self._count_input(found, x, x.shape[0], z.n_positions, rows, units_last=z.units_last)

    def _count_input(
        self, by: Kernel | TorchKernel, z: Tensor, n_rows: int, positions: int, rows: Rows, *, units_last: bool
    ) -> None:
        unfired, on = self._unfired if self._any_unfired else None, self._blank(n_rows)
        self._took = by
        if not by.count_input(z, n_rows, positions, unfired, on, units_last=units_last):
            self._took = self._alone
            self._alone.count_input(z, n_rows, positions, unfired, on, units_last=units_last)
        if self.activation.family is not Family.NONZERO:
            self._see_on(on, rows)

    def see_output(self, tensor: Tensor, layout: Plan, rows: Rows) -> None:
        """Count the output of one call."""
        found, n_rows = self._at_once(tensor, layout, rows), rows.n_rows
        if found is not None and self.activation.family is not Family.NONZERO:
            positions = tensor.numel() // (n_rows * self.n_units)
            self.observations += n_rows * positions
            self._count_output(tensor, n_rows, positions, units_last=not layout.is_samples_first)
            return
        if self._is_empty:
            return
        h = ordered(tensor, layout, n_rows).rows(rows.keep)
        h = h if self._asked is None else h.units(self._asked)
        x, positions = h.values, h.n_positions
        self.observations += x.shape[0] * positions
        if self.activation.family is Family.NONZERO:
            self._see_on(((x != 0) & ~x.isnan()).any(h.position_dim), rows)
        if self._kernels:
            self._count_output(x, x.shape[0], positions, units_last=h.units_last)
        else:
            self._mask_output(h)

    def _count_output(self, h: Tensor, n_rows: int, positions: int, *, units_last: bool) -> None:
        took = self._took
        if isinstance(took, Kernel) and took is self._kernels[h.dtype]:
            if took.count_output(h, n_rows, positions, units_last=units_last):
                return
            took = None
        knows_input = took is self._alone
        self._alone.count_output(h, n_rows, positions, units_last=units_last, knows_input=knows_input)

    # By masks, on a device that runs on its own. That none is NaN, or that a unit has fired before, is not asked, for
    # the device would have to be waited for.

    def _mask_input(self, z: Ordered, rows: Rows) -> None:
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

    def _mask_output(self, h: Ordered) -> None:
        values, nan = h.values, h.values.isnan()
        zeros = _number(values == 0, h)
        self._counts["zeros"] += zeros
        if self.activation.family is Family.NONZERO:
            self._counts["flat"] += zeros
        bad, source = h.where_bad().values, self._bad_input
        good = Ordered(torch.where(bad, 0, values), units_last=h.units_last)
        if source is not None:
            bad = bad | (source.values if source.units_last == h.units_last else source.values.transpose(1, 2))
        self._counts["nonfinite"] += _number(bad, h)
        low = torch.where(nan, math.inf, values).amin(_over(h))
        self._extend("output", low, torch.where(nan, -math.inf, values).amax(_over(h)))
        self._sum("output_sum").add_(self._total(good.values, h))
        self._sum("output_abs_sum").add_(self._total(good.values.abs(), h))
        self._sum("output_square_sum").add_(self._squares(good))

    def _total(self, values: Tensor, like: Ordered) -> Tensor:
        return values.sum(_over(like), dtype=self._real)

    def _squares(self, z: Ordered) -> Tensor:
        return z.values.to(self._real).square().sum(_over(z))

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
        if runs_on_its_own(self.device):
            self._fire(on, first_sample)
        else:
            fire = kernel.fire if kernel.is_built() else torch_kernel.fire
            totals = (self._fired, self._first_fired, self._unfired)
            self._any_unfired = fire(on.contiguous(), first_sample, *totals)
        if self.level == "verdict" and self.n_units and self._may_settle:
            self._settle_units()

    @property
    def _may_settle(self) -> bool:
        # To drop units is to ask which, so it is done ever more rarely: after batch 1, 2, 4, 8, …
        return self.batches & (self.batches - 1) == 0

    def _fire(self, on: Tensor, first_sample: int) -> None:
        """Add a batch, shape (samples, units), to the samples fired; on a device that is not waited for."""
        self._fired += on.sum(0)
        newly = self._unfired & on.any(0)
        self._first_fired = torch.where(newly, on.byte().argmax(0) + first_sample, self._first_fired)
        self._unfired = self._unfired & ~newly

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
        if isinstance(self._took, Kernel) and not bool(done.all()):
            # To pick the others would cost a copy of them, and a ReLU would run by itself.
            self._idle, self._took.asked = done, ~done
            return
        left = (~done).nonzero().squeeze(1)
        self._asked, self._idle, self.n_units = asked[left], None, len(left)
        self._counts = {name: values[left] for name, values in self._counts.items()}
        self._extremes = {name: values[left] for name, values in self._extremes.items()}
        self._batch_sums, self._sums, self._rest = (x[:, left] for x in (self._batch_sums, self._sums, self._rest))
        firing = (self._fired, self._first_fired, self._unfired)
        self._fired, self._first_fired, self._unfired = (x[left] for x in firing)
        self._any_unfired = bool(self._unfired.any())
        self._held_on, self._kernels = None, self._fastest()

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
        if not runs_on_its_own(self.device):
            settle = kernel.settle if kernel.is_built() else torch_kernel.settle
            settle(self._batch_sums, self._sums, self._rest)
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


def _over(values: Ordered) -> tuple[int, int]:
    """Axes of samples and positions."""
    return (0, values.position_dim)


def _number(mask: Tensor, like: Ordered) -> Tensor:
    """Count per unit where a mask holds; int64."""
    return mask.sum(_over(like))
