"""Replaces activations in the inlined graph of a TorchScript program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deadcheck.formats.base import LoadedModel
from deadcheck.patch_plan import Kind, PatchPlan
from deadcheck.rewriting.base import Made, ProgramSubject, all_or_none, rules_of, skipped_sites
from deadcheck.scripted import Program
from deadcheck.substitute import Rule
from deadcheck.unit_masks import UnitMask


def rewrite_script(program: Program, rules: Mapping[int, Rule], *, method: str = "forward") -> dict[int, str]:
    """Replace activations of a program, by their numbers in a method; returns why those that cannot be are not.

    Changes the program. Its list of operators then names the new ones, so that it can still be marked.
    """
    skipped: dict[int, str] = {}
    graph = program.graphs[method]
    operators = program.operators[method]
    for index, (node, place) in enumerate(operators):
        rule = rules.get(place.number) if place.number else None
        if rule is None:
            continue
        made = _replaced(graph, node, rule)
        if isinstance(made, str):
            skipped[place.number] = made
        else:
            operators[index] = (made, place)
    torch._C._jit_pass_lint(graph)
    return skipped


def reread(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return a copy by way of a file: one by ``deepcopy`` has the same graphs, and torch has compiled those already."""
    held = BytesIO()
    torch.jit.save(module, held)
    held.seek(0)
    return torch.jit.load(held)  # type: ignore[no-any-return]


def leave_fast_path(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Keep transformer layers from running as one fused operator, which computes a ReLU that nothing can replace."""
    for _, child in module.named_modules():
        for name, value in (("activation_relu_or_gelu", 0), ("use_nested_tensor", False)):
            if child._c.hasattr(name):
                child._c.setattr(name, value)
    return module


def function_of(rule: Rule, *, inplace: bool = False, ceiling: float = torch.inf) -> Callable[[Tensor], Tensor]:
    """Return what the graph computes at a site, as a function of its own."""
    graph = torch._C.Graph()
    x = graph.addInput("x")
    x.setType(torch._C.TensorType.get())
    output = graph.create("aten::relu_" if inplace else "aten::relu", [x], 1)
    graph.appendNode(output)
    graph.registerOutput(output.output())
    made = _insert(graph, output, x, rule, ceiling)
    assert not isinstance(made, str)
    run = torch._C._create_function_from_graph("stand_in", graph)
    return lambda value: run(value)  # type: ignore[no-any-return]


def _replaced(graph: Any, node: Any, rule: Rule) -> Any:
    """Put what stands in into the place of a node, and return its first node; or why it cannot be."""
    ceiling = ceiling_of(node)
    if ceiling is None:
        return f"{node.kind()} is no ReLU, or only by a bound that the program computes"
    return _insert(graph, node, next(iter(node.inputs())), rule, ceiling)


def ceiling_of(node: Any) -> float | None:
    """Return the ceiling of an operator that is a ReLU (infinity for none); None for what is no ReLU."""
    name = node.kind().removeprefix("aten::").removesuffix("_")
    inputs = list(node.inputs())[1:]
    if any(value.node().kind() != "prim::Constant" for value in inputs):
        return None
    bounds = [value.toIValue() for value in inputs]
    if name == "relu":
        return torch.inf
    if name == "relu6":
        return 6.0
    if name in ("clamp", "hardtanh"):
        low, high = (*bounds, None, None)[:2]
        return None if low is None or low != 0 else torch.inf if high is None else float(high)
    zero = name in ("clamp_min", "leaky_relu", "threshold") and all(bound == 0 for bound in bounds)
    return torch.inf if zero else None


def _insert(graph: Any, node: Any, x: Any, rule: Rule, ceiling: float) -> Any:
    replacement, inplace = rule.replacement, node.kind().endswith("_")
    if replacement.kind is Kind.PRELU:
        return "a learnt slope needs a module of its own, and this is an operator in a program; use leaky"
    mask = None if rule.units is None else UnitMask(rule.units)
    if mask is not None and any(mask.repeats):
        return "its units repeat along an axis of a length that the program does not know"
    with graph.insert_point_guard(node):
        writes = inplace and mask is None and ceiling == torch.inf and replacement.kind is not Kind.GELU
        source = x if not inplace or writes else _node(graph, "aten::clone", [x, graph.insertConstant(None)])
        first = y = _stand_in(graph, source, rule, writes=writes)
        if ceiling != torch.inf:
            y = _node(graph, "aten::clamp_max", [y, graph.insertConstant(ceiling)])
        if mask is not None:
            rest = _node(graph, "aten::hardtanh", [source, *map(graph.insertConstant, (0.0, ceiling))])
            rest = _node(graph, "aten::relu", [source]) if ceiling == torch.inf else rest
            y = _node(graph, "aten::where", [graph.insertConstant(mask.table), y, rest])
        if inplace and not writes:
            y = _node(graph, "aten::copy_", [x, y, graph.insertConstant(False)])
    node.output().replaceAllUsesWith(y)
    node.destroy()
    return first.node()


def _stand_in(graph: Any, x: Any, rule: Rule, *, writes: bool) -> Any:
    alpha, kind, under = rule.replacement.alpha, rule.replacement.kind, "_" if writes else ""
    if kind is Kind.LEAKY:
        return _node(graph, f"aten::leaky_relu{under}", [x, graph.insertConstant(alpha)])
    if kind is Kind.ELU:
        constants = [graph.insertConstant(value) for value in (alpha, 1, 1)]
        return _node(graph, f"aten::elu{under}", [x, *constants])
    if kind is Kind.GELU:
        return _node(graph, "aten::gelu", [x, graph.insertConstant("none")])
    return _node(graph, f"aten::silu{under}", [x])


def _node(graph: Any, kind: str, inputs: list[Any]) -> Any:
    value = graph.insertNode(graph.create(kind, inputs, 1)).output()
    value.setType(torch._C.TensorType.get())
    return value


# The program as what is patched.


class Scripted(ProgramSubject):
    """A TorchScript program; ``read`` gives it anew."""

    kind, what, suffix = "a TorchScript program", "the patched program", ".pt"
    _function_of = staticmethod(function_of)

    def save(self, made: Made, path: Path) -> None:
        """Write the program."""
        torch.jit.save(made.product, str(path))

    def read_back(self, path: Path) -> nn.Module:
        """Load the program."""
        return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-any-return]

    def __init__(self, loaded: LoadedModel, read: Callable[[], torch.jit.ScriptModule], method: str) -> None:
        # Measured without the fused layers of torch, as the patched program runs: their operators can be replaced.
        self._read, self._method = read, method
        program = self._program()
        program.mark()
        super().__init__(replace(loaded, module=program.module), program.module)

    def _program(self) -> Program:
        return Program(leave_fast_path(self._read()))

    def made(self, plan: PatchPlan) -> Made:
        """Return the program with its operators replaced, once with marks to be measured, once without."""
        rules = rules_of(plan)
        program, marked = self._program(), self._program()
        skipped = rewrite_script(program, rules, method=self._method)
        rewrite_script(marked, rules, method=self._method)
        marked.mark()
        return Made(marked.module, program.module, skipped_sites(plan, skipped))


def patched_script(module: torch.jit.ScriptModule, plan: PatchPlan) -> torch.jit.ScriptModule:
    """Return a TorchScript program with a patch applied; the one given stays as it is."""
    program = Program(leave_fast_path(reread(module)))
    all_or_none(skipped_sites(plan, rewrite_script(program, rules_of(plan))))
    return program.module
