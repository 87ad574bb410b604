"""What stands in for a ReLU: one function for all units, or for some of them while the others keep an exact ReLU."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deadcheck.errors import PatchError
from deadcheck.layout import POSITION, SAMPLE, UNIT, Axes, Axis, has
from deadcheck.plan import Kind, Replacement, Units, layout_fault
from deadcheck.ranges import mask_of

Function = Callable[[Tensor, bool], Tensor]
"""Takes the input of a ReLU and whether to write the result into it."""


def stand_in(replacement: Replacement, *, ceiling: float | None = None, units: Units | None = None) -> Function:
    """Return the function that stands in for a ReLU, or for a ReLU with a ceiling, which stays."""
    plain = _with_ceiling(_FUNCTIONS[replacement.kind](replacement.alpha), ceiling)
    return plain if units is None else _for_some(plain, UnitMask(units), ceiling)


def _leaky(alpha: float | None) -> Function:
    assert alpha is not None
    slope = alpha
    return lambda x, inplace: F.leaky_relu(x, slope, inplace)


def _elu(alpha: float | None) -> Function:
    assert alpha is not None
    scale = alpha
    return lambda x, inplace: F.elu(x, scale, inplace)


def _gelu(alpha: float | None) -> Function:
    return lambda x, inplace: x.copy_(F.gelu(x.clone())) if inplace else F.gelu(x)


def _silu(alpha: float | None) -> Function:
    return lambda x, inplace: F.silu(x, inplace)


_FUNCTIONS: dict[Kind, Callable[[float | None], Function]] = {
    Kind.LEAKY: _leaky,
    Kind.ELU: _elu,
    Kind.GELU: _gelu,
    Kind.SILU: _silu,
}


def _with_ceiling(function: Function, ceiling: float | None) -> Function:
    if ceiling is None:
        return function
    top = ceiling

    def clipped(x: Tensor, inplace: bool) -> Tensor:
        # Over a copy: what the first step keeps for backward must not be written over by the second.
        return x.copy_(function(x.clone(), False).clamp_max(top)) if inplace else function(x, False).clamp_max(top)

    return clipped


def _for_some(function: Function, mask: UnitMask, ceiling: float | None) -> Function:
    def chosen(x: Tensor, inplace: bool) -> Tensor:
        # The copy keeps what backward needs when the result is written over the input.
        z = x.clone() if inplace else x
        rest = F.relu(z) if ceiling is None else F.hardtanh(z, 0.0, ceiling)
        y = torch.where(mask.on(z), function(z, False), rest)
        return x.copy_(y) if inplace else y

    return chosen


class StandIn(nn.Module):
    """Stands in for a ReLU, or for some of its units, where no module of ``torch.nn`` can."""

    def __init__(
        self,
        replacement: Replacement,
        *,
        units: Units | None = None,
        ceiling: float | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.replacement, self.units, self.ceiling, self.inplace = replacement, units, ceiling, inplace
        self._function: Function | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Replace the chosen units, keep a ReLU for the others."""
        if self._function is None:
            self._function = stand_in(self.replacement, ceiling=self.ceiling, units=self.units)
        return self._function(x, self.inplace)

    def __getstate__(self) -> dict[str, object]:
        # The function is made again from what it stands for: a closure cannot be pickled.
        return {**self.__dict__, "_function": None}

    def extra_repr(self) -> str:
        """Say what is replaced."""
        which = "" if self.units is None else f", {self.units.replaced} of {self.units.count} units"
        ceiling = "" if self.ceiling is None else f", at most {self.ceiling:g}"
        return f"{self.replacement}{which}{ceiling}{', inplace=True' if self.inplace else ''}"


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
