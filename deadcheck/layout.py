"""What each axis of a tensor stands for (samples, units, positions), followed from operator to operator.

An axis is a product of atoms in row-major order: after ``conv -> flatten(1)`` the last axis holds the atoms
``units C`` and ``positions H*W``, so the units are still the convolution's channels. Views, permutes, slices and
concatenations only rearrange atoms; a layer with weights makes new units. No torch is needed: rules see shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

SAMPLE, UNIT, POSITION = "s", "u", "p"


class Atom(NamedTuple):
    """A factor of an axis: what it counts, how many, and the step in the sample or unit index."""

    role: str
    size: int
    stride: int = 1


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


class Feed(NamedTuple):
    """One run of something whose output reaches a tensor."""

    name: str
    """Module path, or the operator where there is no module."""

    weight: str
    """Full name of the parameter: the identity of the feeder, finer than its module."""

    serial: int
    """Number of the run within this forward pass."""

    direct: bool = True
    """False for what stands before another activation, or has no parameters."""


_LOST: range = range(0)
"""Rows of a flow whose samples were lost: no row is any sample's."""


class Flow(NamedTuple):
    """What is known of a tensor that depends on the data."""

    axes: Axes | None
    """None when an operator was met whose effect on the axes is not known."""

    feeds: tuple[Feed, ...] = ()
    axis_from: str | None = None
    """What made the units; None when there are none yet."""

    offset: int = 0
    """Index of the first unit, for a slice of a layer's units."""

    rows: Any = None
    """Sample of each row (a tensor or a range), where the sample atoms count rows that were picked; else None."""

    presumed: bool = False
    """Whether the samples are told by nothing but the length of the first axis, as in a state of zeros."""

    @property
    def is_blank(self) -> bool:
        """Whether nothing of the data is in it, as in a state of zeros that has not met the data."""
        return self.presumed and not self.feeds

    def demoted(self) -> Flow:
        """Return the flow with its units turned into positions."""
        axes = None if self.axes is None else tuple(demote(axis) for axis in self.axes)
        return Flow(axes, self.feeds, rows=self.rows, presumed=self.presumed)

    def unsampled(self) -> Flow:
        """Return the flow with its samples turned into positions, where they can no longer be told apart."""
        axes = None if self.axes is None else tuple(demote(axis, SAMPLE) for axis in self.axes)
        return self._replace(axes=axes, rows=_LOST)

    def fits(self, shape: Sequence[int]) -> bool:
        """Tell whether the axes are those of a tensor of this shape."""
        if self.axes is None:
            return True
        return len(self.axes) == len(shape) and all(
            math.prod(atom.size for atom in axis) == size for axis, size in zip(self.axes, shape, strict=True)
        )


class Weight(NamedTuple):
    """What is known of a tensor made from parameters or buffers alone."""

    owner: str
    """Path of the module that holds it."""

    name: str
    parameter: bool
    size: int = 0
    """Elements that are its own: an expanded or copied weight has more."""

    others: tuple[Weight, ...] = ()
    """Weights that stand beside it in one tensor, as those of an ensemble."""

    start: int = 0
    """Element of the parameter at which it begins: experts or layers that share a parameter are layers of their own."""

    entry: tuple[int, ...] = ()
    """Indices of the innermost entry that it lies in, ``weight[2][1]``; none where it lies in more than one."""

    base: int = 0
    """Element at which that entry begins."""

    step: int = 0
    """Elements of each entry of that entry."""

    @property
    def identity(self) -> str:
        """What tells it from other weights and parts: name and entry, and where it begins in the middle of that."""
        entry = self.name + "".join(f"[{index}]" for index in self.entry)
        return entry if self.start == self.base else f"{entry}[{self.start - self.base}:]"

    def part(self, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Weight:
        """Return what is known of a view of it that begins at this element."""
        size, start = math.prod(shape), self.start + offset
        spans = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
        part = self._replace(start=start, size=min(self.size, size))
        index, into = divmod(start - self.base, self.step or 1)
        if size != self.step or into or sum(spans) >= self.step:
            return part
        step = max((stride for n, stride in zip(shape, strides, strict=True) if n > 1), default=0)
        return part._replace(entry=(*self.entry, index), base=start, step=step)


CONSTANT = Weight("", "", parameter=False)
"""What is known of a tensor made from numbers in the code alone, such as positions."""

Known = Flow | Weight


def positions(size: int) -> Axis:
    """Return an axis that holds nothing but positions."""
    return (Atom(POSITION, size),) if size != 1 else ()


def units(size: int, stride: int = 1) -> Axis:
    """Return an axis that holds nothing but units."""
    return (Atom(UNIT, size, stride),) if size != 1 else ()


def samples(size: int, stride: int = 1) -> Axis:
    """Return an axis that holds nothing but samples."""
    return (Atom(SAMPLE, size, stride),) if size != 1 else ()


def demote(axis: Axis, role: str = UNIT) -> Axis:
    """Return the axis with every atom of a role turned into positions."""
    return tuple(Atom(POSITION, a.size) if a.role == role else a for a in axis)


def has(axis: Axis, role: str) -> bool:
    """Tell whether the axis holds atoms of a role."""
    return any(atom.role == role for atom in axis)


def count(axes: Axes, role: str) -> int:
    """Return the number of samples, units or positions that the axes span."""
    return math.prod(atom.size for axis in axes for atom in axis if atom.role == role)


def fresh(shape: Sequence[int], batch: int) -> Axes:
    """Return the axes of an input: the first one holds the samples if it is as long as the batch."""
    return tuple(samples(size) if index == 0 and size == batch else positions(size) for index, size in enumerate(shape))


def _merged(atoms: Iterable[Atom]) -> list[Atom]:
    """Join neighbours that count the same thing without a gap."""
    out: list[Atom] = []
    for atom in atoms:
        last = out[-1] if out else None
        joins = last is not None and last.role == atom.role
        if joins and last is not None and (atom.role == POSITION or last.stride == atom.stride * atom.size):
            out[-1] = Atom(atom.role, last.size * atom.size, atom.stride)
        else:
            out.append(atom)
    return out


def reshape(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Return the axes after a view to ``shape``, or None where an atom would be cut unevenly."""
    queue = _merged(atom for axis in axes for atom in axis)[::-1]
    out: list[Axis] = []
    for size in shape:
        axis: list[Atom] = []
        need = size
        while need != 1:
            if need == 0 or not queue or queue[-1].size == 0:
                return None
            atom = queue.pop()
            if need % atom.size == 0:
                axis.append(atom)
                need //= atom.size
            elif atom.size % need == 0:
                inner = atom.size // need
                axis.append(Atom(atom.role, need, atom.stride * inner))
                queue.append(Atom(atom.role, inner, atom.stride))
                need = 1
            else:
                return None
        out.append(tuple(axis))
    return tuple(out) if not queue else None


def slice_axis(flow: Flow, dim: int, start: int, size: int, step: int = 1) -> Flow:
    """Return the flow after taking ``size`` entries of axis ``dim`` from ``start`` on."""
    if flow.axes is None:
        return flow
    axis = flow.axes[dim]
    if math.prod(atom.size for atom in axis) == size:
        return flow
    outer, inner = axis[0], axis[1:]
    block = math.prod(atom.size for atom in inner)
    aligned = start % block == 0 and size % block == 0 and (step == 1 or block == 1)
    taken, offset, axis_from = size // block, flow.offset, flow.axis_from
    if not aligned:
        sliced, axis_from = positions(size), None if has(axis, UNIT) else axis_from
    elif outer.role == UNIT:
        sliced = units(taken, outer.stride * step) + inner
        offset += start // block * outer.stride
    else:
        sliced = positions(taken) + inner
    rows = flow.rows
    if outer.role == SAMPLE and aligned and not has(inner, SAMPLE):
        known = range(outer.size) if rows is None else rows
        rows = known[start // block : start // block + (taken - 1) * step + 1 : step]
        sliced = samples(taken) + inner
    elif has(axis, SAMPLE) and not (aligned and outer.role != SAMPLE):
        lost = (*flow.axes[:dim], positions(size), *flow.axes[dim + 1 :])
        return flow._replace(axes=lost, axis_from=axis_from, offset=0).unsampled()
    axes = (*flow.axes[:dim], sliced, *flow.axes[dim + 1 :])
    result = flow._replace(axes=axes, axis_from=axis_from, offset=offset, rows=rows)
    return result if axis_from or not flow.axis_from else result.demoted()


def drop_axes(flow: Flow, dims: Iterable[int], *, keepdim: bool = False) -> Flow:
    """Return the flow after a reduction over ``dims``; units that were reduced over as a whole are gone."""
    if flow.axes is None:
        return flow
    gone = {dim % len(flow.axes) for dim in dims} if flow.axes else set()
    axes = tuple(() if i in gone else axis for i, axis in enumerate(flow.axes) if keepdim or i not in gone)
    if not any(has(flow.axes[dim], UNIT) for dim in gone):
        return flow._replace(axes=axes)
    if count(axes, UNIT) == 1:
        return flow._replace(axes=axes, axis_from=None, offset=0)
    return flow._replace(axes=_renumbered(axes), offset=0)


def _renumbered(axes: Axes) -> Axes:
    """Count the units anew, in the order they had, where only some of the atoms that made them are left."""
    steps = sorted({(atom.stride, atom.size) for axis in axes for atom in axis if atom.role == UNIT})
    new, stride = {}, 1
    for step in steps:
        new[step] = stride
        stride *= step[1]
    return tuple(
        tuple(a._replace(stride=new[a.stride, a.size]) if a.role == UNIT else a for a in axis) for axis in axes
    )


def concatenate(flows: Sequence[Flow | None], sizes: Sequence[int], dim: int) -> Flow:
    """Return the flow of ``torch.cat`` of tensors whose axis ``dim`` has the given sizes."""
    known = [flow for flow in flows if flow is not None and flow.axes is not None]
    feeds = joined(feed for flow in flows if flow is not None for feed in flow.feeds)
    if not known:
        return Flow(None, feeds)
    base = next((flow for flow in known if flow.axis_from), known[0])
    assert base.axes is not None
    axis, axis_from = _joined_axis(base, known, sizes, dim), base.axis_from
    if axis is None:
        axis, axis_from = positions(sum(sizes)), None
    axes = (*base.axes[:dim], axis, *base.axes[dim + 1 :])
    flow = base._replace(axes=axes, feeds=feeds, axis_from=axis_from, offset=0)
    if not agree(known):
        flow = flow.unsampled()
    return flow if axis_from or not base.axis_from else flow.demoted()


def agree(flows: Sequence[Flow]) -> bool:
    """Tell whether the rows of several tensors belong to the same samples."""
    first = flows[0].rows if flows else None
    for flow in flows[1:]:
        rows = flow.rows
        if rows is first:
            continue
        if rows is None or first is None or type(rows) is not type(first):
            return False
        if not (rows == first if isinstance(rows, range) else rows.equal(first)):
            return False
    return True


def _joined_axis(base: Flow, known: Sequence[Flow], sizes: Sequence[int], dim: int) -> Axis | None:
    assert base.axes is not None
    axis = base.axes[dim]
    if base.axis_from and _holds_units(base, dim):
        inner = axis[1:] if axis and axis[0].role == UNIT else ()
        block = math.prod(atom.size for atom in inner)
        uneven = any(size % block for size in sizes)
        other = any(f.axes[dim][1:] != inner for f in known if f.axes and f.axes[dim])
        if has(inner, UNIT) or uneven or other:
            return None
        return units(sum(sizes) // block) + inner
    if has(axis, SAMPLE) and all(flow.axes and flow.axes[dim] == axis for flow in known) and len(set(sizes)) == 1:
        return positions(len(sizes)) + axis
    return None if has(axis, UNIT) else positions(sum(sizes))


def _holds_units(flow: Flow, dim: int) -> bool:
    """Tell whether axis ``dim`` is where the units are; a layer of one unit has no atom, so its axis is empty."""
    assert flow.axes is not None
    axis = flow.axes[dim]
    if axis and axis[0].role == UNIT:
        return True
    return not axis and count(flow.axes, UNIT) == 1 and flow.axis_from != "guess"


def joined(feeds: Iterable[Feed]) -> tuple[Feed, ...]:
    """Return the feeds without repetition, in order; with a direct one among them the indirect ones go."""
    unique = tuple(dict.fromkeys(feeds))
    direct = tuple(feed for feed in unique if feed.direct)
    return direct or unique


def broadcast(flows: Sequence[tuple[Flow, Sequence[int]]], shape: Sequence[int]) -> Flow:
    """Return the flow of an elementwise operator over operands (with their shapes) that broadcast to ``shape``."""
    feeds = joined(feed for flow, _ in flows for feed in flow.feeds)
    known = [(flow, given) for flow, given in flows if flow.axes is not None]
    if not known:
        return Flow(None, feeds)
    main, main_shape = max(known, key=lambda item: (item[0].axis_from is not None, math.prod(item[1])))
    # One operand alone says where the samples are: of two that differ, one is as long as the batch by chance.
    sampled = [item for item in known if any(has(axis, SAMPLE) for axis in item[0].axes or ())]
    sampled = [item for item in sampled if not item[0].presumed] or sampled
    leads = not sampled or any(flow is main for flow, _ in sampled)
    source, source_shape = (main, main_shape) if leads else sampled[0]
    axes = tuple(
        _broadcast_axis(_facing(main, main_shape, back, size), _facing(source, source_shape, back, size), size)
        for back, size in zip(range(len(shape), 0, -1), shape, strict=True)
    )
    result = Flow(axes, feeds, main.axis_from, main.offset, source.rows)
    told = [flow for flow, _ in known if flow.rows is not None or any(flow is other for other, _ in sampled)]
    result = result._replace(presumed=source.presumed)
    return result if agree(told) else result.unsampled()


def _facing(flow: Flow, shape: Sequence[int], back: int, size: int) -> Axis:
    """Return the axis of an operand that faces an axis of the output, counted from the back."""
    assert flow.axes is not None
    return flow.axes[-back] if len(shape) >= back and shape[-back] == size else ()


def _broadcast_axis(main: Axis, source: Axis, size: int) -> Axis:
    if has(main, UNIT) or has(main, SAMPLE):
        return main
    return demote(source) if has(source, SAMPLE) else main or positions(size)


def guessed(shape: Sequence[int], flow: Flow | None, batch: int) -> Flow:
    """Return a flow with units where nothing told them: axis 1 of 4 or more, else the last axis."""
    axes = flow.axes if flow is not None and flow.axes is not None else fresh(shape, batch)
    axes = tuple(demote(axis) for axis in axes)
    feeds = flow.feeds if flow is not None else ()
    rows = flow.rows if flow is not None else None
    free = [i for i, axis in enumerate(axes) if not has(axis, SAMPLE)]
    if not free or (batch == 1 and len(axes) == 1):
        return Flow(axes, feeds, "guess", rows=rows)
    dim = 1 if len(axes) >= 4 and 1 in free else free[-1]
    return at_axis(Flow(axes, feeds, rows=rows), shape, dim, "guess")


def at_axis(flow: Flow, shape: Sequence[int], dim: int, axis_from: str) -> Flow:
    """Return the flow with the whole of axis ``dim`` as its units."""
    plain = flow.demoted()
    assert plain.axes is not None
    dim %= len(shape)
    made, stride = units(shape[dim]), 1
    if has(plain.axes[dim], SAMPLE) and axis_from != "user":  # samples times channels, as in an instance norm
        made = ()
        for atom in reversed(plain.axes[dim]):
            made = (atom if atom.role == SAMPLE else Atom(UNIT, atom.size, stride), *made)
            stride *= 1 if atom.role == SAMPLE else atom.size
    return plain._replace(axes=(*plain.axes[:dim], made, *plain.axes[dim + 1 :]), axis_from=axis_from)


class Plan(NamedTuple):
    """How to bring a tensor into the order samples, units, positions."""

    split: tuple[int, ...]
    """Shape in which every atom is an axis of its own."""

    samples_first: tuple[int, ...]
    """Permutation to samples, units, positions."""

    units_last: tuple[int, ...]
    """Permutation to samples, positions, units."""

    n_values: int
    n_samples: int
    n_units: int
    unit_axes: tuple[int, ...]
    """Axes of the tensor that hold units."""

    is_samples_first: bool
    """Whether the axes stand in the order samples, units, positions already."""

    is_units_last: bool
    """Whether they stand in the order samples, positions, units."""


def plan(axes: Axes) -> Plan:
    """Return how to order a tensor with these axes for counting."""
    atoms = [atom for axis in axes for atom in axis]
    by_role = {
        role: sorted((i for i, a in enumerate(atoms) if a.role == role), key=lambda i: -atoms[i].stride)
        for role in (SAMPLE, UNIT)
    }
    rest = [i for i, atom in enumerate(atoms) if atom.role == POSITION]
    as_it_is = list(range(len(atoms)))
    samples_first, units_last = by_role[SAMPLE] + by_role[UNIT] + rest, by_role[SAMPLE] + rest + by_role[UNIT]
    return Plan(
        split=tuple(atom.size for atom in atoms),
        samples_first=tuple(samples_first),
        units_last=tuple(units_last),
        n_values=math.prod(atom.size for atom in atoms),
        n_samples=count(axes, SAMPLE),
        n_units=count(axes, UNIT),
        unit_axes=tuple(i for i, axis in enumerate(axes) if has(axis, UNIT)),
        is_samples_first=samples_first == as_it_is,
        is_units_last=units_last == as_it_is,
    )
