"""Walks the graph of an exported program with the module path of every operator, and marks its places."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from deadcheck import activations
from deadcheck.places import PLACE, RECURRENT, Place

_CALL = re.compile(r"@\d+$")
_CELLS = {"lstm": "lstm", "lstm_cell": "lstm", "gru": "gru", "gru_cell": "gru"}
_GATED = {f"{cls.__module__}.{cls.__qualname__}": kind for cls, kind in activations.GATED.items()}
_MODULES = frozenset(f"{cls.__module__}.{cls.__qualname__}" for cls in activations.MODULES)


def operators(module: nn.Module) -> Iterator[tuple[fx.Node, Place]]:
    """Yield (node, place) of every operator in a graph and the graphs inside it, in the order of the code."""
    number = 0
    for graph in graphs(module):
        for node in graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            place = _place(node)
            if _name(node) in activations.NAMES or _name(node) in _CELLS:
                number += 1
                place = place._replace(number=number)
            yield node, place


def graphs(module: nn.Module) -> Iterator[fx.Graph]:
    """Yield the graph of an exported module, and those of its branches and loops."""
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield child.graph


def mark(module: nn.Module) -> None:
    """Put a mark before every operator at which the place changes, and before every activation. Changes the module."""
    last: Place | None = None
    graph: fx.Graph | None = None
    for node, place in list(operators(module)):
        if place.number or place != last or node.graph is not graph:
            with node.graph.inserting_before(node):
                node.graph.call_function(PLACE, (place.spelled(),))
        last, graph = (place if not place.number else None), node.graph
        if place.kind:
            _mark_output(node, place._replace(is_gate=False))
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            child.recompile()


def _mark_output(node: fx.Node, place: Place) -> None:
    """Hand the first output of a gated recurrent layer to the probe."""
    first = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    output = first or node
    with node.graph.inserting_after(output):
        node.graph.call_function(RECURRENT, ([node.args[0]], output, place.spelled()))


def _name(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return str(node.target.overloadpacket.__name__)


def _place(node: fx.Node) -> Place:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    path, gated = _CALL.sub("", path), _GATED.get(kind) or _CELLS.get(_name(node))
    cell = _CELLS.get(_name(node), "")
    return Place(path, 0, kind in _MODULES or kind in _GATED, gated is not None, cell)


def static_batch(program: ExportedProgram) -> int | None:
    """Return the number of samples that a program is fixed to, or None where any number will do."""
    names = set(program.graph_signature.user_inputs)
    sizes = [
        node.meta["val"].shape[0]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].dim()
    ]  # fmt: skip
    same = len(sizes) > 0 and all(type(size) is int and size == sizes[0] for size in sizes)
    return sizes[0] if same else None
