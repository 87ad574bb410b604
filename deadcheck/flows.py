"""The rule by which each operator carries samples, units and feeders from its inputs to its outputs.

Rules are keyed by the operator's name. What has no rule keeps the axes of an input of the same shape or rank;
past that the axes count as unknown, and a site that needs them says that it guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deadcheck import picks, products
from deadcheck.calls import Call, Result, Rule, axes_of, moved, parted
from deadcheck.layout import (
    CONSTANT,
    SAMPLE,
    UNIT,
    Atom,
    Axes,
    Axis,
    Flow,
    Known,
    Weight,
    agree,
    at_axis,
    broadcast,
    count,
    drop_axes,
    fresh,
    has,
    joined,
    positions,
    reshape,
    slice_axis,
    units,
)


def _with_axes(flow: Flow, axes: Axes | None) -> Flow:
    if axes is None:
        return Flow(None, flow.feeds)
    return flow._replace(axes=axes)


def _view(flow: Flow, call: Call) -> Flow:
    moved = _with_axes(flow, reshape(axes_of(flow), call.shape))
    return picks.settled(moved, call.batch) if isinstance(moved.rows, torch.Tensor) else moved


def _permute(flow: Flow, call: Call) -> Flow:
    axes = axes_of(flow)
    return _with_axes(flow, tuple(axes[dim] for dim in call.args[1]))


def _transpose(flow: Flow, call: Call) -> Flow:
    axes = list(axes_of(flow))
    if len(axes) > 1:
        a, b = (call.args[1], call.args[2]) if len(call.args) > 2 else (0, 1)
        axes[a], axes[b] = axes[b], axes[a]
    return _with_axes(flow, tuple(axes))


def _unsqueeze(flow: Flow, call: Call) -> Flow:
    axes = list(axes_of(flow))
    dim = call.args[1] % (len(axes) + 1)
    return _with_axes(flow, (*axes[:dim], (), *axes[dim:]))


def _squeeze(flow: Flow, call: Call) -> Flow:
    axes = axes_of(flow)  # the tensor itself has its new shape already where this was done in place
    dims = call.args[1] if len(call.args) > 1 else range(len(axes))
    gone = {dim % max(len(axes), 1) for dim in ([dims] if isinstance(dims, int) else dims)}
    return _with_axes(flow, tuple(axis for i, axis in enumerate(axes) if axis or i not in gone))


def _expand(flow: Flow, call: Call) -> Flow:
    axes, shape, given = axes_of(flow), call.shape, tuple(call.args[0].shape)
    lead = len(shape) - len(given)
    kept = (
        axes[i - lead] if i >= lead and given[i - lead] == size else positions(size) for i, size in enumerate(shape)
    )
    return _with_axes(flow, tuple(kept))


def _slice(flow: Flow, call: Call) -> Flow:
    dim = call.argument(1, "dim", 0) % len(axes_of(flow))
    length = call.args[0].shape[dim]
    start, step = call.argument(2, "start", 0) or 0, call.argument(4, "step", 1)
    start = max(start + length, 0) if start < 0 else min(start, length)
    return slice_axis(flow, dim, start, call.shape[dim], step)


def _select(flow: Flow, call: Call) -> Flow:
    dim = call.args[1] % len(axes_of(flow))
    index = call.args[2] % max(call.args[0].shape[dim], 1)
    return _without_axis(slice_axis(flow, dim, index, 1), dim)


def _without_axis(flow: Flow, dim: int) -> Flow:
    axes = axes_of(flow)
    return flow._replace(axes=axes[:dim] + axes[dim + 1 :])


def _pieces(flow: Flow, call: Call) -> list[Flow]:
    dim = call.argument(2, "dim", 0) % len(axes_of(flow))
    start, out = 0, []
    for piece in call.outputs:
        out.append(slice_axis(flow, dim, start, piece.shape[dim]))
        start += piece.shape[dim]
    return out


def _unbind(flow: Flow, call: Call) -> list[Flow]:
    dim = call.argument(1, "dim", 0) % len(axes_of(flow))
    return [_without_axis(slice_axis(flow, dim, i, 1), dim) for i in range(len(call.outputs))]


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
    axes = (*base.axes[:dim], _laid(flows, base, call.shape[dim]), *base.axes[dim:])
    stacked = Flow(axes, feeds, base.axis_from, base.offset, base.rows)
    if any(flow.offset != flows[0].offset for flow in flows) and not has(axes[dim], UNIT):
        stacked = stacked.demoted()  # slices of a layer in an order that is not known
    return [stacked if agree(flows) else stacked.unsampled()]


def _laid(flows: Sequence[Flow], base: Flow, size: int) -> Axis:
    """Return the axis along which tensors were stacked: other layers are other units, other steps are not."""
    feeders = {tuple(sorted(feed.weight for feed in flow.feeds)) for flow in flows}
    width, step = count(axes_of(base), UNIT), flows[1].offset - flows[0].offset if len(flows) > 1 else 0
    if base.axis_from is None or len(flows) != size:
        return positions(size)
    if len(feeders) == size:
        return units(size, width)
    in_order = all(flow.offset == flows[0].offset + i * step for i, flow in enumerate(flows))
    return units(size, step) if len(feeders) == 1 and step > 0 and in_order else positions(size)


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


def _norm(kind: str, dim: int, position: int) -> Rule:
    """Rule of a normalisation: a learnt scale, at ``position``, makes it the feeder and its axis that of the units."""

    def rule(call: Call) -> Result | None:
        flow = call.flow(0)
        if flow is None:
            return None
        if flow.axes is None:
            flow = flow._replace(axes=fresh(call.shape, call.batch))
        weight = call.weight(position)
        is_learnt = weight is not None and weight.parameter
        moves = is_learnt and call.args[position].dim() == 1 and not _has_units_at(flow, dim)
        if flow.axis_from is None or moves:
            flow = at_axis(flow, call.shape, dim, kind)
        return [flow._replace(feeds=call.feeds(weight)) if is_learnt else flow]

    return rule


def _has_units_at(flow: Flow, dim: int) -> bool:
    axis = axes_of(flow)[dim]
    return has(axis, UNIT) or (not axis and count(axes_of(flow), UNIT) == 1)


def _pixel_shuffle(flow: Flow, call: Call) -> Flow:
    axes, r = axes_of(flow), call.args[1]
    *lead, channels, rows, columns = axes
    if len(channels) != 1 or channels[0].role != UNIT:
        return Flow(None, flow.feeds)
    size = channels[0].size // (r * r)
    new = (units(size, r * r), rows + units(r, r), columns + units(r, 1))
    return flow._replace(axes=(*lead, *new))


def _pixel_unshuffle(flow: Flow, call: Call) -> Flow:
    axes, r = axes_of(flow), call.args[1]
    if has(axes[-1], UNIT) or has(axes[-2], UNIT):
        return Flow(None, flow.feeds)
    *lead, channels = axes[:-2]
    return flow._replace(axes=(*lead, channels + positions(r * r), *map(positions, call.shape[-2:])))


def _channel_shuffle(flow: Flow, call: Call) -> Flow:
    axes, groups = axes_of(flow), call.args[1]
    channels = axes[1]
    if len(channels) != 1 or channels[0].role != UNIT:
        return flow
    width = channels[0].size // groups
    stride = channels[0].stride
    return flow._replace(axes=(axes[0], units(width, stride) + units(groups, stride * width), *axes[2:]))


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
    learnt = [(k, t) for t, k in call.inputs if isinstance(k, Weight) and k.parameter and t.numel() > 1]
    if not learnt or replaces is None:
        return [flow]
    weight, tensor = learnt[0]
    own = [dim for dim in range(-tensor.dim(), 0) if tensor.shape[dim] > 1]
    if flow.axes is not None and flow.axis_from is None and len(own) == 1:
        flow = at_axis(flow, call.shape, own[0], "scale" if replaces else "shift")
    if replaces:
        flow = flow._replace(feeds=call.feeds(weight))
    elif all(feed.weight.rpartition(".")[0] != weight.owner for feed in flow.feeds):
        flow = flow._replace(feeds=joined((*flow.feeds, *call.feeds(weight))))
    return [flow]


def default(call: Call) -> Result:
    """Carry what can be carried through an operator that has no rule."""
    flows = [(known, tuple(tensor.shape)) for tensor, known in call.inputs if isinstance(known, Flow)]
    if not flows:
        return [_of_weights([known for _, known in call.inputs], call)] * len(call.outputs)
    return [_carried(flows, tuple(output.shape)) for output in call.outputs]


def _of_weights(inputs: Sequence[Known | None], call: Call) -> Weight | None:
    """Return what is known of a tensor made from weights and constants alone."""
    weights = [known for known in inputs if isinstance(known, Weight)]
    if not weights or len(weights) < len(inputs):
        return None
    first = next((weight for weight in weights if weight.parameter), weights[0])
    is_joined = call.name in ("cat", "stack")
    size = min((sum if is_joined else max)(weight.size for weight in weights), call.outputs[0].numel())
    if is_joined:  # each keeps its own rows, as in an ensemble
        others = (weight for weight in weights if weight.parameter and weight is not first)
        return first._replace(size=size, others=tuple(others))
    return first._replace(size=size)


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


def _like(call: Call) -> Result | None:
    """Carry the shape of a tensor to one that is made anew."""
    known = call.look(call.args[0])
    if not isinstance(known, Flow):
        return [known]
    same = known.axes is not None and known.fits(call.shape)
    return [known.demoted()._replace(feeds=())] if same else _blank(call)


def _blank(call: Call) -> Result | None:
    """Carry a tensor made anew with a row for each sample, as a state of zeros or noise."""
    is_of_each = has_rows_of(call.shape, call.batch)
    return [Flow(fresh(call.shape, call.batch), presumed=True) if is_of_each else None]


def has_rows_of(shape: Sequence[int], batch: int) -> bool:
    """Tell whether a tensor made anew may have a row for each sample."""
    return batch > 1 and len(shape) > 1 and shape[0] == batch


def _constant(call: Call) -> Result | None:
    """Carry numbers that stand in the code, such as positions: no sample makes them."""
    return [CONSTANT] * len(call.outputs)


def _untold(call: Call) -> Result | None:
    """Outputs whose entries stand in no order that is known."""
    return [Flow(None, joined(feed for _, k in call.inputs if isinstance(k, Flow) for feed in k.feeds))] * len(
        call.outputs
    )


def _forgets(call: Call) -> Result | None:
    """Outputs that are made anew and carry nothing of their inputs; what had nothing of the data stays so."""
    flow = call.flow(0)
    return [flow if flow is not None and flow.is_blank else None] * len(call.outputs)


BLANKS: dict[str, Rule] = dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), _blank)
"""Operators without inputs whose output may have a row for each sample."""

MAKERS: dict[str, Rule] = dict.fromkeys(
    ("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices"), _constant
)
"""Operators without inputs whose output is known all the same."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"), moved(_view)),
    **dict.fromkeys(("flatten", "unflatten", "view_copy"), moved(_view)),
    "permute": moved(_permute),
    **dict.fromkeys(("transpose", "transpose_", "t", "t_", "swapaxes", "numpy_T"), moved(_transpose)),
    **dict.fromkeys(("unsqueeze", "unsqueeze_"), moved(_unsqueeze)),
    **dict.fromkeys(("squeeze", "squeeze_"), moved(_squeeze)),
    **dict.fromkeys(("expand", "expand_copy", "broadcast_to"), moved(_expand)),
    "slice": moved(_slice, takes_part=True),
    "select": moved(_select, takes_part=True),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"),
                    parted(_pieces)),
    "unbind": parted(_unbind),
    **dict.fromkeys(("cat", "concat"), picks.joined_along),
    "stack": _stack,
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "logsumexp", "prod", "std", "var", "var_mean", "median",
         "argmax", "argmin", "any", "all", "linalg_vector_norm", "norm", "nansum", "std_mean"),
        _reduce,
    ),
    **dict.fromkeys(("mm", "bmm", "_sparse_mm"), products.product(0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "_addmm_activation", "baddbmm", "_sparse_addmm"), products.product(1, 2)),
    "_grouped_mm": products.grouped,
    "mv": products.vector_product,
    **dict.fromkeys(("linear", "mkldnn_linear", "_linear_pointwise", "linear_dynamic", "linear_relu_dynamic"),
                    products.linear),
    **dict.fromkeys(("linear_relu", "linear_dynamic_fp16"), products.linear),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"),
                    products.convolution),
    **dict.fromkeys(("_convolution_pointwise", "conv1d", "conv2d", "conv3d", "conv2d_relu"), products.convolution),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
         "miopen_batch_norm", "_batch_norm_impl_index", "_batch_norm_with_update", "batch_norm", "native_group_norm"),
        _norm("norm", 1, 1),
    ),
    "native_layer_norm": _norm("norm", -1, 2),
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), _norm("norm", -1, 2)),
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only", "embedding_bag"),
                    products.embedding),
    "index_select": moved(picks.index_select),
    "index": moved(picks.index),
    "pixel_shuffle": moved(_pixel_shuffle),
    "pixel_unshuffle": moved(_pixel_unshuffle),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), moved(_channel_shuffle)),
    "gather": moved(picks.gather),
    "masked_select": picks.masked,
    **dict.fromkeys(("nonzero", "take", "_unique2", "unique_dim", "unique_consecutive", "bincount"), _untold),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist", "cdist"), products.distances),
    **dict.fromkeys(("sort", "topk", "kthvalue", "argsort", "msort"), picks.ordered),
    **dict.fromkeys(("flip", "roll"), picks.turned),
    "repeat": moved(picks.repeated),
    **dict.fromkeys(("index_add", "index_add_", "index_copy", "index_copy_", "index_reduce", "index_reduce_",
                     "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
                    picks.put_along),
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_"), picks.put),
    **dict.fromkeys(("masked_scatter", "masked_scatter_", "slice_scatter", "select_scatter", "diagonal_scatter"),
                    picks.kept),
    "copy_": picks.copied,
    "_pack_padded_sequence": picks.packed,
    "_trilinear": products.bilinear,
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_attention_math", "scaled_dot_product_attention"),
        products.attention,
    ),
    "_native_multi_head_attention": products.attention_layer,
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _scale),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub"), _shift),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
                     "new_ones", "new_empty", "new_full"), _like),
    **dict.fromkeys(("lift_fresh", "zero_", "fill_", "normal_", "uniform_", "bernoulli_"), _forgets),
    **MAKERS, **BLANKS,
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
    if not isinstance(known, Flow):
        return known
    if known.is_blank and not any(has(axis, SAMPLE) for axis in known.axes or ()):
        return None  # its first axis was as long as the batch by chance
    return known if known.fits(tensor.shape) else Flow(None, known.feeds)
