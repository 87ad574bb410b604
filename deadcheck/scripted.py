"""Walks the code of a TorchScript program with the module path of every operator, and marks its places.

Inlining loses which module an operator came from. So every call of a submodule is first fenced, by the name of the
attribute that is called, and the fences are read off and taken out again after inlining.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deadcheck import activations
from deadcheck.places import Place

_MANGLE = re.compile(r"___torch_mangle_\d+\.")
_ENTER, _LEAVE = ">", "<"
_CELLS = {
    "aten::lstm": "lstm", "aten::lstm_cell": "lstm", "aten::gru": "gru", "aten::gru_cell": "gru",
    "aten::quantized_lstm": "lstm", "quantized::quantized_lstm_cell_dynamic": "lstm",
    "aten::quantized_gru": "gru", "quantized::quantized_gru_cell_dynamic": "gru",
}  # fmt: skip
_ACTIVATIONS = frozenset(f"aten::{name}" for name in activations.NAMES)


class Program:
    """A TorchScript module whose methods are inlined, with every operator's place known. Changes the module."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self.module = module
        self.modules = dict(module.named_modules())
        self.canonical = canonical_paths(self.modules)
        self.classes = {path: _class_name(child) for path, child in self.modules.items()}
        self._fence()
        self.graphs = {name: module._c._get_method(name).graph for name in module._c._method_names()}
        for graph in self.graphs.values():
            torch._C._jit_pass_inline(graph)
        self.operators = {name: _Walk(self, graph).all() for name, graph in self.graphs.items()}
        """(node, place) of every operator of torch, by method, in the order of the code."""

    def mark(self) -> None:
        """Put a mark before every operator at which the place changes, and before every activation."""
        for name, graph in self.graphs.items():
            _mark(graph, self.operators[name])

    def _fence(self) -> None:
        """Put fences around each call of a submodule, in the methods of every module of the program."""
        done = set()
        for path, child in self.modules.items():
            for name in child._c._method_names():
                key = (child._c._type().qualified_name(), name)
                if key not in done:
                    done.add(key)
                    graph = self.modules[path]._c._get_method(name).graph
                    _fence_calls(graph, graph, next(iter(graph.inputs())))


def constants(module: torch.jit.ScriptModule) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a frozen program holds in its code, each with a name."""
    for method in module._c._method_names():
        nodes = module._c._get_method(method).graph.findAllNodes("prim::Constant", True)
        for number, node in enumerate(nodes):
            if node.hasAttribute("value") and node.kindOf("value") == "t":
                yield f"{method}.constant{number}", node.t("value")


def distinct(modules: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, module) as given, with one and the same module under every path of an object."""
    canonical = canonical_paths(modules)
    for path in modules:
        yield path, modules[canonical[path]]


def _class_name(module: torch.jit.ScriptModule) -> str:
    name: str = module._c._type().qualified_name()
    return _MANGLE.sub("", name).removeprefix("__torch__.")


def canonical_paths(modules: dict[str, Any]) -> dict[str, str]:
    """Map every path of a program's modules to the first path of the same module object.

    Nothing tells two wrappers of one object apart, so the training flag carries a number to the object and back.
    """
    flagged = {path: child for path, child in modules.items() if child._c.hasattr("training")}
    before = {path: child._c.getattr("training") for path, child in flagged.items()}
    numbers = {path: number for number, path in enumerate(flagged)}
    read = dict.fromkeys(flagged, 0)
    for bit in range(max(1, math.ceil(math.log2(max(len(flagged), 2))))):
        for path, child in flagged.items():
            child._c.setattr("training", bool(numbers[path] >> bit & 1))
        for path, child in flagged.items():
            read[path] |= child._c.getattr("training") << bit
    for path, child in flagged.items():
        child._c.setattr("training", before[path])
    first: dict[Any, str] = {}
    canonical: dict[str, str] = {}
    for path, child in modules.items():
        # Scripting makes a module anew for each path, and shares the weights alone.
        weights = tuple(id(tensor) for _, tensor in child.named_parameters(recurse=False))
        key = (_class_name(child), weights) if weights else read.get(path, path)
        canonical[path] = first.setdefault(key, path)
    return canonical


def _fence_calls(graph: Any, block: Any, own: Any) -> None:
    for node in list(block.nodes()):
        for inner in node.blocks():
            _fence_calls(graph, inner, own)
        if node.kind() != "prim::CallMethod":
            continue
        chain = _chain(next(iter(node.inputs())), own)
        if not chain:
            continue
        with graph.insert_point_guard(node):
            _insert(graph, _ENTER + chain)
            text = graph.insertConstant(_LEAVE + chain)
        leave = graph.create("deadcheck::place", [text], 0)
        leave.insertAfter(node)
        _pass_output(graph, node, leave, text)


def _pass_output(graph: Any, call: Any, leave: Any, text: Any) -> None:
    """Put the inputs and the first output of a call beside its fence: a gated recurrent layer needs them."""
    inputs = list(call.inputs())
    if _MANGLE.sub("", str(inputs[0].type())).removeprefix("__torch__.") not in _GATED:
        return
    output = call.output()
    with graph.insert_point_guard(leave):
        if str(output.type()).startswith("Tuple"):
            index = graph.insertNode(graph.create("prim::TupleIndex", [output, graph.insertConstant(0)], 1))
            output = index.output()
            output.setType(torch._C.TensorType.get())
        if str(output.type()) == "Tensor":
            _insert_recurrent(graph, [value for value in inputs if str(value.type()) == "Tensor"], output, text)


def _insert_recurrent(graph: Any, inputs: Sequence[Any], output: Any, text: Any) -> None:
    listed = graph.insertNode(graph.create("prim::ListConstruct", list(inputs), 1)).output()
    listed.setType(torch._C.ListType(torch._C.TensorType.get()))
    graph.insertNode(graph.create("deadcheck::recurrent", [listed, output, text], 0))


def _take_output(recurrent: Any) -> None:
    """Let it have the layer's output where it has a state: a trace returns only what is used of a layer."""
    _, value, _ = recurrent.inputs()
    source = value.node()
    if source.kind() == "prim::TupleIndex":
        made, index = source.inputs()
        if made.node().kind() == "prim::TupleConstruct":
            value = list(made.node().inputs())[_constant(index)]
    if value.node().kind() in _CELLS:
        recurrent.replaceInput(1, next(iter(value.node().outputs())))


_GATED = {f"{cls.__module__}.{cls.__qualname__}": kind for cls, kind in activations.GATED.items()}
_MODULES = frozenset(f"{cls.__module__}.{cls.__qualname__}" for cls in activations.MODULES)


def _chain(value: Any, own: Any) -> str:
    """Return the attribute path from the method's own module to a value; empty where it is none."""
    names: list[str] = []
    while value.node().kind() == "prim::GetAttr":
        names.append(value.node().s("name"))
        value = next(iter(value.node().inputs()))
    return ".".join(reversed(names)) if value.debugName() == own.debugName() else ""


def _insert(graph: Any, text: str) -> None:
    graph.insertNode(graph.create("deadcheck::place", [graph.insertConstant(text)], 0))


def _constant(value: Any) -> Any:
    node = value.node()
    return value.toIValue() if node.kind() == "prim::Constant" else None


class _Walk:
    """One pass over an inlined graph that reads the fences off and takes them out."""

    def __init__(self, program: Program, graph: Any) -> None:
        self.program = program
        self.graph = graph
        self.path: list[str] = []
        self.found: list[tuple[Any, Place]] = []
        self.number = 0

    def all(self) -> list[tuple[Any, Place]]:
        self.block(self.graph)
        return self.found

    def block(self, block: Any) -> None:
        for node in list(block.nodes()):
            kind = node.kind()
            if kind == "deadcheck::place":
                text = _constant(next(iter(node.inputs())))
                self.path = [*self.path, text[1:]] if text[0] == _ENTER else self.path[:-1]
                node.destroy()
            elif kind == "deadcheck::recurrent":
                _take_output(node)
                self.found.append((node, self.place(node)._replace(is_gate=False)))
            elif not kind.startswith("prim::"):
                self.found.append((node, self.place(node)))
            for inner in node.blocks() if kind != "deadcheck::place" else ():
                self.block(inner)

    def place(self, node: Any) -> Place:
        path = self.program.canonical.get(full := ".".join(self.path), full)
        kind = self.program.classes.get(path, "")
        gated = _GATED.get(kind) or (_CELLS.get(node.kind()) if kind not in _GATED else None)
        is_activation = node.kind() in _ACTIVATIONS or node.kind() == "deadcheck::recurrent" or node.kind() in _CELLS
        self.number += is_activation
        is_module = kind in _MODULES or kind in _GATED
        return Place(path, self.number if is_activation else 0, is_module, gated is not None, gated or "")


def _mark(graph: Any, operators: Sequence[tuple[Any, Place]]) -> None:
    last: Place | None = None
    block: Any = None
    for node, place in operators:
        if node.kind() == "deadcheck::recurrent":
            with graph.insert_point_guard(node):
                node.replaceInput(2, graph.insertConstant(place.spelled()))
            last = None
            continue
        here = node.owningBlock()
        if place.number or place != last or here != block:
            with graph.insert_point_guard(node):
                _insert(graph, place.spelled())
        last, block = (place, here) if not place.number else (None, here)
        if node.kind() in _CELLS and not place.is_module:
            after = graph.create("prim::Constant", [], 0)
            after.insertAfter(node)
            with graph.insert_point_guard(after):
                text = graph.insertConstant(place._replace(is_gate=False).spelled())
                _insert_recurrent(graph, [next(iter(node.inputs()))], next(iter(node.outputs())), text)
            after.destroy()
