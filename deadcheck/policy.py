"""What a gate allows: limits, levels, exceptions; exact shares, no measurement."""

from __future__ import annotations

import datetime
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from fractions import Fraction


@unique
class Level(str, Enum):
    """How much a finding weighs."""

    ERROR = "error"
    WARN = "warn"
    OFF = "off"


@unique
class Compare(str, Enum):
    """How a model is compared with its baseline."""

    UNITS = "units"
    """Unit by unit: the same lineage, a later checkpoint of the same training."""

    RATES = "rates"
    """Shares of layers alone: the same architecture, trained anew."""


@dataclass(frozen=True)
class LayerPolicy:
    """What holds for some layers only; None leaves the policy's own limit."""

    match: str
    """Pattern of site keys or module paths, as ``features.*``."""

    level: Level = Level.ERROR
    """The most that a finding in these layers may weigh."""

    max_layer_dead: Fraction | None = None
    max_new_dead: Fraction | None = None
    max_worse: Fraction | None = None


@dataclass(frozen=True)
class Ignore:
    """A finding that somebody has looked at and accepted."""

    rule: str
    """Code or name of the rule."""

    reason: str
    layer: str = "*"
    model: str = "*"
    """Pattern of model paths."""

    until: datetime.date | None = None
    """The last day on which it holds."""

    def fits(self, model: str, where: str) -> bool:
        """Tell whether it speaks of this layer of this model."""
        return fnmatch.fnmatchcase(model, self.model) and fnmatch.fnmatchcase(where, self.layer)

    def expired(self, today: datetime.date) -> bool:
        """Tell whether its last day has passed."""
        return self.until is not None and today > self.until


@dataclass(frozen=True)
class Policy:
    """Limits of one gate. A share at its limit is allowed; one above it is not. None is no limit."""

    max_layer_dead: Fraction | None = None
    """Share of a layer that may be dead. No default: healthy networks reach 58 %."""

    max_model_dead: Fraction | None = None
    """Share of all units that may be dead."""

    max_new_dead: Fraction | None = Fraction(5, 100)
    """Share of a layer that may have died since the baseline, unit by unit."""

    max_worse: Fraction | None = Fraction(5, 100)
    """Points by which the dead share of a layer may exceed the baseline's."""

    compare: Compare = Compare.UNITS
    min_samples: int | None = None
    """Samples below which nothing is judged; None for as many as it takes to call a unit dead."""

    rules: Mapping[str, Level] = field(default_factory=dict)
    """Level of a rule, by its code."""

    layers: tuple[LayerPolicy, ...] = ()
    """The first that matches a layer holds."""

    ignores: tuple[Ignore, ...] = ()
    warn_layer_dead: Fraction = Fraction(25, 100)
    """Share of a layer from which on a finding warns (``thresholds.warn_layer_dead``)."""

    explosion_growth: float = 1000.0
    """As ``thresholds.explosion_growth``."""

    def layer(self, key: str, module: str) -> LayerPolicy:
        """Return what holds for one layer."""
        for entry in self.layers:
            if fnmatch.fnmatchcase(key, entry.match) or fnmatch.fnmatchcase(module, entry.match):
                return entry
        return _ANY

    def limit(self, name: str, layer: LayerPolicy) -> Fraction | None:
        """Return the limit of this name for one layer."""
        own: Fraction | None = getattr(layer, name)
        general: Fraction | None = getattr(self, name)
        return general if own is None else own


_ANY = LayerPolicy("*")
