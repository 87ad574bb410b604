"""What stands in for a ReLU: functions, and modules with everything carried over."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deadcheck.patch_plan import Kind, Replacement, Units
from deadcheck.unit_masks import UnitMask, prelu_slopes

Function = Callable[[Tensor, bool], Tensor]
"""Takes the input of a ReLU and whether to write the result into it."""


def stand_in(replacement: Replacement, *, ceiling: float | None = None, units: Units | None = None) -> Function:
    """Return the function that stands in for a ReLU, or for a ReLU with a ceiling, which stays."""
    plain = _with_ceiling(_FUNCTIONS[replacement.kind](replacement.alpha), ceiling)
    return plain if units is None else _for_some(plain, UnitMask(units), ceiling)


def _leaky(alpha: float | None) -> Function:
    assert alpha is not None
    slope = alpha
    return lambda x, inplace: F.leaky_relu(x, slope, inplace)


def _elu(alpha: float | None) -> Function:
    assert alpha is not None
    scale = alpha
    return lambda x, inplace: F.elu(x, scale, inplace)


def _gelu(alpha: float | None) -> Function:
    return lambda x, inplace: x.copy_(F.gelu(x.clone())) if inplace else F.gelu(x)


def _silu(alpha: float | None) -> Function:
    return lambda x, inplace: F.silu(x, inplace)


_FUNCTIONS: dict[Kind, Callable[[float | None], Function]] = {
    Kind.LEAKY: _leaky,
    Kind.ELU: _elu,
    Kind.GELU: _gelu,
    Kind.SILU: _silu,
}


def _with_ceiling(function: Function, ceiling: float | None) -> Function:
    if ceiling is None:
        return function
    top = ceiling

    def clipped(x: Tensor, inplace: bool) -> Tensor:
        # Over a copy: what the first step keeps for backward must not be written over by the second.
        return x.copy_(function(x.clone(), False).clamp_max(top)) if inplace else function(x, False).clamp_max(top)

    return clipped


def _for_some(function: Function, mask: UnitMask, ceiling: float | None) -> Function:
    def chosen(x: Tensor, inplace: bool) -> Tensor:
        # The copy keeps what backward needs when the result is written over the input.
        z = x.clone() if inplace else x
        rest = F.relu(z) if ceiling is None else F.hardtanh(z, 0.0, ceiling)
        y = torch.where(mask.on(z), function(z, False), rest)
        return x.copy_(y) if inplace else y

    return chosen


class StandIn(nn.Module):
    """Stands in for a ReLU, or for some of its units, where no module of ``torch.nn`` can."""

    def __init__(
        self,
        replacement: Replacement,
        *,
        units: Units | None = None,
        ceiling: float | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        # Plain values, so that a file which holds this module names no other class of ours.
        self.kind, self.alpha, self.ceiling, self.inplace = replacement.kind.value, replacement.alpha, ceiling, inplace
        self.units = None if units is None else (units.count, units.ranges, units.layout, units.rank)
        self._function: Function | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Replace the chosen units, keep a ReLU for the others."""
        if self._function is None:
            self._function = stand_in(self._replacement, ceiling=self.ceiling, units=self._units)
        return self._function(x, self.inplace)

    @property
    def _replacement(self) -> Replacement:
        return Replacement(Kind(self.kind), self.alpha)

    @property
    def _units(self) -> Units | None:
        return None if self.units is None else Units(*self.units)

    def __getstate__(self) -> dict[str, object]:
        # The function is made again from what it stands for: a closure cannot be pickled.
        return {**self.__dict__, "_function": None}

    def extra_repr(self) -> str:
        """Say what is replaced."""
        units = self._units
        which = "" if units is None else f", {units.replaced} of {units.count} units"
        ceiling = "" if self.ceiling is None else f", at most {self.ceiling:g}"
        return f"{self._replacement}{which}{ceiling}{', inplace=True' if self.inplace else ''}"


# Modules.

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
