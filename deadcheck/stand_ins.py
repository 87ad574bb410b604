"""Modules that are a ReLU, and the modules that stand in for them with everything carried over."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deadcheck.plan import Kind, Replacement, Units
from deadcheck.unit_slope import StandIn, prelu_slopes

_OWN = frozenset(vars(nn.Module()))


def ceiling_of(module: nn.Module) -> float | None:
    """Return the ceiling of a module that is a ReLU (infinity for none); None for what is no ReLU."""
    find = _RELUS.get(type(module))
    return find(module) if find is not None else None


def _bounded(module: nn.Module) -> float | None:
    assert isinstance(module, nn.Hardtanh)
    return float(module.max_val) if module.min_val == 0 else None


def _if(is_relu: Callable[[nn.Module], bool]) -> Callable[[nn.Module], float | None]:
    return lambda module: math.inf if is_relu(module) else None


_RELUS: dict[type[nn.Module], Callable[[nn.Module], float | None]] = {
    nn.ReLU: _if(lambda m: True),
    nn.Threshold: _if(lambda m: bool(m.threshold == 0 and m.value == 0)),
    nn.LeakyReLU: _if(lambda m: bool(m.negative_slope == 0)),
    nn.RReLU: _if(lambda m: bool(m.lower == 0 and m.upper == 0)),
    nn.ReLU6: _bounded,
    nn.Hardtanh: _bounded,
}

KEEPS_FUNCTION: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers of torch that keep their activation as an attribute, which may be a function."""


def keeps_relu(module: nn.Module) -> bool:
    """Tell whether a layer of torch keeps ``relu`` itself as its activation."""
    return type(module) in KEEPS_FUNCTION and vars(module).get("activation") in (F.relu, F.relu_)


class CannotStandInError(Exception):
    """No module does what was asked; the text says why."""


def module_for(
    old: nn.Module, replacement: Replacement, units: Units | None, *, like: Tensor | None, keeps_inplace: bool
) -> nn.Module:
    """Make the module that stands in for ``old``, with its hooks, training flag and own attributes.

    ``like`` gives device and type to the slopes. Modules of torch are used wherever one does it, so that a saved model
    loads without deadcheck; the slopes of single units are a buffer that no state dict shows, and do not learn.
    ``keeps_inplace`` says that writing the result over the input matters, since the input is used again.
    """
    if keeps_inplace and replacement.kind is Kind.PRELU:
        reason = "it writes over its input, which may be used again, and nn.PReLU cannot; make it inplace=False first"
        raise CannotStandInError(reason)
    held = ceiling_of(old)
    ceiling = None if held == math.inf else held
    writes = bool(getattr(old, "inplace", False))
    new = _of_torch(replacement, units, ceiling, writes=writes)
    over = keeps_inplace and (units is not None or ceiling is not None or replacement.kind is Kind.GELU)
    if new is None or over:
        new = StandIn(replacement, units=units, ceiling=ceiling, inplace=keeps_inplace)
    new.to(*((like.device, like.dtype) if like is not None else (torch.get_default_dtype(),)))
    _carry(old, new)
    return new


def _of_torch(
    replacement: Replacement, units: Units | None, ceiling: float | None, *, writes: bool
) -> nn.Module | None:
    """Make it of modules of torch; None where they cannot do it."""
    plain = units is None and ceiling is None
    new = _all(replacement, inplace=writes and plain) if units is None else _some(replacement, units)
    if new is None or ceiling is None:
        return new
    return nn.Sequential(new, nn.Hardtanh(-math.inf, ceiling, writes))


def _all(replacement: Replacement, *, inplace: bool) -> nn.Module:
    alpha = replacement.alpha
    if replacement.kind is Kind.GELU:
        return nn.GELU()
    if replacement.kind is Kind.SILU:
        return nn.SiLU(inplace)
    assert alpha is not None
    if replacement.kind is Kind.ELU:
        return nn.ELU(alpha, inplace)
    return nn.LeakyReLU(alpha, inplace) if replacement.kind is Kind.LEAKY else nn.PReLU(init=alpha)


def _some(replacement: Replacement, units: Units) -> nn.Module | None:
    alpha = replacement.alpha
    slopes = None if alpha is None else prelu_slopes(units, alpha)
    if replacement.kind is Kind.PRELU and slopes is None:
        raise CannotStandInError("nn.PReLU learns slopes of channels on axis 1, and the units are elsewhere")
    if slopes is None or replacement.kind not in (Kind.LEAKY, Kind.PRELU):
        return None
    new = nn.PReLU(units.count)
    if replacement.kind is Kind.PRELU:
        new.weight.data.copy_(slopes)
        return new
    del new.weight
    new.register_buffer("weight", slopes, persistent=False)
    return new


def _carry(old: nn.Module, new: nn.Module) -> None:
    """Give the new module the old one's hooks, training flag and whatever was set on it."""
    for name, value in vars(old).items():
        is_state = name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        if not is_state and (name in _OWN or name not in (*vars(new), *getattr(old, "__constants__", ()))):
            vars(new)[name] = value
    for module in new.modules():
        module.training = old.training
