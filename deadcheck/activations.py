"""The table of activations: which operator is one, what it does on each side, and which modules wrap it.

An operator's entry looks at the arguments of one call, since the same operator can be an activation or not:
``clamp(min=0)`` is a ReLU and ``clamp(max=20)`` is none. Slopes count as flat below ``EPSILON``; the borders for
smooth activations are where both the value and the slope are below it, so that the minimum of GELU (slope 0 at
-0.75) is not taken for death. Formulas: torch ``nn/modules/activation.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.ao.nn.quantized import dynamic

from deadcheck.sites import Family

EPSILON = 1e-3
"""A slope below this counts as none."""

_LOG = math.log(EPSILON)
_RAIL_SIGMOID = 6.9067548  # |z| where sigmoid' = 1e-3
_RAIL_TANH = 4.1465058  # |z| where tanh' = 1e-3
_OFF_GELU = -3.8103687
_OFF_GELU_TANH = -3.7373437
_OFF_SILU = -9.1178813
_OFF_MISH = -9.1179438
_OFF_SOFTPLUS = -6.9072505
_INF = math.inf


@dataclass(frozen=True)
class Activation:
    """What one call of an activation operator does."""

    name: str
    """The field's name for it: ``relu``, ``relu6``, ``gelu``, …"""

    family: Family

    on: float = 0.0
    """The unit is on where the input is above this (SQUASHING: where it is between ``low`` and ``high``)."""

    low: float = -_INF
    """The slope is below ``EPSILON`` for inputs at or below this."""

    high: float = _INF
    """The slope is below ``EPSILON`` for inputs at or above this."""

    @property
    def is_positive(self) -> bool:
        """Whether no output is below 0."""
        return (self.family in _RECTIFIES and self.low == 0) or self.name in ("sigmoid", "hardsigmoid", "softplus")


_RECTIFIES = (Family.RECTIFIER, Family.CLIPPED)

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Resolve = Callable[[Args, Kwargs], "Activation | None"]


def _argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _rectifier(name: str) -> Activation:
    return Activation(name, Family.RECTIFIER, on=0.0, low=0.0)


def _always(activation: Activation) -> Resolve:
    return lambda args, kwargs: activation


def is_zero(bound: Any) -> bool:
    """Tell whether a bound is 0, given as a number or as a constant tensor."""
    if isinstance(bound, torch.Tensor):
        return bound.numel() > 0 and not bool(torch.count_nonzero(bound))
    return bound is not None and bound == 0


def _bounded(name: str, low: Any, high: Any) -> Activation | None:
    """Describe a clamp: only one that cuts at 0 from below is an activation."""
    if not is_zero(low):
        return None
    if high is None:
        return _rectifier(name)
    if isinstance(high, torch.Tensor):
        return None
    if high == _INF:
        return _rectifier(name)
    return Activation("relu6" if high == 6 else name, Family.CLIPPED, low=0.0, high=float(high)) if high > 0 else None


def _clamp(args: Args, kwargs: Kwargs) -> Activation | None:
    return _bounded("clamp", _argument(args, kwargs, 1, "min"), _argument(args, kwargs, 2, "max"))


def _clamp_min(args: Args, kwargs: Kwargs) -> Activation | None:
    return _bounded("clamp", _argument(args, kwargs, 1, "min"), None)


def _hardtanh(args: Args, kwargs: Kwargs) -> Activation | None:
    low, high = _argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0)
    if low == 0:
        return _bounded("hardtanh", low, high)
    return Activation("hardtanh", Family.SQUASHING, low=float(low), high=float(high))


def _leaky_relu(args: Args, kwargs: Kwargs) -> Activation | None:
    slope = _argument(args, kwargs, 1, "negative_slope", 0.01)
    return _leaky("leaky_relu", slope == 0)


def _leaky(name: str, is_rectifier: bool) -> Activation:
    return _rectifier(name) if is_rectifier else Activation(name, Family.LEAKY)


def _rrelu(args: Args, kwargs: Kwargs) -> Activation | None:
    lower, upper = _argument(args, kwargs, 2, "lower", 0.125), _argument(args, kwargs, 3, "upper", 1 / 3)
    return _leaky("rrelu", lower == 0 and upper == 0)


def _prelu(args: Args, kwargs: Kwargs) -> Activation | None:
    return _leaky("prelu", is_zero(_argument(args, kwargs, 1, "weight")))


def _elu(args: Args, kwargs: Kwargs) -> Activation | None:
    alpha, scale = _argument(args, kwargs, 1, "alpha", 1), _argument(args, kwargs, 2, "scale", 1)
    name = "elu" if scale == 1 else "selu"
    plateau = abs(alpha * scale)
    if plateau == 0:
        return _rectifier(name)
    return Activation(name, Family.LEAKY, low=_LOG - math.log(plateau))


def _celu(args: Args, kwargs: Kwargs) -> Activation | None:
    alpha = _argument(args, kwargs, 1, "alpha", 1.0)
    return Activation("celu", Family.LEAKY, low=alpha * _LOG if alpha > 0 else -_INF)


def _gelu(args: Args, kwargs: Kwargs) -> Activation | None:
    off = _OFF_GELU_TANH if kwargs.get("approximate", "none") == "tanh" else _OFF_GELU
    return Activation("gelu", Family.SMOOTH, on=off, low=off)


def _softplus(args: Args, kwargs: Kwargs) -> Activation | None:
    off = _OFF_SOFTPLUS / float(_argument(args, kwargs, 1, "beta", 1))
    return Activation("softplus", Family.SMOOTH, on=off, low=off)


def _threshold(args: Args, kwargs: Kwargs) -> Activation | None:
    border, value = _argument(args, kwargs, 1, "threshold"), _argument(args, kwargs, 2, "value")
    if value != 0:
        return Activation("threshold", Family.LEAKY, on=float(border), low=float(border))
    return Activation("threshold", Family.RECTIFIER, on=float(border), low=float(border))


def _maximum(args: Args, kwargs: Kwargs) -> Activation | None:
    return _rectifier("maximum") if any(map(is_zero, args)) else None


def _smooth(name: str, off: float) -> Resolve:
    return _always(Activation(name, Family.SMOOTH, on=off, low=off))


def _squashing(name: str, rail: float) -> Resolve:
    return _always(Activation(name, Family.SQUASHING, low=-rail, high=rail))


_TABLE: tuple[tuple[tuple[str, ...], Resolve], ...] = (
    (("relu", "relu_"), _always(_rectifier("relu"))),
    (("clamp", "clamp_"), _clamp),
    (("clamp_min", "clamp_min_"), _clamp_min),
    (("maximum",), _maximum),
    (("threshold", "threshold_"), _threshold),
    (("hardtanh", "hardtanh_"), _hardtanh),
    (("leaky_relu", "leaky_relu_"), _leaky_relu),
    (("_prelu_kernel", "prelu"), _prelu),
    (("rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise_functional"), _rrelu),
    (("elu", "elu_"), _elu),
    (("celu", "celu_"), _celu),
    (("gelu", "gelu_"), _gelu),
    (("silu", "silu_"), _smooth("silu", _OFF_SILU)),
    (("mish", "mish_"), _smooth("mish", _OFF_MISH)),
    (("softplus",), _softplus),
    (("hardswish", "hardswish_"), _smooth("hardswish", -3.0)),
    (("glu",), _always(Activation("glu", Family.GATED, on=-_RAIL_SIGMOID, low=-_RAIL_SIGMOID))),
    (("sigmoid", "sigmoid_"), _squashing("sigmoid", _RAIL_SIGMOID)),
    (("tanh", "tanh_"), _squashing("tanh", _RAIL_TANH)),
    (("hardsigmoid", "hardsigmoid_"), _squashing("hardsigmoid", 3.0)),
    (("log_sigmoid_forward",), _always(Activation("logsigmoid", Family.SQUASHING, high=_RAIL_SIGMOID))),
    (("hardshrink",), _always(Activation("hardshrink", Family.NONZERO))),
    (("softshrink",), _always(Activation("softshrink", Family.NONZERO))),
)

NAMES = frozenset(name for names, _ in _TABLE for name in names)
"""Names of the operators that can be an activation."""

OPERATORS: dict[Any, Resolve] = {
    getattr(torch.ops.aten, name): resolve
    for names, resolve in _TABLE
    for name in names
    if hasattr(torch.ops.aten, name)
}
"""Operator (an ``OpOverloadPacket`` of aten) -> what a call of it with these arguments is, or None."""

BOUNDS = frozenset(("clamp", "clamp_", "clamp_min", "clamp_min_", "maximum"))
"""Operators that bound indices as often as they are activations."""

BENDS = (Family.SQUASHING, Family.CLIPPED, Family.SMOOTH)
"""Families whose output times their input is another activation, as x * sigmoid(x) is."""

MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Hardswish, nn.GLU, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid,
    nn.Threshold, nn.Hardshrink, nn.Softshrink,
)  # fmt: skip
"""Modules that are an activation themselves, so that their own path names the site."""

GATED: dict[type[nn.Module], str] = {
    nn.LSTM: "lstm", nn.GRU: "gru", nn.LSTMCell: "lstm", nn.GRUCell: "gru",
    dynamic.LSTM: "lstm", dynamic.GRU: "gru", dynamic.LSTMCell: "lstm", dynamic.GRUCell: "gru",
}  # fmt: skip
"""Recurrent modules whose inner sigmoid and tanh are gates; the site is the output, under this name."""


def recurrent(name: str) -> Activation:
    """Describe the output of a gated recurrent module, which is judged by its values alone."""
    return Activation(name, Family.NONZERO)
