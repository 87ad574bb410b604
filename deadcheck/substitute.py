"""Replaces calls of ReLU while a model runs, above autograd, so that gradients are those of what stands in.

A module whose code calls ReLU gets a subclass of its own class, whose ``forward`` catches the calls. Nothing else
changes: parameters, names, hooks, copying and saving are those of the module. Where all calls of a module are treated
alike, and for a whole model, ``torch.compile`` and ``torch.export`` trace through it; where calls are told apart by
their place in the code, such a module runs uncompiled.
"""

from __future__ import annotations

import functools
import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from deadcheck.callsites import is_border, place_of, without_gradient
from deadcheck.patch_plan import Replacement, Units
from deadcheck.relu_calls import relu_call
from deadcheck.stand_ins import Function, stand_in

Key = tuple[tuple[str, int, int], ...]
"""Places from a call outward."""


@dataclass(frozen=True)
class Rule:
    """What stands in for the calls of one site."""

    replacement: Replacement
    units: Units | None = None


@dataclass(frozen=True)
class Turns:
    """Rules for a place that serves several sites in turn; None leaves a turn as it is."""

    rules: tuple[Rule | None, ...]


Rules = dict[Key, "Rule | Turns"]
"""What stands in, by the way to a call. No key begins another; the empty one fits all calls of a module."""


@dataclass(eq=False)
class Group:
    """The rules of one patched model, shared by its modules."""

    modules: dict[str, Rules] = field(default_factory=dict)
    """Module path -> rules for the calls in its own code."""

    everywhere: Rule | None = None
    """What stands in for the calls that no rule is for."""

    clipped: bool = False

    def __post_init__(self) -> None:
        self._made: dict[tuple[Rule, float | None], Function] = {}
        self.plain = None if self.everywhere is None else stand_in(self.everywhere.replacement)

    def stand_in(self, rule: Rule, ceiling: float | None) -> Function:
        """Return the function of a rule, made once."""
        made = self._made.get((rule, ceiling))
        if made is None:
            made = self._made[rule, ceiling] = stand_in(rule.replacement, ceiling=ceiling, units=rule.units)
        return made

    def __reduce__(self) -> Any:
        # The functions are made again: closures cannot be pickled.
        return Group, (self.modules, self.everywhere, self.clipped)


class _Running(threading.local):
    """The groups whose calls are being caught in this thread."""

    def __init__(self) -> None:
        self.groups: list[Group] = []


_running = _Running()


def substitute(module: nn.Module, group: Group, path: str, methods: tuple[str, ...] = ("forward",)) -> None:
    """Give a module a subclass of its class that catches the ReLUs of its code, or of all below it.

    ``methods`` are those that are called from outside.
    """
    module.__class__ = _subclass(type(module), group, path, methods)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``substitute``."""
    return getattr(type(module), "_deadcheck_base", type(module))


def can_substitute(module: nn.Module) -> str | None:
    """Return why a module's calls cannot be caught; None when they can."""
    if "forward" in vars(module):
        return "its forward was replaced on the object itself"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript program"
    if hasattr(type(module), "__deepcopy__"):
        return "its class copies itself in a way of its own, which would lose the change"
    return None


def _subclass(base: type[nn.Module], group: Group, path: str, methods: tuple[str, ...]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Pickle and copy as the original class with its rules: a class made while running cannot be imported."""
        reduced: tuple[Any, ...] = base.__reduce_ex__(self, protocol)  # type: ignore[assignment]
        make, given, *state = reduced
        given = tuple(base if value is type(self) else value for value in given)
        return (_restored, (make, given, group, path, methods), *state)

    catch = _catching if group.modules else _catching_all
    names = {name: catch(getattr(base, name), group, path) for name in methods}
    names |= {"__reduce_ex__": reduce, "_deadcheck_base": base, "__module__": base.__module__}
    return type(base.__name__, (base,), {**names, "__qualname__": base.__qualname__, "__doc__": base.__doc__})


def _restored(make: Any, given: tuple[Any, ...], group: Group, path: str, methods: tuple[str, ...]) -> nn.Module:
    module: nn.Module = make(*given)
    substitute(module, group, path, methods)
    return module


def _catching_all(method: Any, group: Group, path: str) -> Any:
    """Return a method of a module, with all calls below it caught; plain enough for a compiler to trace."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if group in _running.groups:
            return method(self, *args, **kwargs)
        _running.groups.append(group)
        try:
            with _Everywhere(group):
                return method(self, *args, **kwargs)
        finally:
            _running.groups.remove(group)

    return run


def _catching(method: Any, group: Group, path: str) -> Any:
    """Return a method of a module, with the calls in its code caught by their places."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # A compiler moves code, and the places in it are what tells the calls apart.
            return torch.compiler.disable(_located)(method, self, group, path, args, kwargs)
        return _located(method, self, group, path, args, kwargs)

    return run


class _Everywhere(TorchFunctionMode):
    """Catches every ReLU; plain enough for a compiler to trace."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = relu_call(func, args, kwargs or {}, clipped=self.group.clipped)
        if call is None or call.is_bound or (not torch.compiler.is_compiling() and _keeps_gradient(sys._getframe(1))):
            return func(*args, **(kwargs or {}))
        assert self.group.everywhere is not None
        assert self.group.plain is not None
        if call.ceiling is not None:
            return self.group.stand_in(self.group.everywhere, call.ceiling)(call.input, call.inplace)
        return self.group.plain(call.input, call.inplace)


def _located(method: Any, module: nn.Module, group: Group, path: str, args: Any, kwargs: Any) -> Any:
    """Run a module's own code with its calls caught; this frame tells whose code they stand in."""
    if group in _running.groups:
        return method(module, *args, **kwargs)
    _running.groups.append(group)
    try:
        with _Located(group):
            return method(module, *args, **kwargs)
    finally:
        _running.groups.remove(group)


class _Located(TorchFunctionMode):
    """Catches ReLUs by their place in the code."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        self._turns: dict[tuple[str, Key], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = relu_call(func, args, kwargs or {}, clipped=self.group.clipped)
        if call is None or _keeps_gradient(sys._getframe(1)):
            return func(*args, **(kwargs or {}))
        rule = self._rule(sys._getframe(1)) or (None if call.is_bound else self.group.everywhere)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return self.group.stand_in(rule, call.ceiling)(call.input, call.inplace)

    def _rule(self, frame: FrameType | None) -> Rule | None:
        """Walk outward from a call until its module is known and the way to it fits a rule."""
        path: str | None = None
        way: list[tuple[str, int, int]] = []
        while frame is not None:
            place = place_of(frame)
            if place is not None:
                way.append(place.key)
            elif path is None and is_border(frame):
                return None  # the call stands in the code of a module that has no rules
            elif path is None and frame.f_code is _LOCATED and frame.f_locals["group"] is self.group:
                path = frame.f_locals["path"]
            if path is not None:
                rules = self.group.modules.get(path, {})
                key = next((k for k in _prefixes(way) if k in rules), None)
                if key is not None:
                    return self._turn(path, key, rules[key])
                if not any(len(k) > len(way) for k in rules):
                    return None
            frame = frame.f_back
        return None

    def _turn(self, path: str, key: Key, rule: Rule | Turns) -> Rule | None:
        if not isinstance(rule, Turns):
            return rule
        turn = self._turns[path, key] = self._turns.get((path, key), -1) + 1
        return rule.rules[turn % len(rule.rules)]


_LOCATED = _located.__code__


def _keeps_gradient(frame: FrameType | None) -> bool:
    """Tell whether a call would keep its own gradient: it is run in backward where nothing catches it, or not run."""
    while frame is not None and frame.f_code.co_filename != _LOCATED.co_filename:
        if without_gradient(frame) is not None:
            return True
        frame = frame.f_back
    return False


def _prefixes(way: list[tuple[str, int, int]]) -> list[Key]:
    return [tuple(way[:length]) for length in range(len(way) + 1)]
