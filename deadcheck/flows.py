"""The rule by which each operator carries samples, units and feeders from its inputs to its outputs.

Rules are keyed by the operator's name. What has no rule keeps the axes of an input of the same shape or rank;
past that the axes count as unknown, and a site that needs them says that it guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deadcheck.layout import (
    SAMPLE,
    UNIT,
    Atom,
    Axes,
    Feed,
    Flow,
    Known,
    Weight,
    agree,
    at_axis,
    broadcast,
    concatenate,
    demote,
    drop_axes,
    fresh,
    has,
    joined,
    positions,
    reshape,
    slice_axis,
    units,
)


@dataclass(frozen=True)
class Call:
    """One operator call, seen from the rules."""

    name: str
    """Operator, without namespace and overload."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Any, ...]
    """Output tensors."""

    inputs: tuple[tuple[Any, Known | None], ...]
    """Input tensors, in order, with what is known of each."""

    batch: int
    """Samples in this forward pass."""

    look: Callable[[Any], Known | None]
    """What is known of a tensor."""

    feed: Callable[[Weight | None], Feed]
    """A new run of the layer that holds this weight (None: of the module that runs)."""

    def flow(self, position: int) -> Flow | None:
        """Return the flow of an argument, or None where it does not depend on the data."""
        known = self.look(self.args[position]) if len(self.args) > position else None
        return known if isinstance(known, Flow) else None

    def weight(self, position: int) -> Weight | None:
        """Return the weight that an argument is, or None."""
        known = self.look(self.args[position]) if len(self.args) > position else None
        return known if isinstance(known, Weight) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return tuple(self.outputs[0].shape)


Result = Sequence[Known | None]
Rule = Callable[[Call], Result | None]


def _moved(move: Callable[[Flow, Call], Flow | None]) -> Rule:
    """Make a rule of a function that moves the axes of the first argument."""

    def rule(call: Call) -> Result | None:
        known = call.look(call.args[0])
        if isinstance(known, Weight):
            return [known] * len(call.outputs)
        if known is None or known.axes is None:
            return [known] * len(call.outputs)
        return [move(known, call)]

    return rule


def _with_axes(flow: Flow, axes: Axes | None) -> Flow:
    if axes is None:
        return Flow(None, flow.feeds)
    return flow._replace(axes=axes)


def _axes(flow: Flow) -> Axes:
    assert flow.axes is not None
    return flow.axes


def _view(flow: Flow, call: Call) -> Flow:
    return _with_axes(flow, reshape(_axes(flow), call.shape))


def _permute(flow: Flow, call: Call) -> Flow:
    axes = _axes(flow)
    return _with_axes(flow, tuple(axes[dim] for dim in call.args[1]))


def _transpose(flow: Flow, call: Call) -> Flow:
    axes = list(_axes(flow))
    if len(axes) > 1:
        a, b = (call.args[1], call.args[2]) if len(call.args) > 2 else (0, 1)
        axes[a], axes[b] = axes[b], axes[a]
    return _with_axes(flow, tuple(axes))


def _unsqueeze(flow: Flow, call: Call) -> Flow:
    axes = list(_axes(flow))
    dim = call.args[1] % (len(axes) + 1)
    return _with_axes(flow, (*axes[:dim], (), *axes[dim:]))


def _squeeze(flow: Flow, call: Call) -> Flow:
    axes, shape = _axes(flow), call.args[0].shape
    dims = call.args[1] if len(call.args) > 1 else range(len(axes))
    gone = {dim % max(len(axes), 1) for dim in ([dims] if isinstance(dims, int) else dims)}
    return _with_axes(flow, tuple(axis for i, axis in enumerate(axes) if not (i in gone and shape[i] == 1)))


def _expand(flow: Flow, call: Call) -> Flow:
    axes, shape, given = _axes(flow), call.shape, tuple(call.args[0].shape)
    lead = len(shape) - len(given)
    kept = (
        axes[i - lead] if i >= lead and given[i - lead] == size else positions(size) for i, size in enumerate(shape)
    )
    return _with_axes(flow, tuple(kept))


def _slice(flow: Flow, call: Call) -> Flow:
    dim = call.argument(1, "dim", 0) % len(_axes(flow))
    length = call.args[0].shape[dim]
    start, step = call.argument(2, "start", 0) or 0, call.argument(4, "step", 1)
    start = max(start + length, 0) if start < 0 else min(start, length)
    return slice_axis(flow, dim, start, call.shape[dim], step)


def _select(flow: Flow, call: Call) -> Flow:
    dim = call.args[1] % len(_axes(flow))
    index = call.args[2] % max(call.args[0].shape[dim], 1)
    return _without_axis(slice_axis(flow, dim, index, 1), dim)


def _without_axis(flow: Flow, dim: int) -> Flow:
    axes = _axes(flow)
    return flow._replace(axes=axes[:dim] + axes[dim + 1 :])


def _pieces(call: Call) -> Result | None:
    known = call.look(call.args[0])
    if not isinstance(known, Flow) or known.axes is None:
        return [known] * len(call.outputs)
    dim = call.argument(2, "dim", 0) % len(known.axes)
    start, out = 0, []
    for piece in call.outputs:
        out.append(slice_axis(known, dim, start, piece.shape[dim]))
        start += piece.shape[dim]
    return out


def _unbind(call: Call) -> Result | None:
    known = call.look(call.args[0])
    if not isinstance(known, Flow) or known.axes is None:
        return [known] * len(call.outputs)
    dim = call.argument(1, "dim", 0) % len(known.axes)
    return [_without_axis(slice_axis(known, dim, i, 1), dim) for i in range(len(call.outputs))]


def _cat(call: Call) -> Result | None:
    tensors = call.args[0]
    known = [call.look(tensor) for tensor in tensors]
    if not any(isinstance(item, Flow) for item in known):
        return None
    dim = call.argument(1, "dim", 0) % max(len(call.shape), 1)
    # An empty 1-D tensor is allowed in any cat and adds nothing.
    kept = [(k, t) for k, t in zip(known, tensors, strict=True) if t.dim() == len(call.shape)]
    return [concatenate([k if isinstance(k, Flow) else None for k, _ in kept], [t.shape[dim] for _, t in kept], dim)]


def _stack(call: Call) -> Result | None:
    flows = [known for tensor in call.args[0] if isinstance(known := call.look(tensor), Flow)]
    if not flows:
        return None
    base = next((flow for flow in flows if flow.axis_from), flows[0])
    feeds = joined(feed for flow in flows for feed in flow.feeds)
    if base.axes is None:
        return [Flow(None, feeds)]
    dim = call.argument(1, "dim", 0) % len(call.shape)
    one_each = len(flows) == call.shape[dim] and all(flow.rows is not None and len(flow.rows) == 1 for flow in flows)
    if one_each and not any(has(axis, SAMPLE) for axis in base.axes):
        # The samples were taken apart one by one, and are put together again.
        rows = torch.tensor([int(flow.rows[0]) for flow in flows])
        axes = (*base.axes[:dim], (Atom(SAMPLE, len(rows)),) if len(rows) != 1 else (), *base.axes[dim:])
        return [Flow(axes, feeds, base.axis_from, base.offset, rows)]
    axes = (*base.axes[:dim], positions(call.shape[dim]), *base.axes[dim:])
    stacked = Flow(axes, feeds, base.axis_from, base.offset, base.rows)
    return [stacked if agree(flows) else stacked.unsampled()]


def _reduce(call: Call) -> Result | None:
    known = call.look(call.args[0])
    if not isinstance(known, Flow) or known.axes is None:
        return [known] * len(call.outputs)
    rank = len(known.axes)
    dims = call.argument(1, "dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    if not call.outputs or call.outputs[0].dim() not in (rank, rank - len(list(dims))):
        return None
    return [drop_axes(known, dims, keepdim=call.outputs[0].dim() == rank)] * len(call.outputs)


def _product(call: Call, left: int, right: int) -> Result | None:
    """Matrix product: the side that is a weight makes the units."""
    a, b = call.look(call.args[left]), call.look(call.args[right])
    shape = call.shape
    if isinstance(a, Weight) and isinstance(b, Weight):
        return [a]
    if isinstance(b, Weight):
        lead = _leading(a, call.args[left], call.batch)
        return [Flow((*lead, units(shape[-1])), (call.feed(b),), "linear", rows=_rows(a))]
    if isinstance(a, Weight):
        tail = b.axes if isinstance(b, Flow) and b.axes is not None else fresh(call.args[right].shape, call.batch)
        return [Flow((units(shape[0]), *(demote(axis) for axis in tail[1:])), (call.feed(a),), "linear")]
    return [_contracted(a, b, shape)]


def _rows(known: Known | None) -> Any:
    return known.rows if isinstance(known, Flow) else None


def _leading(known: Known | None, tensor: Any, batch: int) -> Axes:
    """Return the axes of a layer's input but the last, its units being those of the layer before."""
    if isinstance(known, Flow) and known.axes is not None:
        return tuple(demote(axis) for axis in known.axes[:-1])
    return fresh(tensor.shape[:-1], batch)


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


def _bmm(left: int, right: int) -> Rule:
    def rule(call: Call) -> Result | None:
        weight, tensor = call.weight(right), call.args[right]
        flow = call.flow(left)
        if weight is None or flow is None or flow.axes is None:
            return _product(call, left, right)
        grouped = tensor.shape[0] > 1 and tensor.stride(0) != 0 and not has(flow.axes[0], SAMPLE)
        width = call.shape[-1]
        first = units(tensor.shape[0], width) if grouped else demote(flow.axes[0])
        return [Flow((first, demote(flow.axes[1]), units(width)), (call.feed(weight),), "linear")]

    return rule


def _mv(call: Call) -> Result | None:
    weight = call.weight(0)
    if weight is not None:
        return [Flow((units(call.shape[0]),), (call.feed(weight),), "linear")]
    flow, weight = call.flow(0), call.weight(1)
    if flow is None or flow.axes is None or weight is None:
        return None
    return [Flow((demote(flow.axes[0]),), (call.feed(weight),), "linear")]


def _linear(call: Call) -> Result | None:
    known, tensor = call.look(call.args[0]), call.args[0]
    lead = _leading(known, tensor, call.batch)
    return [Flow((*lead, units(call.shape[-1])), (call.feed(call.weight(1)),), "linear", rows=_rows(known))]


def _convolution(call: Call) -> Result | None:
    shape, known = call.shape, call.look(call.args[0])
    axes = known.axes if isinstance(known, Flow) else None
    first = demote(axes[0]) if axes else fresh(shape[:1], call.batch)[0]
    transposed = "_transpose" if len(call.args) > 6 and call.args[6] is True else ""
    kind = f"conv{transposed}{len(shape) - 2}d"
    weight = call.weight(1)
    return [Flow((first, units(shape[1]), *map(positions, shape[2:])), (call.feed(weight),), kind, rows=_rows(known))]


def _norm(kind: str, dim: int, *weights: int) -> Rule:
    """Rule of a normalisation: axes stay; a learnt scale makes it the feeder."""

    def rule(call: Call) -> Result | None:
        flow = call.flow(0)
        if flow is None:
            return None
        if flow.axes is None:
            flow = flow._replace(axes=fresh(call.shape, call.batch))
        if flow.axis_from is None:
            flow = at_axis(flow, call.shape, dim, kind)
        weight = next((w for w in map(call.weight, weights) if w is not None and w.parameter), None)
        feeds = (call.feed(weight),) if weight is not None else flow.feeds
        return [flow._replace(feeds=feeds)]

    return rule


def _embedding(call: Call) -> Result | None:
    weight, indices = call.weight(0), call.args[1]
    if weight is None:
        return None
    known = call.look(indices)
    axes = known.axes if isinstance(known, Flow) and known.axes is not None else fresh(indices.shape, call.batch)
    if "bag" in call.name:  # the indices of a bag are pooled
        axes = fresh(call.shape[:-1], call.batch)
    return [Flow((*axes, units(call.shape[-1])), (call.feed(weight),), "embedding", rows=_rows(known))]


def _picked(flow: Flow, dim: int, eaten: int, index: Any, new: Sequence[int]) -> Flow:
    """Entries of ``eaten`` axes from ``dim`` on picked by one index: each new row remembers its sample."""
    axes = _axes(flow)
    gone, others = axes[dim : dim + eaten], axes[:dim] + axes[dim + eaten :]
    made = [positions(size) for size in new]
    rows = flow.rows
    if any(has(axis, SAMPLE) for axis in gone) and len(new) == 1:
        rows = _sample_of_each(gone, flow.rows, index.device)[index]
        made = [(Atom(SAMPLE, new[0]),)]
    is_whole_layer = eaten == 1 and len(new) == 1 and len(gone[0]) == 1 and has(gone[0], UNIT)
    if is_whole_layer:
        made = [units(new[0])]
    moved = flow._replace(axes=(*axes[:dim], *made, *axes[dim + eaten :]), rows=rows)
    if sum(has(axis, SAMPLE) for axis in others) and rows is not flow.rows:
        return Flow(None, flow.feeds)  # two axes would count samples
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
    return torch.as_tensor(list(rows) if isinstance(rows, range) else rows, device=device)[total]


def _index_select(flow: Flow, call: Call) -> Flow:
    dim = call.args[1] % len(_axes(flow))
    return _picked(flow, dim, 1, call.args[2], [call.shape[dim]])


def _index(flow: Flow, call: Call) -> Flow | None:
    indices = call.args[1]
    used = [i for i, index in enumerate(indices) if index is not None]
    if len(used) != 1:
        return Flow(None, flow.feeds)
    dim, index = used[0], indices[used[0]]
    is_mask = index.dtype in (torch.bool, torch.uint8)
    eaten, added = (index.dim(), 1) if is_mask else (1, index.dim())
    if len(_axes(flow)) - eaten + added != len(call.shape):
        return Flow(None, flow.feeds)
    return _picked(flow, dim, eaten, index, call.shape[dim : dim + added])


def _pixel_shuffle(flow: Flow, call: Call) -> Flow:
    axes, r = _axes(flow), call.args[1]
    *lead, channels, rows, columns = axes
    if len(channels) != 1 or channels[0].role != UNIT:
        return Flow(None, flow.feeds)
    size = channels[0].size // (r * r)
    new = (units(size, r * r), rows + units(r, r), columns + units(r, 1))
    return flow._replace(axes=(*lead, *new))


def _pixel_unshuffle(flow: Flow, call: Call) -> Flow:
    axes, r = _axes(flow), call.args[1]
    if has(axes[-1], UNIT) or has(axes[-2], UNIT):
        return Flow(None, flow.feeds)
    *lead, channels = axes[:-2]
    return flow._replace(axes=(*lead, channels + positions(r * r), *map(positions, call.shape[-2:])))


def _channel_shuffle(flow: Flow, call: Call) -> Flow:
    axes, groups = _axes(flow), call.args[1]
    channels = axes[1]
    if len(channels) != 1 or channels[0].role != UNIT:
        return flow
    width = channels[0].size // groups
    stride = channels[0].stride
    return flow._replace(axes=(axes[0], units(width, stride) + units(groups, stride * width), *axes[2:]))


def _pack(call: Call) -> Result | None:
    """Padded sequences packed time step by time step: row r of a step is the r-th longest sequence."""
    flow = call.flow(0)
    if flow is None or flow.axes is None:
        return None
    dim = 0 if call.argument(2, "batch_first", False) else 1
    size = call.args[0].shape[dim]
    if not has(flow.axes[dim], SAMPLE) or len(flow.axes[dim]) != 1:
        return None
    base = torch.arange(size) if flow.rows is None else torch.as_tensor(flow.rows)
    rows = torch.cat([base[:count] for count in call.outputs[1].tolist()])
    return [flow._replace(axes=((Atom(SAMPLE, len(rows)),), *flow.axes[2:]), rows=rows), None]


def _trilinear(call: Call) -> Result | None:
    """Bilinear layer: two inputs under one weight."""
    lead = _leading(call.look(call.args[0]), call.args[0], call.batch)
    rows = _rows(call.look(call.args[0]))
    return [Flow((*lead, units(call.shape[-1])), (call.feed(call.weight(1)),), "bilinear", rows=rows)]


def _attention(call: Call) -> Result | None:
    """Fused scaled dot-product attention: (N, heads, T, E) queries, the values' features come out."""
    query, value = call.flow(0), call.flow(2)
    if query is None or value is None or query.axes is None or value.axes is None:
        return None
    axes = (*value.axes[:-2], demote(query.axes[-2]), value.axes[-1])
    return [value._replace(axes=axes)]


def _scale(call: Call) -> Result | None:
    """Elementwise product: a learnt scale of more than one value is a layer of its own."""
    return _pointwise(call, replaces=True)


def _shift(call: Call) -> Result | None:
    """Elementwise sum: a learnt shift joins the feeders."""
    return _pointwise(call, replaces=False)


def _pointwise(call: Call, *, replaces: bool | None = None) -> Result | None:
    flows = [(known, tensor.shape) for tensor, known in call.inputs if isinstance(known, Flow)]
    if not flows:
        return None
    flow = broadcast(flows, call.shape)
    learnt = [
        known
        for tensor, known in call.inputs
        if replaces is not None and isinstance(known, Weight) and known.parameter and tensor.numel() > 1
    ]
    if learnt and replaces:
        flow = flow._replace(feeds=(call.feed(learnt[0]),))
    elif learnt and all(feed.weight.rpartition(".")[0] != learnt[0].owner for feed in flow.feeds):
        flow = flow._replace(feeds=joined((*flow.feeds, call.feed(learnt[0]))))
    return [flow]


def default(call: Call) -> Result:
    """Carry what can be carried through an operator that has no rule."""
    flows = [(known, tuple(tensor.shape)) for tensor, known in call.inputs if isinstance(known, Flow)]
    if not flows:
        weight = next((known for _, known in call.inputs if isinstance(known, Weight)), None)
        return [weight] * len(call.outputs)
    return [_carried(flows, tuple(output.shape)) for output in call.outputs]


def _carried(flows: Sequence[tuple[Flow, tuple[int, ...]]], shape: tuple[int, ...]) -> Flow:
    rank = len(shape)
    if any(given == shape for _, given in flows):
        fitting = [
            (f, g)
            for f, g in flows
            if len(g) <= rank and all(x in (1, y) for x, y in zip(g[::-1], shape[::-1], strict=False))
        ]
        return broadcast(fitting, shape)
    feeds = joined(feed for flow, _ in flows for feed in flow.feeds)
    flow, given = flows[0]
    if flow.axes is None or not rank or not given:
        return Flow(None, feeds)
    if len(given) != rank:
        # Operators keep the batch first: what else they do to the axes is not known.
        keeps = given[0] == shape[0] and has(flow.axes[0], SAMPLE)
        return Flow((flow.axes[0], *map(positions, shape[1:])), feeds, rows=flow.rows) if keeps else Flow(None, feeds)
    lost = any(has(axis, UNIT) and old != new for axis, old, new in zip(flow.axes, given, shape, strict=True))
    kept = tuple(axis if old == new else positions(new) for axis, old, new in zip(flow.axes, given, shape, strict=True))
    moved = Flow(kept, feeds, flow.axis_from, flow.offset, flow.rows)
    return moved.demoted() if lost else moved


def _forgets(call: Call) -> Result | None:
    """Outputs that are made anew and carry nothing of their inputs."""
    return [None] * len(call.outputs)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"), _moved(_view)),
    **dict.fromkeys(("flatten", "unflatten", "view_copy"), _moved(_view)),
    "permute": _moved(_permute),
    **dict.fromkeys(("transpose", "transpose_", "t", "t_", "swapaxes", "numpy_T"), _moved(_transpose)),
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), _moved(_unsqueeze)),
    **dict.fromkeys(("squeeze", "squeeze_"), _moved(_squeeze)),
    **dict.fromkeys(("expand", "expand_copy", "broadcast_to"), _moved(_expand)),
    "slice": _moved(_slice),
    "select": _moved(_select),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), _pieces),
    "unbind": _unbind,
    **dict.fromkeys(("cat", "concat"), _cat),
    "stack": _stack,
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "logsumexp", "prod", "std", "var", "var_mean", "median",
         "argmax", "argmin", "any", "all", "linalg_vector_norm", "norm", "nansum", "std_mean"),
        _reduce,
    ),
    "mm": lambda call: _product(call, 0, 1),
    "addmm": lambda call: _product(call, 1, 2),
    **dict.fromkeys(("addmm_", "_addmm_activation"), lambda call: _product(call, 1, 2)),
    "bmm": _bmm(0, 1),
    "baddbmm": _bmm(1, 2),
    "mv": _mv,
    **dict.fromkeys(("linear", "mkldnn_linear", "_linear_pointwise", "linear_dynamic", "linear_relu_dynamic"), _linear),
    **dict.fromkeys(("linear_relu", "linear_dynamic_fp16"), _linear),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"), _convolution),
    **dict.fromkeys(("_convolution_pointwise", "conv1d", "conv2d", "conv3d", "conv2d_relu"), _convolution),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
         "miopen_batch_norm", "_batch_norm_impl_index", "_batch_norm_with_update", "batch_norm", "native_group_norm"),
        _norm("norm", 1, 1),
    ),
    "native_layer_norm": _norm("norm", -1, 2),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), _norm("norm", -1, 2)),
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only", "embedding_bag"), _embedding),
    "index_select": _moved(_index_select),
    "index": _moved(_index),
    "pixel_shuffle": _moved(_pixel_shuffle),
    "pixel_unshuffle": _moved(_pixel_unshuffle),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _moved(_channel_shuffle)),
    "_pack_padded_sequence": _pack,
    "_trilinear": _trilinear,
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_attention_math", "scaled_dot_product_attention"),
        _attention,
    ),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _scale),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub"), _shift),
    **dict.fromkeys(("lift_fresh", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
                     "new_zeros", "new_ones", "new_empty", "new_full"), _forgets),
}  # fmt: skip
"""Operator name without namespace and overload -> its rule."""


def carry(rule: Rule | None, call: Call) -> Result:
    """Return what is known of each output of a call."""
    try:
        result = rule(call) if rule is not None else None
    except (IndexError, TypeError, ValueError):
        # An overload with other arguments than the rule was written for: what it does to the axes is not known.
        result = None
    known = default(call) if result is None else [*result, *[None] * (len(call.outputs) - len(result))]
    return [_checked(item, tensor) for item, tensor in zip(known, call.outputs, strict=False)]


def _checked(known: Known | None, tensor: Any) -> Known | None:
    """Drop axes that are not those of the tensor, as under vmap, which shows other shapes than there are."""
    if isinstance(known, Flow) and not known.fits(tensor.shape):
        return Flow(None, known.feeds)
    return known
