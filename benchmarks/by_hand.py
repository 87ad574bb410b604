"""Counts activations with plain hooks and numpy, over whole arrays; knows nothing of deadcheck.

Hooks see what goes into activation modules; for an encoder layer, whose activation is a function, they see what its
first linear layer gives. With hooks on it torch runs such a layer operator by operator instead of fused, and a program
is not the module it was made of: their last bits may differ. So a count is a pair, the least and the most that it may
be where every input may be off by a tolerance; with a tolerance of 0 they are one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]

FUNCTIONS: dict[type[nn.Module], Function] = {nn.ReLU: F.relu, nn.ReLU6: F.relu6, nn.GELU: F.gelu}
"""Kinds of modules that are watched -> what they compute."""

COUNTS = ("zeros", "positive", "fired")
"""What is counted per unit, under the names that a scan has for it."""


def gelu_border() -> float:
    """Return the input below which GELU counts as off: its slope is there between -1e-3 and 0."""

    def slope(z: float) -> float:
        return 0.5 * (1 + math.erf(z / math.sqrt(2))) + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    low, high = -6.0, -2.0  # the slope falls from 0 to its least, at -1.4, and is -1e-3 once on the way
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > -1e-3 else (low, middle)
    return high


GELU_BORDER = gelu_border()


@dataclass(frozen=True)
class Counted:
    """What one activation did in all samples: least and most, shape (units,) each."""

    samples: int
    observations: int
    zeros: tuple[np.ndarray, np.ndarray]
    positive: tuple[np.ndarray, np.ndarray]
    fired: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Call:
    """One call of an activation: its input as (samples, positions, units), and what it computes."""

    z: Tensor
    function: Function


def arranged(z: Tensor) -> Tensor:
    """Return the values as (samples, positions, units): channels are axis 1 of an image, else the last axis."""
    z = z.detach().clone()  # the activation may write over it
    z = z.movedim(1, -1) if z.dim() == 4 else z
    return z.reshape(z.shape[0], -1, z.shape[-1])


@contextmanager
def watched(model: nn.Module, see: Callable[[Call], None]) -> Iterator[None]:
    """Hand every call of an activation to ``see``, in the order of running."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        see(Call(arranged(args[0]), FUNCTIONS[type(module)]))

    def after(function: Function) -> Callable[[nn.Module, object, Tensor], None]:
        def seen(module: nn.Module, args: object, output: Tensor) -> None:
            see(Call(arranged(output), function))

        return seen

    handles = []
    for module in model.modules():
        if type(module) in FUNCTIONS:
            handles.append(module.register_forward_pre_hook(before))
        elif isinstance(module, nn.TransformerEncoderLayer):
            handles.append(module.linear1.register_forward_hook(after(module.activation)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_on(z: np.ndarray, h: np.ndarray, function: Function) -> np.ndarray:
    """Tell where an activation is on: GELU above its border, the others above 0."""
    on: np.ndarray = z > GELU_BORDER if function is F.gelu else h > 0
    return on


def counted(calls: list[Call], tolerance: float) -> Counted:
    """Count one activation over its calls, a call being a batch."""
    function = calls[0].function
    z = torch.cat([call.z for call in calls])
    found: dict[str, list[np.ndarray]] = {name: [] for name in COUNTS}
    for shift in (-tolerance, tolerance):
        moved = z + shift
        inputs, outputs = moved.numpy(), function(moved).numpy()
        found["zeros"].append((outputs == 0).sum((0, 1)))
        found["positive"].append((inputs > 0).sum((0, 1)))
        found["fired"].append(is_on(inputs, outputs, function).any(1).sum(0))
    zeros, positive, fired = found.values()
    # All of these functions grow where they are near a border, so a larger input has fewer zeros.
    return Counted(
        len(z), z.shape[0] * z.shape[1], (zeros[1], zeros[0]), (positive[0], positive[1]), (fired[0], fired[1])
    )


@torch.no_grad()
def count(model: nn.Module, data: Tensor, size: int, tolerance: float) -> list[Counted]:
    """Run the data in batches of ``size``, and count every activation, in the order of running."""
    batches: list[list[Call]] = []
    for batch in data.split(size):
        batches.append([])
        with watched(model, batches[-1].append):
            model(batch)
    return [counted(list(calls), tolerance) for calls in zip(*batches, strict=True)]
