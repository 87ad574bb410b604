"""Where single units stand in a tensor: their layout spelled for a patch file, and masks made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from deadcheck.errors import PatchError
from deadcheck.layout import POSITION, SAMPLE, UNIT, Axes, Axis, has
from deadcheck.patch_plan import Units, layout_fault
from deadcheck.ranges import mask_of


class UnitMask:
    """Which entries of a tensor belong to the replaced units."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.table, self.repeats = _table(units)
        self._placed: dict[torch.device, Tensor] = {}

    def on(self, x: Tensor) -> Tensor:
        """Return a mask that broadcasts to ``x``, on its device; PatchError where the units cannot be in it."""
        table = self._placed.get(x.device)
        if table is None:
            table = self._placed[x.device] = self.table.to(x.device)
        times = [1] * table.dim()
        for dim, size in enumerate(table.shape):
            given = x.shape[dim - table.dim()] if x.dim() >= table.dim() else 0
            if size == 1 and not self.repeats[dim]:
                continue
            times[dim] = given // size if self.repeats[dim] else 1
            if given != size * times[dim] or not given:
                raise PatchError(
                    f"a patch for {self.units.count} units laid out as {self.units.layout!r} met a tensor of shape "
                    f"{tuple(x.shape)}; make the patch again for this model"
                )
        return table.repeat(times) if any(time != 1 for time in times) else table


def prelu_slopes(units: Units, alpha: float) -> Tensor | None:
    """Return the slopes of a ``nn.PReLU`` that does the same, or None where the units are not on axis 1.

    It gives -0.0 where a ReLU gives 0.0, which compares equal.
    """
    axes = units.layout.split(" ")
    if units.rank != len(axes) + 1 or axes[0] != f"u{units.count}" or any(axis != "." for axis in axes[1:]):
        return None
    return torch.from_numpy(mask_of(units.ranges, units.count)).double() * alpha


# Layouts.


def layout_of(axes: Axes) -> str | None:
    """Spell where the units are; None where their axis holds samples between or behind them."""
    first = next((i for i, axis in enumerate(axes) if has(axis, UNIT)), None)
    if first is None:
        return None
    strides = _dense_strides(axes)
    words = []
    for axis in axes[first:]:
        word = _spelled(axis, strides)
        if word is None:
            return None
        words.append(word)
    return " ".join(words)


def _dense_strides(axes: Axes) -> dict[tuple[int, int], int]:
    """Map (size, stride) of each unit atom to its stride among the site's units, which are numbered without gaps."""
    atoms = sorted({(a.size, a.stride) for axis in axes for a in axis if a.role == UNIT}, key=lambda item: item[1])
    out, stride = {}, 1
    for size, given in atoms:
        out[size, given] = stride
        stride *= size
    return out


def _spelled(axis: Axis, strides: dict[tuple[int, int], int]) -> str | None:
    if not has(axis, UNIT):
        return "."
    lead = next(i for i, atom in enumerate(axis) if atom.role == UNIT)
    words = ["n"] if lead else []
    for atom in axis[lead:]:
        if atom.role == SAMPLE:
            return None
        stride = strides[atom.size, atom.stride] if atom.role == UNIT else 1
        words.append(f"{'p' if atom.role == POSITION else 'u'}{atom.size}{f':{stride}' if stride != 1 else ''}")
    return "*".join(words)


def _table(units: Units) -> tuple[Tensor, Sequence[bool]]:
    """Return a mask over the axes of the layout, and which of them repeat."""
    wrong = layout_fault(units.layout, units.count)
    if wrong:
        raise PatchError(f"{wrong}; make the patch again")
    chosen = torch.from_numpy(mask_of(units.ranges, units.count))
    axes = units.layout.split(" ")
    index = torch.zeros([1] * len(axes), dtype=torch.int64)
    for dim, axis in enumerate(axes):
        along = torch.zeros(1, dtype=torch.int64)
        for role, size, stride in re.findall(r"([up])(\d+)(?::(\d+))?", axis):
            step = torch.arange(int(size)) * (int(stride or 1) if role == "u" else 0)
            along = (along[:, None] + step).flatten()
        index = index + along.view([-1 if i == dim else 1 for i in range(len(axes))])
    return chosen[index], [axis.startswith("n*") for axis in axes]
