"""Finds the site of an activation call, the axis of its units, and the order in which its values are counted."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from deadcheck.activations import Activation
from deadcheck.calls import axes_of
from deadcheck.errors import UsageError
from deadcheck.layout import SAMPLE, Flow, Plan, at_axis, count, guessed, plan
from deadcheck.roster import Roster, SiteRecord
from deadcheck.stats import Rows
from deadcheck.whereabouts import Whereabouts


class Samples(NamedTuple):
    """The samples of one forward pass."""

    all: int
    counted: int
    """Those that count, from the first on; the others only fill up a batch of fixed size."""

    first: int
    """Index in the data of the first one."""


class Seen(NamedTuple):
    """How one activation call is counted."""

    record: SiteRecord
    flow: Flow
    layout: Plan
    rows: Rows
    told: Flow
    """What told the site from others."""


class Locator:
    """Finds sites for one thread of a scan; the roster knows those of all."""

    def __init__(self, roster: Roster, unit_axes: Sequence[tuple[str, int]]) -> None:
        self.roster = roster
        self.unit_axes = tuple(unit_axes)
        self.matched: set[tuple[str, int]] = set()
        """Choices of the user that a site fitted."""
        self.notes: dict[str, str] = {}
        """By place, what was counted that should not have been."""

    def fork(self) -> Locator:
        """Return one for another thread."""
        return Locator(self.roster, self.unit_axes)

    def find(
        self,
        tensor: Tensor,
        flow: Flow | None,
        act: Activation,
        samples: Samples,
        where: Whereabouts,
        place: int,
        step: int,
    ) -> Seen:
        """Return how a call is counted that stands at this place of the code, and at this step of its pass."""
        shape, path = tensor.shape, where.path
        if flow is None or flow.axes is None or flow.axis_from is None or not flow.fits(shape):
            flow = flow if flow is None or flow.fits(shape) else Flow(None, flow.feeds)
            flow = guessed(shape, flow, samples.all)
        flow = told = self._chosen(flow, shape, (path, f"{path}:{act.name}"))

        def make(weight: str, keys: tuple[str, ...]) -> SiteRecord:
            own = told if told.axis_from == "user" else self._chosen(told, shape, keys)
            layout = plan(axes_of(own))
            axis = layout.unit_axes[0] if layout.unit_axes else _single_axis(own, len(shape))
            axis_from = own.axis_from or "guess"
            return SiteRecord(act, path, layout.n_units, tensor.device, axis, axis_from, where.is_activation, weight)

        n_units = plan(axes_of(flow)).n_units
        record = self.roster.find(path, act, flow, units=n_units, place=place, make=make)
        record.first = min(record.first, (samples.first, step))
        if record.axis_from == "user" != flow.axis_from:
            flow = at_axis(flow, shape, record.axis, "user")
        elif flow.axis_from == "guess":
            record.axis_from = "guess"  # other calls may have been told
        flow, rows = self._rows_of(record, flow, samples, path)
        return Seen(record, flow, plan(axes_of(flow)), rows, told)

    def is_chosen(self, path: str, name: str) -> bool:
        """Tell whether the user named the axis of an activation of this name here."""
        place = f"{path}:{name}"
        return any(
            fnmatchcase(path, pattern) or fnmatchcase(place, pattern) or pattern.startswith(f"{place}#")
            for pattern, _ in self.unit_axes
        )

    def _chosen(self, flow: Flow, shape: Sequence[int], names: Sequence[str]) -> Flow:
        """Return the flow with its units on the axis that the user chose for one of these names."""
        found = [pair for pair in self.unit_axes if any(fnmatchcase(name, pair[0]) for name in names)]
        if not found:
            return flow
        self.matched.update(found)
        pattern, axis = found[0]
        if not -len(shape) <= axis < len(shape):
            raise UsageError(
                f"--units '{pattern}={axis}': the values at {names[0]} have {len(shape)} axes; "
                f"give a number from {-len(shape)} to {len(shape) - 1}"
            )
        return at_axis(flow, shape, axis, "user")

    def _rows_of(self, record: SiteRecord, flow: Flow, samples: Samples, path: str) -> tuple[Flow, Rows]:
        """Tell which sample each row of the values belongs to; where none can be told, rows are positions."""
        batch, kept = samples.all, samples.counted
        found, rows = count(axes_of(flow), SAMPLE), flow.rows
        if batch == 1:
            return flow.unsampled()._replace(rows=None), Rows(1, 1)
        if rows is None and found == batch:
            return flow, Rows(batch, kept, keep=None if kept == batch else slice(kept))
        if rows is not None and found == len(rows) > 0:
            of = list(rows) if isinstance(rows, range) else rows
            of = torch.as_tensor(of, device=record.device)
            keep = None if kept == batch else of < kept
            return flow, Rows(len(rows), kept, of if keep is None else of[keep], keep)
        record.samples_from = "call"
        if kept < batch:
            note = f"{batch - kept} samples that only fill up the last batch were counted"
            self.notes[path] = f"{path or 'the model'}: {note}"
        return flow.unsampled(), Rows(1, 1)


def _single_axis(flow: Flow, rank: int) -> int:
    """Return the axis of a site with one unit, which no atom marks."""
    is_second = flow.axis_from is not None and flow.axis_from.startswith(("conv", "norm"))
    return 1 if is_second and rank > 2 else max(rank - 1, 0)
