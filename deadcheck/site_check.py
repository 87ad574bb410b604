"""Checks numerically that what stands at a site computes what was asked: values and slopes, at and around 0."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from deadcheck.patch_plan import Kind, Replacement, SiteChange, Units
from deadcheck.patch_result import Response
from deadcheck.unit_masks import UnitMask

_POINTS = (-8.0, -1.5, -1.0, -0.25, -1e-3, 0.0, 1e-3, 0.25, 1.0, 1.5, 8.0)
"""Powers of two and others; none beyond 8, where smooth functions have left their bend."""

Function = Callable[[Tensor], Tensor]


def fault_of(
    function: Function, change: SiteChange, replacement: Replacement, *, ceiling: float = math.inf, like: Tensor
) -> str | None:
    """Return where a stand-in differs from what it should be; None where it is right at every unit.

    ``like`` gives device and type. Leaky ones must be right to rounding, smooth ones to 1e-5 (1e-2 in half precision).
    """
    units = change.units
    shape, chosen = _shape(units)
    x = torch.tensor(_POINTS, dtype=like.dtype, device=like.device).view(-1, *[1] * len(shape))
    x = x.expand(-1, *shape).clone().requires_grad_()
    with torch.enable_grad():
        y = function(x * 1)  # a product, since a leaf that learns cannot be written over
        (slope,) = torch.autograd.grad(y.sum(), x)
    if y.shape != x.shape:
        return f"it turned shape {tuple(x.shape)} into {tuple(y.shape)}"
    tolerance = _tolerance(replacement.kind, like.dtype)
    for i, point in enumerate(x.detach().flatten(1)[:, 0].tolist()):
        for is_chosen in (True, False):
            where = chosen if is_chosen else ~chosen
            if not bool(where.any()):
                continue
            value, wanted = _expected(replacement, point, ceiling) if is_chosen else _relu(point, ceiling)
            for got, name, right in ((y[i], "value", value), (slope[i], "slope", wanted)):
                worst = _worst(got.detach()[where], right, tolerance, like)
                if worst is not None:
                    return f"its {name} at {point:g} is {worst:g} and should be {right:g}"
    return None


def responses(function: Function, like: Tensor) -> tuple[Response, ...]:
    """Return what an activation gives at -1, 0 and 1, and its slopes there."""
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=like.dtype, device=like.device, requires_grad=True)
    with torch.enable_grad():
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    rows = zip(x.tolist(), y.tolist(), slope.tolist(), strict=True)
    return tuple(Response(point, output, rise) for point, output, rise in rows)


def _worst(got: Tensor, right: float, tolerance: float, like: Tensor) -> float | None:
    wanted = torch.tensor(right, dtype=like.dtype, device=like.device)
    wrong = ~torch.isclose(got, wanted, rtol=tolerance, atol=tolerance)
    return float(got[wrong][0]) if bool(wrong.any()) else None


def _shape(units: Units | None) -> tuple[list[int], Tensor]:
    """Return the shape that holds every unit, and which entries are changed."""
    if units is None:
        return [1], torch.ones(1, dtype=torch.bool)
    sizes = [
        math.prod(int(size) for size in re.findall(r"[up](\d+)", axis)) if axis != "." else 1
        for axis in units.layout.split(" ")
    ]
    sizes = [1] * max(units.rank - 1 - len(sizes), 0) + sizes
    return sizes, UnitMask(units).on(torch.zeros(1, *sizes)).expand(1, *sizes)[0]


def _tolerance(kind: Kind, dtype: torch.dtype) -> float:
    if kind in (Kind.LEAKY, Kind.PRELU):
        return 2 * torch.finfo(dtype).eps  # alpha and the product are rounded to the type at hand
    return 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2


def _relu(x: float, ceiling: float) -> tuple[float, float]:
    return min(max(x, 0.0), ceiling), 1.0 if 0 < x < ceiling else 0.0


def _expected(replacement: Replacement, x: float, ceiling: float) -> tuple[float, float]:
    """Return the value and the slope of a stand-in, from its formula."""
    if x >= ceiling:
        return ceiling, 0.0
    alpha = replacement.alpha
    if replacement.kind is Kind.GELU:
        cumulated = (1 + math.erf(x / math.sqrt(2))) / 2
        return x * cumulated, cumulated + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    if replacement.kind is Kind.SILU:
        gate = 1 / (1 + math.exp(-x))
        return x * gate, gate * (1 + x * (1 - gate))
    assert alpha is not None
    if x > 0:
        return x, 1.0
    if replacement.kind is Kind.ELU:
        return alpha * math.expm1(x), alpha * math.exp(x)
    return alpha * x, alpha
