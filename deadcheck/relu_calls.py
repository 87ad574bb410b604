"""Which calls of torch's functions are a ReLU, as seen above autograd, or as read from the code of a class."""

from __future__ import annotations

import dis
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deadcheck.activations import BOUNDS, OPERATORS, Activation
from deadcheck.callsites import codes_in, functions_of, unwrapped
from deadcheck.sites import Family


@dataclass(frozen=True)
class ReluCall:
    """A call that computes a ReLU, or one with a ceiling."""

    input: Tensor
    inplace: bool
    ceiling: float | None = None
    is_bound: bool = False
    """Whether it may as well bound what no layer made, so that a patch changes it only where a site names it."""


_NAMES = {
    "relu": ("relu",),
    "relu_": ("relu_",),
    "clamp": ("clamp", "clip"),
    "clamp_": ("clamp_", "clip_"),
    "clamp_min": ("clamp_min",),
    "clamp_min_": ("clamp_min_",),
    "threshold": ("threshold", "_threshold"),
    "threshold_": ("threshold_",),
    "maximum": ("maximum", "max"),
    "hardtanh": ("hardtanh",),
    "hardtanh_": ("hardtanh_",),
    "leaky_relu": ("leaky_relu",),
    "leaky_relu_": ("leaky_relu_",),
}
"""Operator of aten -> what Python calls it."""

_HOMES = (torch, Tensor, F, torch._C._nn)
_INPLACE_AT = {"relu": 1, "threshold": 3, "hardtanh": 3, "leaky_relu": 2, "relu6": 1}
"""Position of ``inplace`` among the arguments of the functions of ``torch.nn.functional``."""


def _table() -> dict[Any, tuple[str, Callable[..., Activation | None]]]:
    table: dict[Any, tuple[str, Callable[..., Activation | None]]] = {}
    for name, spellings in _NAMES.items():
        packet = getattr(torch.ops.aten, name)
        entry = (name, OPERATORS[packet])
        table[packet] = entry
        table.update((getattr(packet, overload), entry) for overload in packet.overloads())
        table.update((getattr(home, s), entry) for home in _HOMES for s in spellings if hasattr(home, s))
    six = Activation("relu6", Family.CLIPPED, low=0.0, high=6.0)
    table[F.relu6] = ("relu6", lambda args, kwargs: six)
    return table


_CALLS = _table()


def relu_call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, clipped: bool) -> ReluCall | None:
    """Return what a call computes if that is a ReLU on floating values (``clipped``: or a ReLU with a ceiling)."""
    if func is torch.rnn_relu_cell:
        return _cell(*args, **kwargs)
    entry = _CALLS.get(func)
    if entry is None or not (args or "input" in kwargs) or "out" in kwargs:
        return None
    name, resolve = entry
    x = args[0] if args else kwargs["input"]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    activation = resolve(args or (x,), kwargs)
    if activation is None or activation.on != 0 or not _keeps_type(name, x, args, kwargs):
        return None
    inplace = name.endswith("_") or bool(_argument(args, kwargs, _INPLACE_AT.get(name), "inplace"))
    is_bound = name in BOUNDS
    if activation.family is Family.RECTIFIER:
        return ReluCall(x, inplace, is_bound=is_bound)
    if clipped and activation.family is Family.CLIPPED:
        return ReluCall(x, inplace, activation.high, is_bound)
    return None


def _cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> ReluCall:
    """Compute the input of the ReLU inside a recurrent cell."""
    return ReluCall(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh), False)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int | None, name: str) -> Any:
    if position is not None and len(args) > position:
        return args[position]
    return kwargs.get(name, False)


def _keeps_type(name: str, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether the bound, where it is a tensor, changes neither shape nor type of the result."""
    bounds = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor) and value is not x]
    if name == "maximum" and not bounds:
        return False  # x.max(0) reduces over an axis
    return all(b.dtype == x.dtype and torch.broadcast_shapes(b.shape, x.shape) == x.shape for b in bounds)


# What the code of a module may call.

_MAY_BE = frozenset(
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
    if any(isinstance(item, nn.Module) or getattr(item, "__name__", "") in _MAY_BE for item in held):
        return not type(module).__module__.startswith("torch.nn.")
    met: set[FunctionType] = set()
    return any(_calls_relu(function, met) for function in functions_of(type(module)))


def _calls_relu(function: FunctionType, met: set[FunctionType]) -> bool:
    """Tell whether a function, or one that it names, calls something that may be a ReLU."""
    if function in met:
        return False
    met.add(function)
    for code in codes_in(function.__code__):
        own = code.co_varnames[:1]
        before = None
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname in _READS and isinstance(name, str):
                is_own = instruction.opname in _ATTRIBUTES and before is not None and before.argval in own
                if name in _MAY_BE and not is_own:
                    return True
                named = function.__globals__.get(name) if instruction.opname == "LOAD_GLOBAL" else None
                is_users = isinstance(named, FunctionType) and not named.__module__.startswith("torch.")
                if is_users and _calls_relu(unwrapped(named), met):
                    return True
            before = instruction
    return False


_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_READS = (*_ATTRIBUTES, "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "IMPORT_FROM")
