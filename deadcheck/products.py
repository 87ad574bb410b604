"""Rules of products: a weight makes units, a fixed matrix mixes what is there, and data meets data in attention."""

from __future__ import annotations

import math
from typing import Any

from deadcheck.calls import Call, Result, Rule, axes_or_fresh, rows_of
from deadcheck.layout import (
    SAMPLE,
    UNIT,
    Atom,
    Axis,
    Flow,
    Known,
    Weight,
    demote,
    fresh,
    has,
    joined,
    positions,
    units,
)


def product(left: int, right: int) -> Rule:
    """Make the rule of a matrix product, or of a batch of them, whose factors stand at these positions."""

    def rule(call: Call) -> Result | None:
        a, b = call.look(call.args[left]), call.look(call.args[right])
        if isinstance(a, Weight) and isinstance(b, Weight):
            return [of_weights(call, left, right)]
        if isinstance(b, Weight):
            return [_weighted(call, (a, call.args[left]), (b, call.args[right]), -1)]
        if isinstance(a, Weight):
            return [_weighted(call, (b, call.args[right]), (a, call.args[left]), -2)]
        return [_contracted(a, b, call.shape)]

    return rule


def of_weights(call: Call, data_at: int, layer_at: int) -> Weight:
    """Return what is known of the output of a layer that runs on weights or constants alone."""
    data = call.weight(data_at)
    assert data is not None
    layer = call.weight(layer_at) or data
    if layer.name:
        call.feeds(layer)  # it ran
    tensor, matrix = call.args[data_at], call.args[layer_at]
    made = layer if layer.parameter else data
    # Queries repeated for each sample give copies, unless each of them meets a matrix of its own.
    has_copies = data.size and not tensor.numel() % data.size and not _has_several(call, layer, matrix)
    copies = tensor.numel() // data.size if has_copies else 1
    return made._replace(size=call.outputs[0].numel() // max(copies, 1))


def _has_several(call: Call, layer: Weight, matrix: Any) -> bool:
    return call.name in ("bmm", "baddbmm") and _matrices(layer, matrix) > 1


def _weighted(call: Call, data: tuple[Known | None, Any], layer: tuple[Weight, Any], dim: int) -> Flow:
    """Product of data and a weight; axis ``dim`` of the data is summed over, and the new axis stands there."""
    (known, tensor), (weight, matrix) = data, layer
    flow = known if isinstance(known, Flow) else Flow(None)
    axes = list(axes_or_fresh(known, tensor, call.batch))
    width, gone = call.shape[dim], axes[dim]
    if has(gone, SAMPLE) or (not weight.parameter and _stays(flow, gone)):
        return _mixed(flow._replace(axes=tuple(axes)), dim, width)
    axes = [demote(axis) for axis in axes]
    axes[dim] = units(width) if weight.name else positions(width)
    lead = () if len(axes) < 3 or not weight.name else _grouped(axes[0], _matrices(weight, matrix), width)
    if not weight.name or lead is None:  # a constant of the code, or weights shared in an order that is not known
        return Flow(tuple(demote(axis) for axis in axes), flow.feeds, rows=flow.rows)
    if len(axes) > 2:
        axes[0] = lead
    return Flow(tuple(axes), call.feeds(weight), "linear", rows=flow.rows, presumed=flow.axes is None or flow.presumed)


def _stays(flow: Flow, gone: Axis) -> bool:
    """Tell whether the units stand on another axis than the one that is summed over, as in a graph convolution."""
    return bool(flow.axis_from and gone and not has(gone, UNIT))


def _mixed(flow: Flow, dim: int, width: int) -> Flow:
    """Sum over an axis of samples, nodes or positions: the units stay; sample i stays where there are as many."""
    assert flow.axes is not None
    axes, gone = list(flow.axes), flow.axes[dim]
    same = math.prod(atom.size for atom in gone) == width
    axes[dim] = gone if same else positions(width)
    mixed = flow._replace(axes=tuple(axes))
    if has(gone, UNIT):
        return mixed.demoted()
    return mixed.unsampled() if has(gone, SAMPLE) and not same else mixed


def _matrices(weight: Weight, matrix: Any) -> int:
    """Return how many matrices a batch of them holds that are weights of their own."""
    if matrix.stride(0) == 0 or matrix.shape[0] == 1:
        return 1
    own = math.prod(int(size) for size in matrix.shape[1:])
    return max(weight.size // max(own, 1), 1)


def _grouped(axis: Axis, groups: int, width: int) -> Axis | None:
    """Return the first axis of a batch of products: each group's rows are units of their own."""
    rest = [atom for atom in axis if atom.role == SAMPLE]
    inner = [atom for atom in axis if atom.role != SAMPLE]
    if groups == 1:
        return axis
    if math.prod(atom.size for atom in inner) != groups or axis != (*rest, *inner):
        return None
    return (*rest, *(Atom(UNIT, groups, width) for _ in inner[:1]))


def _contracted(a: Known | None, b: Known | None, shape: tuple[int, ...]) -> Flow:
    """Product of two tensors that both depend on the data: attention scores, or values under them."""
    feeds = joined(feed for known in (a, b) if isinstance(known, Flow) for feed in known.feeds)
    left = a.axes if isinstance(a, Flow) else None
    right = b.axes if isinstance(b, Flow) else None
    if left is None and right is None:
        return Flow(None, feeds)
    rank = len(shape)
    lead = (right or left or ())[: rank - 2]
    rows = left[-2] if left else positions(shape[-2])
    columns = right[-1] if right else positions(shape[-1])
    if has(columns, UNIT) and isinstance(b, Flow):
        return Flow((*lead, demote(rows), columns), b.feeds, b.axis_from, b.offset, b.rows)
    if has(rows, UNIT) and isinstance(a, Flow):
        return Flow((*lead, rows, columns), a.feeds, a.axis_from, a.offset, a.rows)
    return Flow((*(demote(axis) for axis in lead), rows, columns), feeds)


def vector_product(call: Call) -> Result | None:
    """Carry a matrix times a vector."""
    a, b = call.look(call.args[0]), call.look(call.args[1])
    if isinstance(a, Weight) and isinstance(b, Weight):
        return [of_weights(call, 1, 0)]
    if isinstance(a, Weight):
        return [Flow((units(call.shape[0]),), call.feeds(a), "linear")]
    if not isinstance(a, Flow) or a.axes is None or not isinstance(b, Weight):
        return None
    return [Flow((demote(a.axes[0]),), call.feeds(b), "linear", rows=a.rows)]


def linear(call: Call) -> Result | None:
    """Carry a linear layer that arrives whole."""
    known, weight = call.look(call.args[0]), call.weight(1)
    if isinstance(known, Weight):
        return [of_weights(call, 0, 1)]
    lead = (demote(axis) for axis in axes_or_fresh(known, call.args[0], call.batch)[:-1])
    return [Flow((*lead, units(call.shape[-1])), call.feeds(weight), "linear", rows=rows_of(known))]


def grouped(call: Call) -> Result | None:
    """Carry a product of each group of rows, (rows, features), with a matrix of its own: the columns are units."""
    known, weight = call.look(call.args[0]), call.weight(1)
    if weight is None or len(call.shape) != 2 or isinstance(known, Weight):
        return None
    rows = demote(axes_or_fresh(known, call.args[0], call.batch)[0])
    return [Flow((rows, units(call.shape[1])), call.feeds(weight), "linear", rows=rows_of(known))]


def convolution(call: Call) -> Result | None:
    """Carry a convolution: channels are units; a fixed filter of each channel, as a blur, leaves them as they were."""
    shape, known, weight = call.shape, call.look(call.args[0]), call.weight(1)
    if isinstance(known, Weight):
        return [of_weights(call, 0, 1)]
    first, inputs = axes_or_fresh(known, call.args[0], call.batch)[:2]
    space = tuple(map(positions, shape[2:]))
    is_filter = weight is not None and not weight.parameter and call.args[1].shape[1] == 1
    if is_filter and isinstance(known, Flow) and known.axes is not None and inputs == units(shape[1]):
        return [known._replace(axes=(first, inputs, *space))]
    channels = units(shape[1])
    if inputs and inputs[0].role == SAMPLE and call.args[8] % inputs[0].size == 0:  # filters of each sample
        channels = (inputs[0], *units(shape[1] // inputs[0].size))
    transposed = "_transpose" if len(call.args) > 6 and call.args[6] is True else ""
    kind = f"conv{transposed}{len(shape) - 2}d"
    return [Flow((demote(first), channels, *space), call.feeds(weight), kind, rows=rows_of(known))]


def embedding(call: Call) -> Result | None:
    """Carry a table look-up; indices made in the code alone, as positions are, give the same rows for all samples."""
    weight, indices = call.weight(0), call.args[1]
    known = call.look(indices)
    if weight is None:
        return None
    if isinstance(known, Weight):
        return [of_weights(call, 1, 0)]
    axes = axes_or_fresh(known, indices, call.batch)
    if "bag" in call.name:  # the indices of a bag are pooled
        axes = fresh(call.shape[:-1], call.batch)
    lead = (demote(axis) for axis in axes)
    return [Flow((*lead, units(call.shape[-1])), call.feeds(weight), "embedding", rows=rows_of(known))]


def bilinear(call: Call) -> Result | None:
    """Carry a bilinear layer: two inputs under one weight."""
    known = call.look(call.args[0])
    lead = (demote(axis) for axis in axes_or_fresh(known, call.args[0], call.batch)[:-1])
    return [Flow((*lead, units(call.shape[-1])), call.feeds(call.weight(1)), "bilinear", rows=rows_of(known))]


def distances(call: Call) -> Result | None:
    """Carry distances of points to points: the features are summed over."""
    flow = call.flow(0)
    if flow is None or flow.axes is None or len(flow.axes) != len(call.shape):
        return None
    return [flow.demoted()._replace(axes=(*flow.demoted().axes[:-1], positions(call.shape[-1])))]  # type: ignore[index]


def attention(call: Call) -> Result | None:
    """Carry fused scaled dot-product attention: (N, heads, T, E) queries, the values' features come out."""
    query, value = call.flow(0), call.flow(2)
    if query is None or value is None or query.axes is None or value.axes is None:
        return None
    axes = (*value.axes[:-2], demote(query.axes[-2]), value.axes[-1])
    return [value._replace(axes=axes)]


def attention_layer(call: Call) -> Result | None:
    """Carry a whole attention layer, shape (N, T, E): its output layer's features come out, its weights stay untold."""
    known = call.look(call.args[0])
    call.feeds(call.weight(5))
    lead = (demote(axis) for axis in axes_or_fresh(known, call.args[0], call.batch)[:-1])
    out = Flow((*lead, units(call.shape[-1])), call.feeds(call.weight(7)), "linear", rows=rows_of(known))
    return [out, *[None] * (len(call.outputs) - 1)]
