"""Tells whether two forward passes of a model may run at the same time without minding one another."""

from __future__ import annotations

import dis
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_KEEPS = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
_MOST_FUNCTIONS = 2000
_CONTAINERS = (list, dict, set, deque, bytearray)
_PLAIN = (
    int, float, complex, str, bytes, type(None), type, Enum, FunctionType, BuiltinFunctionType, Tensor, nn.Module,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
_OWN = frozenset(vars(nn.Module()))
"""What every module has of its own."""


def may_run_side_by_side(model: nn.Module, entry: Callable[..., Any]) -> bool:
    """Tell whether nothing in the model's code keeps anything from one line of a forward pass to the next.

    Code that stores an attribute, or puts something into a list that it can reach, may take it out again while another
    pass has put in its own. What a pass leaves behind shows in the model afterwards (``preserve.Held``); this finds
    what it may have taken away again. Programs, hooks and objects are not looked into: their answer is no.
    """
    if torch._C._len_torch_function_stack():
        return False  # other threads would not have them
    for module in model.modules():
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule) or "forward" in own:
            return False
        if any(own.get(name) for name in ("_forward_hooks", "_forward_pre_hooks")):
            return False
        if not _is_torchs(type(module)) and not all(_is_plain(v) for name, v in own.items() if name not in _OWN):
            return False
    functions = [type(module).forward for module in model.modules()]
    functions += [getattr(entry, "__func__", entry)] if entry is not model else []
    classes = {type(module) for module in model.modules()}
    functions += [value for module in model.modules() for value in vars(module).values() if callable(value)]
    held = (value for cls in classes for base in cls.__mro__ if not _is_torchs(base) for value in vars(base).values())
    if any(isinstance(value, _CONTAINERS) for value in held):
        return False
    return not any(_keeps(function.__code__) or _holds(function) for function in _reached(functions, classes))


def _is_torchs(what: Any) -> bool:
    return str(what.__module__).partition(".")[0] in ("torch", "builtins")


def _is_plain(value: Any) -> bool:
    """Tell whether nothing can be put into a value, tensors aside, whose versions tell that they were written to."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _holds(function: FunctionType) -> bool:
    """Tell whether a function can reach a container other than by its arguments."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    reached = [function.__globals__.get(name) for name in _names(function.__code__)]
    return any(isinstance(value, _CONTAINERS) for value in (*cells, *reached, *(function.__defaults__ or ())))


def _reached(functions: list[Any], classes: set[type]) -> Iterator[FunctionType]:
    """Yield the functions outside torch that these may call, found by the names in their code."""
    seen: set[CodeType] = set()
    while functions and len(seen) < _MOST_FUNCTIONS:
        function = functions.pop()
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or _is_torchs(function):
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
