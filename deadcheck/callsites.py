"""Where in the user's code a call stands, read from the Python stack.

Frames of torch, of the standard library and of deadcheck are passed over: they differ between versions. Comprehensions
count as part of the function that they stand in, as they do from Python 3.12 on.
"""

from __future__ import annotations

import bisect
import dis
import linecache
import os
import sysconfig
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from deadcheck.errors import PatchError
from deadcheck.patch_plan import Place

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OWN = os.path.dirname(__file__) + os.sep
_CHECKPOINT = os.path.join(_TORCH, "utils", "checkpoint.py")
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
_CALL_IMPL = nn.Module._call_impl.__code__
_CALLS = frozenset(code for name, code in dis.opmap.items() if name.startswith("CALL") and "INTRINSIC" not in name)


class Way(NamedTuple):
    """The calls that lead from the model's caller to an operator, innermost first."""

    places: tuple[Place, ...]
    own: int
    """How many of them stand in the module that runs; the others lead to that module."""

    reason: str | None = None
    """Why the call cannot be changed without its gradient."""


_places: dict[tuple[int, int], tuple[CodeType, Place]] = {}


def way_to(frame: FrameType | None, stop: CodeType) -> Way:
    """Return the way from the code ``stop``, which calls the model, to a frame."""
    places: list[Place] = []
    own: int | None = None
    reason: str | None = None
    while frame is not None and frame.f_code is not stop:
        if own is None and is_border(frame):
            own = len(places)
        if own is None:
            reason = reason or without_gradient(frame)
        place = place_of(frame)
        if place is not None:
            places.append(place)
        frame = frame.f_back
    return Way(tuple(places), len(places) if own is None else own, reason)


def without_gradient(frame: FrameType) -> str | None:
    """Return why a call inside a frame keeps its own gradient when it is changed; None where it does not."""
    if frame.f_code.co_filename == _CHECKPOINT:
        return "torch.utils.checkpoint runs it again in backward outside of any module; put it into a module"
    if _is_autograd_function(frame.f_code):
        return "it stands in an autograd function, whose backward is written by hand; change it there"
    return None


def _is_autograd_function(code: CodeType) -> bool:
    """Tell whether this is the ``forward`` of an autograd function, which torch may call without a frame of its own."""
    known = _forwards.get(id(code))
    if known is None:
        kinds = [torch.autograd.Function]
        for kind in kinds:
            kinds += kind.__subclasses__()
        forwards = [unwrapped(getattr(kind.forward, "__func__", kind.forward)) for kind in kinds]
        known = _forwards[id(code)] = (code, any(getattr(f, "__code__", None) is code for f in forwards))
    return known[1]


_forwards: dict[int, tuple[CodeType, bool]] = {}
"""The code is kept beside the answer, so that its id stays its own."""


def is_border(frame: FrameType) -> bool:
    """Tell whether this is the frame in which ``nn.Module`` calls a module's ``forward``."""
    return frame.f_code is _CALL_IMPL


def place_of(frame: FrameType) -> Place | None:
    """Return the place at which a frame stands; None for a frame that is not the user's."""
    code = frame.f_code
    known = _places.get((id(code), frame.f_lasti))
    if known is not None:
        return known[1]
    name = code.co_filename
    if code.co_name in _COMPREHENSIONS or name.startswith((_TORCH, _OWN)):
        return None
    if name.startswith(_STDLIB) and "-packages" not in name:
        return None
    text = linecache.getline(name, frame.f_lineno).strip()
    place = Place(code.co_name, frame.f_lineno - code.co_firstlineno, _number(code, frame), text)
    # The code is kept beside its place, so that its id stays its own.
    _places[id(code), frame.f_lasti] = (code, place)
    return place


def _number(code: CodeType, frame: FrameType) -> int:
    """Return the number of the running call among the calls on its line."""
    line, offsets = None, []
    for instruction in dis.get_instructions(code):
        # From Python 3.13 on the line stands in a field of its own.
        line = getattr(instruction, "line_number", instruction.starts_line) or line
        if line == frame.f_lineno and instruction.opcode in _CALLS:
            offsets.append(instruction.offset)
    return max(bisect.bisect_right(offsets, frame.f_lasti) - 1, 0)


# The code of a class.


def functions_of(cls: type) -> Iterator[FunctionType]:
    """Yield the functions that a class and its bases define, those of torch apart."""
    for base in cls.__mro__:
        if not base.__module__.startswith("torch.nn.") and base is not object:
            for value in vars(base).values():
                function = getattr(value, "__func__", value)
                if isinstance(function, FunctionType):
                    yield unwrapped(function)


def unwrapped(function: Any) -> FunctionType:
    """Return the function that decorators were put around."""
    while isinstance(getattr(function, "__wrapped__", None), FunctionType):
        function = function.__wrapped__
    return function  # type: ignore[no-any-return]


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def found_again(cls: type, places: Sequence[Place], site: str) -> tuple[Place, ...]:
    """Return the places where the calls stand now, by the text of their lines.

    PatchError where the function at hand no longer holds the line. Functions that are not the class's own, and code
    without source, are taken as they were.
    """
    return tuple(_moved(cls, place, site) for place in places)


def _moved(cls: type, place: Place, site: str) -> Place:
    own = list(functions_of(cls))
    helpers = [v for f in own for v in f.__globals__.values() if isinstance(v, FunctionType)]
    codes = [c for f in own for c in codes_in(f.__code__) if c.co_name == place.function]
    codes = codes or [c for f in helpers for c in codes_in(f.__code__) if c.co_name == place.function]
    found = []
    for code in codes:
        lines = {line for _, _, line in code.co_lines() if line is not None}
        texts = {line - code.co_firstlineno: linecache.getline(code.co_filename, line).strip() for line in lines}
        if not place.text or not any(texts.values()) or texts.get(place.line) == place.text:
            return place
        found += [place._replace(line=line) for line, text in texts.items() if text == place.text]
    if codes and len(found) != 1:
        what = "stands at several places now" if found else "is no longer there"
        raise PatchError(
            f"{site}: the code of {cls.__name__} was changed since the patch was made: {place.text!r} in "
            f"{place.function} {what}; make the patch again"
        )
    return found[0] if found else place
