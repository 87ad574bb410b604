"""Tells whether two forward passes of a model may run at the same time without minding one another."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_KEEPS = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
_MOST_FUNCTIONS = 2000


def may_run_side_by_side(model: nn.Module, entry: Callable[..., Any]) -> bool:
    """Tell whether nothing in the model's code keeps anything from one line of a forward pass to the next.

    Code that stores an attribute may read it again while another pass has stored its own. What a pass leaves behind
    shows in the model afterwards (``preserve.Held``); this finds what it takes away again. Programs and hooks are not
    looked into: their answer is no.
    """
    if torch._C._len_torch_function_stack() or torch.is_autocast_enabled("cpu"):
        return False  # other threads would not have them
    for module in model.modules():
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule) or "forward" in own:
            return False
        if any(own.get(name) for name in ("_forward_hooks", "_forward_pre_hooks")):
            return False
    functions = [type(module).forward for module in model.modules()]
    functions += [getattr(entry, "__func__", entry)] if entry is not model else []
    classes = {type(module) for module in model.modules()}
    return not any(_keeps(function.__code__) for function in _reached(functions, classes))


def _reached(functions: list[Any], classes: set[type]) -> Iterator[FunctionType]:
    """Yield the functions outside torch that these may call, found by the names in their code."""
    seen: set[CodeType] = set()
    while functions and len(seen) < _MOST_FUNCTIONS:
        function = functions.pop()
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or function.__module__.partition(".")[0] == "torch":
            continue
        if function.__code__ in seen:
            continue
        seen.add(function.__code__)
        yield function
        for name in _names(function.__code__):
            functions.append(function.__globals__.get(name))
            functions += [_plain(vars(base).get(name)) for cls in classes for base in cls.__mro__ if name in vars(base)]


def _plain(value: Any) -> Any:
    """Return the function inside a property, a class method or a static method."""
    return getattr(value, "fget", None) or getattr(value, "__func__", value)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _keeps(code: CodeType) -> bool:
    if any(step.opname in _KEEPS for step in dis.get_instructions(code)):
        return True
    return any(_keeps(inner) for inner in code.co_consts if isinstance(inner, CodeType))
