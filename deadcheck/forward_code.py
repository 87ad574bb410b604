"""Reads the code of a module's class: whether it calls a ReLU, and where a call has moved to."""

from __future__ import annotations

import dis
import linecache
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from deadcheck.errors import PatchError
from deadcheck.plan import Place

_NAMES = frozenset(
    ("relu", "relu_", "relu6", "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "threshold",
     "threshold_", "maximum", "max", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_")
)  # fmt: skip
"""Functions that may be a ReLU."""

_RELU_MODULES = (nn.ReLU, nn.Hardtanh, nn.Threshold, nn.LeakyReLU, nn.RReLU)


def mentions_relu(module: nn.Module) -> bool:
    """Tell whether the code of a module's class, or an attribute of the module, may call a ReLU.

    Classes of ``torch.nn`` do so by modules alone, apart from those that ``stand_ins`` knows.
    """
    if isinstance(module, _RELU_MODULES) and not type(module).__module__.startswith("torch.nn."):
        return True
    held = list(vars(module).values())
    held += [item for value in held if isinstance(value, (list, tuple)) for item in value]
    if any(isinstance(item, nn.Module) or getattr(item, "__name__", "") in _NAMES for item in held):
        return not type(module).__module__.startswith("torch.nn.")
    met: set[FunctionType] = set()
    return any(_calls_relu(function, met) for function in _functions(type(module)))


def _functions(cls: type) -> Iterator[FunctionType]:
    """Yield the functions that a class and its bases define, those of torch apart."""
    for base in cls.__mro__:
        if not base.__module__.startswith("torch.nn.") and base is not object:
            for value in vars(base).values():
                function = getattr(value, "__func__", value)
                if isinstance(function, FunctionType):
                    yield _unwrapped(function)


def _unwrapped(function: Any) -> FunctionType:
    while isinstance(getattr(function, "__wrapped__", None), FunctionType):
        function = function.__wrapped__
    return function  # type: ignore[no-any-return]


def _calls_relu(function: FunctionType, met: set[FunctionType]) -> bool:
    """Tell whether a function, or one that it names, calls something that may be a ReLU."""
    if function in met:
        return False
    met.add(function)
    for code in _codes(function.__code__):
        own = code.co_varnames[:1]
        before = None
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname in _READS and isinstance(name, str):
                is_own = instruction.opname in _ATTRIBUTES and before is not None and before.argval in own
                if name in _NAMES and not is_own:
                    return True
                named = function.__globals__.get(name) if instruction.opname == "LOAD_GLOBAL" else None
                is_users = isinstance(named, FunctionType) and not named.__module__.startswith("torch.")
                if is_users and _calls_relu(_unwrapped(named), met):
                    return True
            before = instruction
    return False


_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_READS = (*_ATTRIBUTES, "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "IMPORT_FROM")


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def found_again(cls: type, places: Sequence[Place], site: str) -> tuple[Place, ...]:
    """Return the places where the calls stand now, by the text of their lines.

    PatchError where the function at hand no longer holds the line. Functions that are not the class's own, and code
    without source, are taken as they were.
    """
    return tuple(_moved(cls, place, site) for place in places)


def _moved(cls: type, place: Place, site: str) -> Place:
    own = list(_functions(cls))
    helpers = [v for f in own for v in f.__globals__.values() if isinstance(v, FunctionType)]
    codes = [c for f in own for c in _codes(f.__code__) if c.co_name == place.function]
    codes = codes or [c for f in helpers for c in _codes(f.__code__) if c.co_name == place.function]
    found = []
    for code in codes:
        lines = {line for _, _, line in code.co_lines() if line is not None}
        texts = {line - code.co_firstlineno: linecache.getline(code.co_filename, line).strip() for line in lines}
        if not place.text or texts.get(place.line, "") in ("", place.text):
            return place
        found += [place._replace(line=line) for line, text in texts.items() if text == place.text]
    if codes and len(found) != 1:
        what = "stands at several places now" if found else "is no longer there"
        raise PatchError(
            f"{site}: the code of {cls.__name__} was changed since the patch was made: {place.text!r} in "
            f"{place.function} {what}; make the patch again"
        )
    return found[0] if found else place
