"""Finds the largest slope whose drift stays within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from deadcheck.errors import PatchError

_FIRST = 1e-4
"""Small enough that drift is proportional to the slope."""

_SMALLEST = 1e-9
LARGEST = 0.99
_CLOSE = 0.98
"""A drift within this share of the tolerance ends the search."""

_MAX_STEPS = 40


class Found(NamedTuple):
    """The slope, and every trial as (slope, drift)."""

    alpha: float
    steps: tuple[tuple[float, float], ...]


def largest_alpha(drift_of: Callable[[float], float], tolerance: float) -> Found:
    """Return the largest slope below 1 with ``drift_of(slope) <= tolerance``, to about 2 %.

    Drift grows with the slope, in proportion at first: each trial is where the line through the last ones meets the
    tolerance, and a halving where that does not narrow the bracket. PatchError where no slope stays within it.
    """
    steps: list[tuple[float, float]] = []
    low, low_drift = 0.0, 0.0
    high, high_drift = math.inf, math.inf
    alpha = _FIRST
    while len(steps) < _MAX_STEPS and alpha > _SMALLEST:
        drift = drift_of(alpha)
        steps.append((alpha, drift))
        if drift <= tolerance:
            low, low_drift = alpha, drift
            if alpha >= LARGEST or drift >= _CLOSE * tolerance or high - low < 0.01 * low:
                break
        else:
            high, high_drift = alpha, drift
        alpha = _rounded_down(_next(low, low_drift, high, high_drift, tolerance))
        if alpha <= low:
            break
    if low == 0.0:
        raise PatchError(
            f"no slope keeps the outputs within {tolerance:.3g} of what they are (at {steps[-1][0]:.1g} they move by "
            f"{steps[-1][1]:.2g}); allow more with --tolerance, or change dead units alone with --only-dead"
        )
    return Found(low, tuple(steps))


def _rounded_down(alpha: float) -> float:
    """Keep three digits, for people to read, without going up."""
    unit = 10.0 ** (math.floor(math.log10(alpha)) - 2)
    return float(f"{math.floor(alpha / unit) * unit:.3g}")


def _next(low: float, low_drift: float, high: float, high_drift: float, tolerance: float) -> float:
    # Aimed a little inside the tolerance, so that a hit ends the search from below.
    aim = tolerance * (1 + _CLOSE) / 2
    if not math.isfinite(high):
        guess = low * aim / low_drift if low_drift > 0 else low * 100
        return min(max(guess, low * 1.01), LARGEST)
    if not math.isfinite(high_drift):
        return (low + high) / 2 if low else high / 2
    guess = low + (high - low) * (aim - low_drift) / (high_drift - low_drift)
    margin = (high - low) / 20
    return min(max(guess, low + margin), high - margin)
