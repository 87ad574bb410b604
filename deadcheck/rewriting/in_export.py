"""Replaces activations in the graph of an exported program."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from deadcheck import exported
from deadcheck.activations import OPERATORS
from deadcheck.batch import Batch
from deadcheck.boundary import tensors_in
from deadcheck.errors import PatchError
from deadcheck.formats.base import LoadedModel, LoadOptions
from deadcheck.formats.from_export import load_program
from deadcheck.patch_plan import Kind, PatchPlan
from deadcheck.rewriting.base import Made, ProgramSubject, all_or_none, rules_of, skipped_sites
from deadcheck.sites import Family
from deadcheck.substitute import Rule
from deadcheck.unit_masks import UnitMask

_ATEN = torch.ops.aten


def rewrite_export(program: ExportedProgram, rules: Mapping[int, Rule]) -> dict[int, str]:
    """Replace activations of a program, by their numbers; returns why those that cannot be are not.

    Changes the program.
    """
    skipped: dict[int, str] = {}
    module = program.graph_module
    for node, place in list(exported.operators(module)):
        rule = rules.get(place.number) if place.number else None
        if rule is None:
            continue
        reason = _replace(program, node, rule)
        if reason is not None:
            skipped[place.number] = reason
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            child.graph.lint()
            child.recompile()
    return skipped


def function_of(rule: Rule, *, inplace: bool = False, ceiling: float = math.inf) -> Callable[[Tensor], Tensor]:
    """Return what the graph computes at a site, as a function of its own."""
    root = torch.nn.Module()
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(_ATEN.relu_.default if inplace else _ATEN.relu.default, (x,))
    graph.output(node)

    def hold(mask: Tensor) -> fx.Node:
        root.register_buffer("mask", mask)
        return graph.get_attr("mask")

    _insert(graph, node, rule, ceiling, hold)
    return fx.GraphModule(root, graph)


def _replace(program: ExportedProgram, node: fx.Node, rule: Rule) -> str | None:
    """Put what stands in into the place of a node; return why that cannot be."""
    ceiling = ceiling_of(node)
    if ceiling is None:
        return f"{node.target} is no ReLU, or only by a bound that the program computes"
    if rule.replacement.kind is Kind.PRELU:
        return "a learnt slope needs a module of its own, and this is an operator in a program; use leaky"
    if rule.units is not None:
        if any(UnitMask(rule.units).repeats):
            return "its units repeat along an axis of a length that the program does not know"
        if node.graph is not program.graph:
            return "it stands in a branch or loop of the program, where single units cannot be told"
    old = node.name
    new = _insert(node.graph, node, rule, ceiling, lambda mask: _hold(program, mask)).name
    if node.graph is program.graph:
        program.graph_signature.replace_all_uses(old, new)
    return None


def ceiling_of(node: fx.Node) -> float | None:
    """Return the ceiling of an operator that is a ReLU (infinity for none); None for what is no ReLU."""
    assert isinstance(node.target, torch._ops.OpOverload)
    resolve = OPERATORS.get(node.target.overloadpacket)
    if resolve is None or any(isinstance(value, fx.Node) for value in node.args[1:]):
        return None
    activation = resolve(node.args, node.kwargs)
    if activation is None or activation.on != 0:
        return None
    if activation.family is Family.RECTIFIER:
        return math.inf
    return activation.high if activation.family is Family.CLIPPED else None


def _insert(graph: fx.Graph, node: fx.Node, rule: Rule, ceiling: float, hold: Callable[[Tensor], fx.Node]) -> fx.Node:
    x: Any = node.args[0]
    inplace = str(node.target.overloadpacket.__name__).endswith("_")  # type: ignore[union-attr]
    plain = rule.units is None and ceiling == math.inf and rule.replacement.kind is not Kind.GELU
    writes = inplace and plain

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = dict(node.meta)
        return made

    with graph.inserting_before(node):
        source = call(_ATEN.clone.default, x) if inplace and not writes else x
        y = call(*_stand_in(source, rule, writes=writes))
        if ceiling != math.inf:
            y = call(_ATEN.clamp_max.default, y, ceiling)
        if rule.units is not None:
            mask = hold(UnitMask(rule.units).table)
            bounds = () if ceiling == math.inf else (0.0, ceiling)
            rest = call(_ATEN.hardtanh.default, source, *bounds) if bounds else call(_ATEN.relu.default, source)
            y = call(_ATEN.where.self, mask, y, rest)
        if inplace and not writes:
            y = call(_ATEN.copy_.default, x, y)
    node.replace_all_uses_with(y)
    y.meta = dict(node.meta)
    graph.erase_node(node)
    return y


def _stand_in(x: Any, rule: Rule, *, writes: bool) -> tuple[Any, ...]:
    alpha, kind = rule.replacement.alpha, rule.replacement.kind
    if kind is Kind.LEAKY:
        return (_ATEN.leaky_relu_ if writes else _ATEN.leaky_relu).default, x, alpha
    if kind is Kind.ELU:
        return (_ATEN.elu_ if writes else _ATEN.elu).default, x, alpha
    if kind is Kind.GELU:
        return _ATEN.gelu.default, x
    return (_ATEN.silu_ if writes else _ATEN.silu).default, x


def _hold(program: ExportedProgram, mask: Tensor) -> fx.Node:
    """Give a program one more constant, and return the placeholder of it."""
    number = sum(name.startswith("deadcheck_mask") for name in program.constants)
    name = f"deadcheck_mask_{number}"
    specs = program.graph_signature.input_specs
    at = next((i for i, spec in enumerate(specs) if spec.kind in _BEHIND), len(specs))
    holders = [node for node in program.graph.nodes if node.op == "placeholder"]
    fake = detect_fake_mode([node.meta.get("val") for node in holders])
    with program.graph.inserting_before(holders[at] if at < len(holders) else None):
        node: fx.Node = program.graph.placeholder(f"c_{name}")
    node.meta["val"] = mask if fake is None else fake.from_tensor(mask, static_shapes=True)
    specs.insert(at, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name, None))
    program.constants[name] = mask
    return node


_BEHIND = (InputKind.USER_INPUT, InputKind.CUSTOM_OBJ, InputKind.TOKEN)


# The program as what is patched.


class Exported(ProgramSubject):
    """An exported program; ``read`` gives it anew."""

    kind, what, suffix = "an exported program", "the patched program", ".pt2"
    _function_of = staticmethod(function_of)

    def save(self, made: Made, path: Path) -> None:
        """Write the program."""
        torch.export.save(made.product, str(path))

    def read_back(self, path: Path) -> nn.Module:
        """Load the program."""
        return torch.export.load(str(path)).module()

    def __init__(self, loaded: LoadedModel, read: Callable[[], ExportedProgram]) -> None:
        super().__init__(loaded, loaded.module)
        self._read = read

    def made(self, plan: PatchPlan) -> Made:
        """Return the program with its operators replaced, and the module that runs it, with marks."""
        program = self._read()
        skipped = rewrite_export(program, rules_of(plan))
        module = program.module()
        exported.mark(module)
        return Made(module, program, skipped_sites(plan, skipped))


def from_file(loaded: LoadedModel, path: Path, options: LoadOptions) -> Exported:
    """Return a saved program as what is patched."""
    return Exported(loaded, lambda: load_program(path, options)[0])


def patched_export(program: ExportedProgram, plan: PatchPlan) -> ExportedProgram:
    """Return an exported program with a patch applied; the one given stays as it is."""
    held = BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    copy = torch.export.load(held)
    all_or_none(skipped_sites(plan, rewrite_export(copy, rules_of(plan))))
    return copy


def exported_from(loaded: LoadedModel, model: nn.Module, batch: Batch) -> Exported:
    """Export a model in eval mode on one batch, for any number of samples where that is possible.

    PatchError where torch cannot export it, as for branches that depend on the data.
    """
    held = _exported(model, batch)

    def read() -> ExportedProgram:
        held.seek(0)
        return torch.export.load(held)

    program = read()
    module = program.module()
    exported.mark(module)
    fixed = exported.static_batch(program)
    return Exported(replace(loaded, module=module, batch_size=fixed, example=None), read)


def _exported(model: nn.Module, batch: Batch) -> BytesIO:
    held = BytesIO()
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for _, tensor in tensors_in([batch.args, dict(batch.kwargs)]):
        if tensor.dim() and tensor.shape[0] == batch.samples:
            shapes[tensor] = {0: Dim.AUTO}  # type: ignore[no-untyped-call]
    # By position as far as that goes: a program takes its arguments as they were given when it was exported.
    given = inspect.signature(model.forward).bind(*batch.args, **batch.kwargs)
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    try:
        logger.disabled = True
        dynamic: Any = shapes  # which torch takes, and its annotation leaves out
        torch.export.save(torch.export.export(model, given.args, given.kwargs, dynamic_shapes=dynamic), held)
    except Exception as error:  # the model's own code is traced, and torch raises almost anything
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PatchError(
            f"torch cannot export this model ({text[:200]}), so no .pt2 can be written; use the patch file with "
            "deadcheck.apply_patch"
        ) from error
    finally:
        logger.disabled = before
    return held
