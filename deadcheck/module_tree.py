"""Walks a pickled tree of modules that is not built, and names what in it no model has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deadcheck.errors import TrustRequired
from deadcheck.pickles import Global, Inert
from deadcheck.safe_text import brief

MAX_DEPTH = 100
_MAX_MODULES = 100_000
_MAX_LETTERS = 32 << 20
"""Letters in all paths together."""

_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    _COMPILED: "_orig_mod",
}
"""Classes around a model of which only the model is read or run -> the attribute that holds it."""

_TABLES = ("_parameters", "_buffers", "_modules")

HOOK_TABLES = frozenset(
    ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
     "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")
)  # fmt: skip
"""Attributes that hold what runs with a module; the tables of hooks on saving and loading have no part in that."""

HOOKS = frozenset(
    (*(f"torch.nn.utils.prune.{name}" for name in ("Identity", "RandomUnstructured", "L1Unstructured",
       "RandomStructured", "LnStructured", "CustomFromMask", "PruningContainer")),
     "torch.nn.utils.weight_norm.WeightNorm", "torch.nn.utils.spectral_norm.SpectralNorm")
)  # fmt: skip
"""Hooks that torch's own utilities leave on a module: they compute its weight from others."""

FUNCTIONS = frozenset(
    (*(f"torch.nn.functional.{name}" for name in ("relu", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "relu6",
       "tanh", "sigmoid", "mish", "hardtanh", "hardswish", "hardsigmoid", "softplus", "logsigmoid", "softmax")),
     *(f"torch._C._nn.{name}" for name in ("gelu", "softplus", "log_sigmoid")),
     *(f"torch.{name}" for name in ("relu", "tanh", "sigmoid", "selu", "celu")),
     *(f"torch._VF.{name}" for name in ("relu", "tanh", "sigmoid")))
)  # fmt: skip
"""Functions that a module may keep as an attribute."""

METHODS = frozenset(
    ("forward", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl", "_slow_forward", "eval", "train", "apply",
     "state_dict", "load_state_dict", "parameters", "named_parameters", "buffers", "named_buffers", "children",
     "named_children", "modules", "named_modules", "get_submodule", "register_buffer", "register_parameter",
     "requires_grad_", "zero_grad", "to", "_apply", "_replicate_for_data_parallel", "_get_name", "extra_repr")
)  # fmt: skip
"""Names of a module's own methods: an attribute of that name would take the method's place."""


def is_module(value: Any) -> bool:
    """Tell an object that looks like a module."""
    if not isinstance(value, Inert):
        return False
    return (isinstance(value.state, dict) and "_parameters" in value.state) or value.name == _COMPILED


def held_in(module: object) -> str | None:
    """Return the attribute in which a wrapper that is built holds the model; None for any other module."""
    return WRAPPERS.get(f"{type(module).__module__}.{type(module).__qualname__}")


def inner(node: Inert) -> Inert | None:
    """Return the model inside a wrapper."""
    if node.name == _COMPILED:  # it pickles as a call with the model and what compiled it
        child = node.args[0] if isinstance(node.args, tuple) and node.args else None
    else:
        child = dict(_children(node)).get(WRAPPERS[node.name])
    return child if isinstance(child, Inert) else None


def walk(root: Inert, source: str) -> Iterator[tuple[str, Inert]]:
    """Yield (path, module) for every path in a tree, a shared module under each of its paths; the root's is empty.

    TrustRequired where a module holds itself, or the tree has no end that could be reached.
    """
    yield "", root
    stack = [(root, "", _children(root))]
    above = {id(root)}
    count = letters = 0
    while stack:
        node, path, rest = stack[-1]
        name, child = next(rest, ("", None))
        if child is None:
            stack.pop()
            above.discard(id(node))
            continue
        where = f"{path}.{name}" if path else name
        count, letters = count + 1, letters + len(where)
        if id(child) in above:
            raise refusal(source, where, "holds itself, which no model does")
        if len(stack) > MAX_DEPTH:
            raise refusal(source, where, f"is nested more than {MAX_DEPTH} modules deep")
        if count > _MAX_MODULES or letters > _MAX_LETTERS:
            raise refusal(source, "", "holds modules without end, shared ones counted under each path")
        yield where, child
        stack.append((child, where, _children(child)))
        above.add(id(child))


def _children(node: Inert) -> Iterator[tuple[str, Inert]]:
    if node.name == _COMPILED and (child := inner(node)) is not None:
        yield "_orig_mod", child
    children = node.state.get("_modules") if isinstance(node.state, dict) else None
    for name, child in items(children):
        if isinstance(child, Inert):
            yield name, child


def items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of a mapping; nothing of anything else."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key if isinstance(key, str) else "?", item


def check(root: Inert, source: str) -> None:
    """Raise TrustRequired, naming what it met and where, for a tree that ``torch.save`` never writes."""
    met = set()
    for path, node in walk(root, source):
        if id(node) not in met:
            met.add(id(node))
            if node.name not in WRAPPERS:
                _check_one(node, path, source)


def _check_one(node: Inert, path: str, source: str) -> None:
    state = node.state
    if node.args:
        raise refusal(source, path, f"calls {node.name} with arguments, which torch.save never writes")
    if not isinstance(state, dict) or not all(type(key) is str for key in state):
        raise refusal(source, path, "has a state that is no dict of names")
    for name, value in state.items():
        where = f"{path}.{name}" if path else name
        if name.startswith("__") or (name in METHODS and (value is not None or name == "forward")):
            raise shadowed(source, where)
        if isinstance(value, Global):
            _check_function(node, name, value, source, where)
        if name in HOOK_TABLES:
            _check_hooks(value, where, source)
        if name in _TABLES and not (isinstance(value, Mapping) and all(type(key) is str for key in value)):
            raise refusal(source, where, "has a name that is no text, or is no dict")
        if name == "_modules":
            _check_children(value, path, source)


def _check_function(node: Inert, name: str, value: Global, source: str, where: str) -> None:
    if value.name not in FUNCTIONS:
        raise refusal(source, where, f"holds {value.name}, a function or class that is not known to be harmless")
    if node.name.startswith("torch.nn.modules.") and name != "activation":
        raise refusal(source, where, f"holds {value.name}, a function that no such layer keeps there")


def _check_hooks(value: Any, where: str, source: str) -> None:
    hooks = list(value.values()) if isinstance(value, Mapping) else [value] if value else []
    if not all(isinstance(hook, Inert) and hook.name in HOOKS for hook in hooks):
        raise refusal(source, where, "is a hook, which would run code of the file")


def _check_children(value: Mapping[str, Any], path: str, source: str) -> None:
    for name, child in value.items():
        if child is not None and not isinstance(child, Inert):
            where = f"{path}.{name}" if path else name
            raise refusal(source, where, f"is a {type(child).__name__} where a module must stand")


def shadowed(source: str, where: str) -> TrustRequired:
    """Return the refusal of an attribute in the place of a method."""
    return refusal(source, where, "takes the place of a method, so the file would change what the model does")


def refusal(source: str, where: str, what: str) -> TrustRequired:
    """Return the refusal of a tree, naming what was met and where."""
    return TrustRequired(f"{source}: {brief(where) or 'the model'} {what}; nothing was run; do not load this file")
