"""Measures what a change did to a model: how far outputs moved, and which units a gradient reaches."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deadcheck.batch import Batch
from deadcheck.patch_result import Drift
from deadcheck.preserve import seed_generators

Forward = Callable[[Batch], list[Tensor]]
"""Runs a batch through a model and gives the tensors that come out."""

_ROUNDS = 9


def drift(before: Forward, after: Forward, batches: Iterable[Batch], seed: int) -> Drift:
    """Compare the outputs of two models on the same batches, each with the same random numbers."""
    tally = _Tally()
    with torch.no_grad():
        for number, batch in enumerate(batches):
            tally.see(_outputs(before, batch, seed + number), _outputs(after, batch, seed + number), batch)
    return tally.drift()


def _outputs(forward: Forward, batch: Batch, seed: int) -> list[Tensor]:
    seed_generators(seed)
    return [tensor for tensor in forward(batch) if tensor.is_floating_point() and tensor.numel()]


class _Tally:
    """Running sums of a comparison."""

    def __init__(self) -> None:
        self.samples = self.nonfinite = self.decisions = self.changed = 0
        self.right = [0, 0]
        self.labelled = False
        self.largest = self.relative = 0.0
        self.compared = 0

    def see(self, old: Sequence[Tensor], new: Sequence[Tensor], batch: Batch) -> None:
        self.samples += batch.samples
        if not old:
            return
        rows = batch.samples if all(t.dim() and t.shape[0] == batch.samples for t in (*old, *new)) else 1
        a, b = (torch.cat([t.detach().double().cpu().reshape(rows, -1) for t in side], 1) for side in (old, new))
        if a.shape != b.shape:
            return
        self.nonfinite += int((~b.isfinite() & a.isfinite()).sum())
        finite = a.isfinite().all(1) & b.isfinite().all(1)
        a, b = a[finite], b[finite]
        if a.numel():
            moved, size = (b - a).norm(dim=1), a.norm(dim=1)
            self.relative += float((moved / torch.where(size > 0, size, 1.0)).sum())
            self.compared += len(a)
            self.largest = max(self.largest, float((b - a).abs().max()))
        self._decide(old[0], new[0], batch.labels)

    def _decide(self, old: Tensor, new: Tensor, labels: Tensor | None) -> None:
        a, b = _decisions(old), _decisions(new)
        if a is None or b is None:
            return
        self.decisions += a.numel()
        self.changed += int((a != b).sum())
        if labels is not None and labels.numel() == a.numel():
            self.labelled = True
            wanted = labels.to(a.device).reshape(a.shape)
            self.right = [self.right[0] + int((a == wanted).sum()), self.right[1] + int((b == wanted).sum())]

    def drift(self) -> Drift:
        """Return what was found."""
        return Drift(
            samples=self.samples,
            relative=self.relative / self.compared if self.compared else math.nan,
            largest=self.largest,
            nonfinite=self.nonfinite,
            decisions=self.decisions,
            decisions_changed=self.changed,
            right_before=self.right[0] if self.labelled else None,
            right_after=self.right[1] if self.labelled else None,
        )


def _decisions(output: Tensor) -> Tensor | None:
    """Return the index of the largest class: axis 1 of two axes, or of four and more; the last of three."""
    if output.dim() < 2:
        return None
    axis = -1 if output.dim() == 3 else 1
    return output.argmax(axis) if output.shape[axis] > 1 else None


# Gradients.


@dataclass(frozen=True)
class Incoming:
    """Where the incoming weights of a site's units stand."""

    weights: tuple[tuple[str, tuple[int, ...], int], ...]
    """Name of a parameter, indices of the entry that is meant, and the axis of that along which the units are."""

    first: int
    """Index of the first unit there."""

    units: int


def incoming(model: nn.Module, record: Any) -> Incoming | str:
    """Return where the weights that feed a site stand, or why that cannot be told."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: list[tuple[str, tuple[int, ...], int]] = []
    for weight in record.feeds:
        part = None if weight in parameters else _PART.fullmatch(weight)
        name = weight if part is None else part["name"]
        entry = () if part is None else tuple(map(int, re.findall(r"\d+", part["entry"])))
        parameter = parameters.get(name)
        if parameter is None:
            return "its incoming weights are not parameters of the model"
        needed = record.offset + record.units
        is_cut = part is not None and part["cut"] is not None
        axis = None if is_cut else _unit_axis(model, name, parameter[entry], record.axis_from, needed, bool(entry))
        if axis is None:
            return f"which rows of {weight!r} make its units is not known"
        found.append((name, entry, axis))
    return Incoming(tuple(found), record.offset, record.units) if found else "nothing feeds it"


_PART = re.compile(r"(?P<name>.+?)(?P<entry>(\[\d+\])*)(?P<cut>\[\d+:\])?")
"""How ``layout.Weight.identity`` names a part of a parameter."""


def _unit_axis(model: nn.Module, name: str, weight: Tensor, axis_from: str, needed: int, is_entry: bool) -> int | None:
    path = name.rpartition(".")[0].partition(".parametrizations")[0]
    owner = dict(model.named_modules(remove_duplicate=False)).get(path, model)
    axis: int | None
    if axis_from.startswith("conv_transpose") and weight.dim() > 1:
        axis = 1 if weight.shape[1] == needed else None  # the channels of one group alone stand there
    elif axis_from == "embedding":
        axis = 1
    elif weight.dim() == 1 or (not is_entry and type(owner).__module__.startswith(("torch.nn.", "torch.jit."))):
        axis = 0
    else:  # a parameter of the user's own, whose axes say nothing by their order
        fitting = [axis for axis, size in enumerate(weight.shape) if size == needed]
        axis = fitting[0] if len(fitting) == 1 else None
    return axis if axis is not None and weight.dim() > axis and weight.shape[axis] >= needed else None


def gradients(
    model: nn.Module, forward: Forward, batches: Iterable[Batch], sites: Mapping[str, Incoming], seed: int
) -> dict[str, npt.NDArray[np.float64]] | str:
    """Return the mean |gradient| of each unit's incoming weights, by site; or why there is none.

    The objective is the sum of the outputs under random signs: it depends neither on labels nor on a loss that has
    nothing left to learn. The model must be one whose parameters may be given a gradient.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    names = sorted({name for site in sites.values() for name, _, _ in site.weights})
    for name in names:
        named[name].requires_grad_()
    totals = {name: torch.zeros_like(named[name], dtype=torch.float64) for name in names}
    samples = 0
    for number, batch in enumerate(batches):
        seed_generators(seed + number)
        try:
            with torch.enable_grad():
                goal = _objective(forward(batch), seed + number)
                if goal is None or not goal.requires_grad:
                    return "the forward pass gives no gradient"
                found = torch.autograd.grad(goal, [named[name] for name in names], allow_unused=True)
        except RuntimeError as error:
            return f"the backward pass failed ({str(error).splitlines()[0]})"
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                totals[name] += (gradient.to_dense() if gradient.is_sparse else gradient).double().abs()
        samples += batch.samples
    return {key: _per_unit(site, totals) / max(samples, 1) for key, site in sites.items()}


def _objective(outputs: Iterable[Tensor], seed: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for tensor in outputs:
        if tensor.is_floating_point() and tensor.requires_grad:
            signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
            parts.append((tensor.double() * signs.to(tensor.device)).sum())
    return torch.stack(parts).sum() if parts else None


def _per_unit(site: Incoming, totals: Mapping[str, Tensor]) -> npt.NDArray[np.float64]:
    total, count = np.zeros(site.units), 0
    for name, entry, axis in site.weights:
        sums = totals[name][entry]
        rows = sums.movedim(axis, 0).reshape(sums.shape[axis], -1)
        part = rows[site.first : site.first + site.units]
        total += part.sum(1).cpu().numpy()
        count += part.shape[1]
    return total / max(count, 1)


# Time.


def seconds_of(forwards: Sequence[Forward], batch: Batch) -> list[float]:
    """Return the median time of each forward pass, the runs interleaved so that all share what the machine does."""
    times: list[list[float]] = [[] for _ in forwards]
    with torch.no_grad():
        for round_number in range(_ROUNDS + 1):
            for forward, taken in zip(forwards, times, strict=True):
                start = time.perf_counter()
                forward(batch)
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                if round_number:  # the first round warms up
                    taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]
