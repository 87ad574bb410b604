"""Rules of operators that pick entries by an index, or put them there: a picked row remembers its sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from deadcheck.calls import Call, Result, axes_of
from deadcheck.layout import (
    SAMPLE,
    UNIT,
    Axes,
    Axis,
    Flow,
    Known,
    broadcast,
    concatenate,
    demote,
    fresh,
    has,
    joined,
    positions,
    samples,
    units,
)


def _picked(flow: Flow, call: Call, dim: int, eaten: int, chosen: tuple[Any, ...], new: Sequence[int]) -> Flow:
    """Entries of ``eaten`` axes from ``dim`` on picked by indices: each new row remembers its sample."""
    axes = axes_of(flow)
    gone, others = axes[dim : dim + eaten], axes[:dim] + axes[dim + eaten :]
    made = [positions(size) for size in new]
    rows = flow.rows
    if any(has(axis, SAMPLE) for axis in gone):
        if any(has(axis, SAMPLE) for axis in others):
            return Flow(None, flow.feeds)  # two axes would count samples
        rows = _sample_of_each(gone, flow.rows, chosen[0].device)[chosen].reshape(-1)
        steps = [math.prod(new[i + 1 :]) for i in range(len(new))]
        made = [samples(size, step) for size, step in zip(new, steps, strict=True)]
    is_whole_layer = eaten == 1 and len(new) == 1 and len(gone[0]) == 1 and has(gone[0], UNIT)
    if is_whole_layer:
        made = [units(new[0])]
    moved = settled(flow._replace(axes=(*axes[:dim], *made, *axes[dim + eaten :]), rows=rows), call.batch)
    lost = any(has(axis, UNIT) for axis in gone) and not is_whole_layer
    return moved.demoted() if lost else moved


def _sample_of_each(axes: Axes, rows: Any, device: Any) -> Any:
    """Return the sample of each entry of these axes, in their shape."""
    shape = [math.prod(atom.size for atom in axis) for axis in axes]
    total = torch.zeros(shape, dtype=torch.int64, device=device)
    for dim, axis in enumerate(axes):
        inner = shape[dim]
        for atom in axis:
            inner //= atom.size
            if atom.role == SAMPLE:
                along = (torch.arange(shape[dim], device=device) // inner) % atom.size * atom.stride
                total += along.view([-1 if i == dim else 1 for i in range(len(shape))])
    if rows is None:
        return total
    return _as_tensor(rows, device)[total]


def _as_tensor(rows: Any, device: Any = None) -> Any:
    return torch.as_tensor(list(rows) if isinstance(rows, range) else rows, device=device)


def index_select(flow: Flow, call: Call) -> Flow:
    """Carry entries picked along one axis."""
    dim = call.args[1] % len(axes_of(flow))
    return _picked(flow, call, dim, 1, (call.args[2],), [call.shape[dim]])


def index(flow: Flow, call: Call) -> Flow | None:
    """Carry entries picked by a mask, or by one or more indices side by side."""
    used = [i for i, index in enumerate(call.args[1]) if index is not None]
    chosen = tuple(call.args[1][i] for i in used)
    spans = [_spans(index) for index in chosen]
    eaten, added = spans[0] if len(spans) == 1 else (len(used), max(added for _, added in spans))
    is_plain = len(spans) == 1 or all(index.dtype == torch.int64 for index in chosen)
    if used[-1] - used[0] != len(used) - 1 or not is_plain or len(axes_of(flow)) - eaten + added != len(call.shape):
        return Flow(None, flow.feeds)
    return _picked(flow, call, used[0], eaten, chosen, call.shape[used[0] : used[0] + added])


def masked(call: Call) -> Result | None:
    """Carry entries picked by a mask one by one."""
    flow, mask = call.flow(0), call.args[1]
    if flow is None or flow.axes is None or mask.shape != call.args[0].shape:
        return [flow] if flow is None else [Flow(None, flow.feeds)]
    return [_picked(flow, call, 0, mask.dim(), (mask,), call.shape)]


def _spans(index: Any) -> tuple[int, int]:
    """Return how many axes an index takes, and how many it makes."""
    is_mask = index.dtype in (torch.bool, torch.uint8)
    return (index.dim(), 1) if is_mask else (1, index.dim())


def gather(flow: Flow, call: Call) -> Flow:
    """Carry entries picked one by one along an axis, which stands for positions from here on."""
    return _reordered(flow, call.argument(1, "dim", -1), call.shape)


def ordered(call: Call) -> Result | None:
    """Carry sorted or chosen entries: their order along the axis is another for each."""
    flow = call.flow(0)
    if flow is None or flow.axes is None:
        return None
    last = {"topk": 2, "kthvalue": 2}.get(call.name, 1)
    dim = call.argument(last, "dim", -1)
    return [_reordered(flow, dim if isinstance(dim, int) else -1, tuple(out.shape)) for out in call.outputs]


def _reordered(flow: Flow, dim: int, shape: tuple[int, ...]) -> Flow:
    axes = axes_of(flow)
    if len(axes) != len(shape):
        return Flow(None, flow.feeds)
    gone = axes[dim]
    sizes = [math.prod(atom.size for atom in axis) for axis in axes]
    kept = (axis if size == new else positions(new) for axis, size, new in zip(axes, sizes, shape, strict=True))
    moved = list(kept)
    moved[dim] = positions(shape[dim])
    result = flow._replace(axes=tuple(moved))
    result = result.demoted() if has(gone, UNIT) else result
    return result.unsampled() if has(gone, SAMPLE) else result


def turned(call: Call) -> Result | None:
    """Carry a flip or a roll: along the samples each row keeps its own."""
    flow, tensor = call.flow(0), call.args[0]
    if flow is None or flow.axes is None:
        return None
    rank = len(flow.axes)
    dims = call.args[1] if call.name == "flip" else call.argument(2, "dims", ())
    moved = {dim % rank for dim in dims if has(flow.axes[dim % rank], SAMPLE)}
    if not moved and dims:
        return [flow]
    (dim,) = moved if len(moved) == 1 else (None,)
    if dim is None or len(flow.axes[dim]) != 1:
        return [flow.unsampled()]
    rows = torch.arange(tensor.shape[dim]) if flow.rows is None else _as_tensor(flow.rows)
    step = 0 if call.name == "flip" else call.args[1][[d % rank for d in dims].index(dim)]
    return [flow._replace(rows=rows.flip(0) if call.name == "flip" else rows.roll(step))]


# Entries that are put into a tensor.


def put_along(call: Call) -> Result | None:
    """Carry rows added or written along one axis, as messages to their nodes or tokens from their experts."""
    into, source = call.look(call.args[0]), call.args[3] if len(call.args) > 3 else None
    if not isinstance(call.look(source), Flow) and not isinstance(into, Flow):
        source = call.args[2]  # a number is put where the index says, as in a one-hot code
    known = call.look(source)
    if not isinstance(known, Flow) or source is None:
        return [into]
    dim = call.args[1] % max(len(call.shape), 1)
    if known.axes is None or len(known.axes) != len(call.shape):
        return [_put(into, call, None, known)]
    axes = [
        axis if size == new else positions(new)
        for axis, size, new in zip(known.axes, source.shape, call.shape, strict=True)
    ]
    axes[dim], rows = fresh(call.shape, call.batch)[dim], None
    lost = has(known.axes[dim], UNIT)
    if any(has(axis, SAMPLE) for i, axis in enumerate(axes) if i != dim):
        rows = known.rows
    elif has(known.axes[dim], SAMPLE) and not has(axes[dim], SAMPLE):
        of = _sample_of_each((known.axes[dim],), known.rows, source.device)
        axes[dim], rows = _gathered(of, _along(call.args[2], dim), call.shape[dim], call.batch) or (axes[dim], None)
    flow = known._replace(axes=tuple(axes), rows=rows)
    return [_put(into, call, flow.demoted() if lost else flow, known)]


def _along(index: Any, dim: int) -> Any:
    """Return an index along one axis; None where it is another for each of the other entries."""
    others = tuple(i for i in range(index.dim()) if i != dim)
    first = index[tuple(slice(None) if i == dim else slice(1) for i in range(index.dim()))]
    is_same = all(index.stride(i) == 0 or index.shape[i] == 1 for i in others) or bool((index == first).all())
    return first.reshape(-1) if is_same else None


def _gathered(of: Any, index: Any, size: int, batch: int) -> tuple[Axis, Any] | None:
    """Return the axis of what rows of these samples were put into, and its rows; None where samples were mixed.

    An entry that got no row is of the sample that its place says, if all others are, as nodes without a message are.
    """
    if index is None or index.shape != of.shape:
        return None
    told = torch.full((size,), -1, dtype=of.dtype, device=of.device)
    told[index] = of
    if not bool((told[index] == of).all()):
        return None
    each = size // batch
    own = torch.arange(size, device=of.device)
    for axis, sample in (
        (samples(batch) + positions(each), own // max(each, 1)),
        (positions(each) + samples(batch), own % batch),
    ):
        if each * batch == size and bool(((told == sample) | (told < 0)).all()):
            return axis, None
    return None if bool((told < 0).any()) else (samples(size), told)


def put(call: Call) -> Result | None:
    """Carry values written at one index or mask."""
    into, value = call.look(call.args[0]), call.args[2]
    known = call.look(value)
    if not isinstance(known, Flow):
        return [into if isinstance(into, Flow) or known is not None else None]
    used = [i for i, index in enumerate(call.args[1]) if index is not None]
    if len(used) != 1 or known.axes is None:
        return [_put(into, call, None, known)]
    start = used[0] + _spans(call.args[1][used[0]])[0]
    tail = known.axes[len(known.axes) - len(call.shape) + start :] if start < len(call.shape) else ()
    if len(tail) != len(call.shape) - start:
        return [_put(into, call, None, known)]
    lead, rows = fresh(call.shape, call.batch)[:start], None
    if start == 1 and len(value.shape) == len(call.shape) and has(known.axes[0], SAMPLE) and not has(lead[0], SAMPLE):
        index = call.args[1][0]
        index = index if index.dtype == torch.int64 else index.nonzero().squeeze(1)
        of = _sample_of_each(known.axes[:1], known.rows, value.device)
        axis, rows = _gathered(of, index, call.shape[0], call.batch) or (lead[0], None)
        lead = (axis,)
    told = any(has(axis, UNIT) for axis in tail)
    axes = (*lead, *(demote(axis, SAMPLE) for axis in tail))
    flow = Flow(axes, known.feeds, known.axis_from if told else None, rows=rows)
    return [_put(into, call, flow, known)]


def _put(into: Known | None, call: Call, made: Flow | None, source: Flow) -> Flow:
    """What was there tells the axes where it can; else what was put there does."""
    feeds = joined((*(into.feeds if isinstance(into, Flow) else ()), *source.feeds))
    made = made if made is not None and made.fits(call.shape) else None
    if not isinstance(into, Flow) or into.axes is None:
        return Flow(None, feeds) if made is None else made._replace(feeds=feeds)
    if into.axis_from is None and made is not None and made.axis_from is not None:
        axes = tuple(
            new if has(new, UNIT) or not new else old for old, new in zip(into.axes, axes_of(made), strict=True)
        )
        return Flow(axes, feeds, made.axis_from, made.offset, into.rows)
    return into._replace(feeds=feeds)


def kept(call: Call) -> Result | None:
    """Carry a tensor of which some entries were replaced by others of the same shape."""
    into, value = call.look(call.args[0]), call.flow(2 if call.name.startswith("masked") else 1)
    if not isinstance(into, Flow):
        return None
    return [into._replace(feeds=joined((*into.feeds, *(value.feeds if value is not None else ()))))]


def copied(call: Call) -> Result | None:
    """Carry a copy into memory that was there."""
    known = call.look(call.args[1])
    return [broadcast([(known, tuple(call.args[1].shape))], call.shape) if isinstance(known, Flow) else known]


def written(whole: Known | None, base: Any, part: Any, flow: Known | None, batch: int) -> Known | None:
    """Return what is known of a tensor after a view of it was written to."""
    if not isinstance(flow, Flow):
        return whole if isinstance(whole, Flow) or flow is not None else None
    made = Flow(None, flow.feeds) if flow.axes is None else _spread(settled(flow, batch), base, part, batch)
    if not isinstance(whole, Flow) or whole.axes is None:
        return made
    feeds = joined((*whole.feeds, *flow.feeds))
    return made._replace(feeds=feeds) if made.axis_from and not whole.axis_from else whole._replace(feeds=feeds)


def _spread(flow: Flow, base: Any, part: Any, batch: int) -> Flow:
    """Return the flow of a whole tensor, told from a view of it by the steps of both through the memory."""
    axes: list[Axis] = []
    for size, step in zip(base.shape, base.stride(), strict=True):
        dims = [d for d in range(part.dim()) if part.stride(d) == step and part.shape[d] > 1]
        axis = axes_of(flow)[dims[0]] if dims else ()
        is_whole = bool(dims) and part.shape[dims[0]] == size
        is_part_of_units = len(axis) == 1 and has(axis, UNIT)
        axes.append(axis if is_whole else units(size) if is_part_of_units else positions(size))
    alone = not any(has(axis, SAMPLE) for axis in axes) and base.dim() > 0 and base.shape[0] == batch
    if alone and flow.rows is not None and len(flow.rows) == 1:  # filled sample by sample
        return Flow((samples(batch), *axes[1:]), flow.feeds, flow.axis_from)
    return Flow(tuple(axes), flow.feeds, flow.axis_from, rows=flow.rows)


def settled(flow: Flow, batch: int) -> Flow:
    """Return the flow with its samples on one axis, where several axes count them and one alone tells them apart."""
    dims = [dim for dim, axis in enumerate(axes_of(flow)) if has(axis, SAMPLE)]
    if len(dims) > 1 and flow.rows is not None:
        of_each = _sample_of_each(tuple(flow.axes[dim] for dim in dims), flow.rows, None)  # type: ignore[index]
        for place, dim in enumerate(dims):
            rows = of_each.movedim(place, 0).reshape(of_each.shape[place], -1)
            if bool((rows == rows[:, :1]).all()):
                axes = [demote(axis, SAMPLE) for axis in axes_of(flow)]
                axes[dim] = samples(len(rows))
                flow = flow._replace(axes=tuple(axes), rows=rows[:, 0])
                break
    return _in_order(flow, batch)


def _in_order(flow: Flow, batch: int) -> Flow:
    """Return the flow without its rows where they are those of all samples in their order, as a view would give them.

    What was picked and what was not can then be told to be of the same samples when they meet.
    """
    rows, axes = flow.rows, axes_of(flow)
    if not isinstance(rows, torch.Tensor) or not batch or len(rows) % batch:
        return flow
    each = len(rows) // batch
    dims = [dim for dim, axis in enumerate(axes) if has(axis, SAMPLE)]
    axis = axes[dims[0]] if len(dims) == 1 else ()
    own = torch.arange(batch, device=rows.device)
    if each == 1 and bool((rows == own).all()):
        return flow._replace(rows=None)
    if axis != samples(len(rows)) or not each:
        return flow
    for split, told in (
        (samples(batch) + positions(each), rows.view(batch, each) == own[:, None]),
        (positions(each) + samples(batch), rows.view(each, batch) == own),
    ):
        if bool(told.all()):
            return flow._replace(axes=(*axes[: dims[0]], split, *axes[dims[0] + 1 :]), rows=None)
    return flow


def packed(call: Call) -> Result | None:
    """Carry padded sequences packed time step by time step: row r of a step is the r-th longest sequence."""
    flow = call.flow(0)
    if flow is None or flow.axes is None:
        return None
    dim = 0 if call.argument(2, "batch_first", False) else 1
    size = call.args[0].shape[dim]
    if not has(flow.axes[dim], SAMPLE) or len(flow.axes[dim]) != 1:
        return None
    base = torch.arange(size) if flow.rows is None else torch.as_tensor(flow.rows)
    rows = torch.cat([base[:count] for count in call.outputs[1].tolist()])
    return [flow._replace(axes=(samples(len(rows)), *flow.axes[2:]), rows=rows), None]


def joined_along(call: Call) -> Result | None:
    """Carry tensors joined along an axis."""
    tensors = call.args[0]
    known = [call.look(tensor) for tensor in tensors]
    if not any(isinstance(item, Flow) for item in known):
        return None
    dim = call.argument(1, "dim", 0) % max(len(call.shape), 1)
    # An empty 1-D tensor is allowed in any cat and adds nothing.
    kept = [(k, t) for k, t in zip(known, tensors, strict=True) if t.dim() == len(call.shape)]
    flows, sizes = [k if isinstance(k, Flow) else None for k, _ in kept], [t.shape[dim] for _, t in kept]
    flow = concatenate(flows, sizes, dim)
    rows = _joined_rows(flows, sizes, dim)
    if rows is None or flow.axes is None or any(has(axis, SAMPLE) for axis in flow.axes):
        return [flow]
    return [flow._replace(axes=(*flow.axes[:dim], samples(len(rows)), *flow.axes[dim + 1 :]), rows=rows)]


def _joined_rows(flows: Sequence[Flow | None], sizes: Sequence[int], dim: int) -> Any:
    """Return the sample of each row of tensors joined along their samples; None where that is not what was done."""
    rows = []
    for flow, size in zip(flows, sizes, strict=True):
        if flow is None or flow.axes is None:
            return None
        axis, own = flow.axes[dim], torch.arange(size) if flow.rows is None else _as_tensor(flow.rows)
        is_one = not axis and flow.rows is not None
        if len(own) != size or not (is_one or axis == samples(size)) or (not axis and not is_one):
            return None
        rows.append(own)
    return torch.cat(rows)


def repeated(flow: Flow, call: Call) -> Flow:
    """Carry a tensor laid side by side with itself."""
    times, axes = call.args[1], axes_of(flow)
    lead = len(times) - len(axes)
    made = (positions(n) + (axes[i - lead] if i >= lead else ()) for i, n in enumerate(times))
    return flow._replace(axes=tuple(made))
