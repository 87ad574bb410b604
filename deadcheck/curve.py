"""The curve of an activation and the inputs that a model gives it; records for a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deadcheck.patch_plan import Kind, Replacement

LOW, HIGH = -5.0, 2.0
BINS = 140


@dataclass(frozen=True)
class Curve:
    """What stands in for a ReLU, above the distribution of the inputs it would meet."""

    model: str
    replacement: Replacement
    sites: int
    """Sites whose inputs were counted."""

    samples: int
    counts: tuple[int, ...]
    """Inputs in each of ``BINS`` equal parts of [LOW, HIGH)."""

    below: int
    """Inputs below LOW."""

    above: int
    """Inputs at HIGH or above."""

    negative: int
    """Inputs below 0."""

    total: int

    @property
    def lowest(self) -> float:
        """Where a picture of the outputs ends below."""
        return min(-0.5, self.value(LOW))

    def value(self, x: float) -> float:
        """Return the output of what stands in."""
        return value_of(self.replacement, x)


def value_of(replacement: Replacement, x: float) -> float:
    """Return the output of a stand-in at one input, by its formula (torch ``nn/modules/activation.py``)."""
    if replacement.kind is Kind.GELU:
        return x * (1 + math.erf(x / math.sqrt(2))) / 2
    if replacement.kind is Kind.SILU:
        return x / (1 + math.exp(-x))
    assert replacement.alpha is not None
    if x > 0:
        return x
    return replacement.alpha * (math.expm1(x) if replacement.kind is Kind.ELU else x)
