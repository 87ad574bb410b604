"""How the axes of a gated recurrent layer's outputs follow from those of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic
from torch.nn.utils.rnn import PackedSequence

from deadcheck.layout import Feed, Flow, Known, demote, positions, samples, units

_CELLS = (nn.RNNCellBase, dynamic.LSTMCell, dynamic.GRUCell)


def outputs(output: Any) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Return the values that an LSTM, GRU or one of their cells gave, and its last states."""
    first, rest = (output[0], output[1:]) if isinstance(output, (tuple, list)) else (output, ())
    first = first.data if isinstance(first, PackedSequence) else first
    states = [state for item in rest for state in (item if isinstance(item, (tuple, list)) else (item,))]
    return first if isinstance(first, Tensor) else None, [state for state in states if isinstance(state, Tensor)]


def carried(known: Known | None, tensor: Tensor, feed: Feed, name: str) -> Flow:
    """Return the flow of the output: the axes of the input, with units at the last."""
    lead = known.axes[:-1] if isinstance(known, Flow) and known.axes is not None else None
    if lead is None or len(lead) + 1 != tensor.dim():
        lead = tuple(positions(size) for size in tensor.shape[:-1])
    rows = known.rows if isinstance(known, Flow) else None
    return Flow((*(demote(axis) for axis in lead), units(tensor.shape[-1])), (feed,), name, rows=rows)


def last(module: nn.Module, source: Any, flow: Flow, state: Tensor) -> Flow | None:
    """Return the flow of a last state: (layers, samples, units), or as the output of a cell."""
    assert flow.axes is not None
    if state.dim() == len(flow.axes) == 2 and isinstance(module, _CELLS):
        return flow
    width = units(state.shape[-1])
    if isinstance(source, PackedSequence):
        if flow.rows is None:
            return None
        order = torch.as_tensor(flow.rows)[: int(source.batch_sizes[0])]
        rows = order if source.unsorted_indices is None else order[source.unsorted_indices]
        return Flow((positions(state.shape[0]), samples(len(rows)), width), flow.feeds, flow.axis_from, rows=rows)
    batch = flow.axes[0 if getattr(module, "batch_first", False) else 1] if len(flow.axes) == 3 else None
    axes = (positions(state.shape[0]), *((batch,) if batch is not None else ()), width)
    made = Flow(axes, flow.feeds, flow.axis_from, rows=flow.rows)
    return made if made.fits(state.shape) else None
