"""The torch-free records that flow between the stages."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from enum import Enum, unique
from typing import Any, cast

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


SUMS = ("output_sum", "output_abs_sum", "output_square_sum", "silent_input_sum", "silent_input_square_sum")
"""Statistics that are sums of numbers and not counts."""


@unique
class Family(str, Enum):
    """How an activation behaves on the side where it lets nothing through; verdicts depend on it."""

    RECTIFIER = "rectifier"
    """0 for input <= 0, the input above: relu, clamp(min=0), threshold(0, 0), leaky_relu with slope 0."""

    CLIPPED = "clipped"
    """A rectifier with a ceiling: relu6, hardtanh(0, c), clamp(0, c)."""

    LEAKY = "leaky"
    """Lets something through on the negative side: leaky_relu, prelu, rrelu, elu, selu, celu."""

    SMOOTH = "smooth"
    """Fades to 0 on the negative side: gelu, silu, mish, softplus, hardswish."""

    GATED = "gated"
    """Passes one half of its input as the other half, the gate, allows: glu."""

    SQUASHING = "squashing"
    """Flat on two rails: sigmoid, tanh, hardsigmoid, hardtanh."""

    NONZERO = "nonzero"
    """Judged by its output alone: LSTM and GRU outputs, hardshrink, softshrink."""


UNKNOWN = -1
"""Count of what was not counted; numbers that were not measured are NaN."""


@dataclass(frozen=True)
class Site:
    """One use of an activation in the model."""

    key: str
    """Stable name, unique in the model: ``features.4``, ``layer1.0.relu#2``, ``encoder.0:gelu#1``."""

    module: str
    """Canonical path of the module in which the activation ran; empty for the model itself."""

    activation: str
    """Name of the activation: ``relu``, ``gelu``, …"""

    family: Family
    """What counts as on, off or saturated."""

    fed_by: tuple[str, ...]
    """Parametrised modules (or operators) whose output reaches it with no other activation between."""

    axis: int
    """Axis of the activation's output that holds the units (the first one where several do)."""

    axis_from: str
    """What told the axis: ``conv2d``, ``linear``, …, ``user``, or ``guess``."""

    units: int
    """Number of units."""

    aliases: tuple[str, ...] = ()
    """Other paths under which the same module is registered."""

    samples_from: str = "batch"
    """``batch`` when samples could be told apart, ``call`` when each forward pass counts as one sample."""


@dataclass(frozen=True, eq=False)
class SiteStats:
    """What was counted at one site; every array has one entry per unit.

    ``z`` is the activation's input and ``h`` its output. Counts are exact integers, or ``UNKNOWN`` where less than
    everything was measured. ``a + b`` merges two scans of disjoint samples of the same model.
    """

    site: Site
    samples: int
    """Samples that reached the site."""

    observations: int
    """Elements of the output per unit."""

    zeros: IntArray
    """Observations with ``h == 0``."""

    positive: IntArray
    """Observations with ``z > 0``."""

    flat: IntArray
    """Observations where the slope is below 1e-3 (see ``activations``); for a rectifier, ``z <= 0``."""

    fired: IntArray
    """Samples in which the unit was on at least once (rectifiers: ``h > 0``)."""

    first_fired: IntArray
    """Index in the data of the first such sample, the witness; -1 for none."""

    nonfinite: IntArray
    """Observations where ``z`` or ``h`` is NaN or infinite."""

    input_min: FloatArray
    input_max: FloatArray
    output_min: FloatArray
    output_max: FloatArray
    output_sum: FloatArray
    output_abs_sum: FloatArray
    output_square_sum: FloatArray
    silent_input_sum: FloatArray
    """Sum of ``z`` for units that never fired; NaN for the others."""

    silent_input_square_sum: FloatArray
    """Sum of ``z**2`` for units that never fired; NaN for the others."""

    rest: FloatArray = field(default_factory=lambda: np.zeros((len(SUMS), 1)))
    """What rounding dropped from each of the sums, in the order of ``SUMS``; shape (sums, units)."""

    def __add__(self, other: SiteStats) -> SiteStats:
        """Merge the statistics of two disjoint sets of samples."""
        if self.site != other.site:
            raise ValueError(f"cannot merge {self.site.key} with {other.site.key}")
        sums, rest = _summed(self, other)
        return replace(
            self,
            samples=self.samples + other.samples,
            observations=self.observations + other.observations,
            first_fired=_first(self.first_fired, other.first_fired),
            **{name: np.minimum(getattr(self, name), getattr(other, name)) for name in ("input_min", "output_min")},
            **{name: np.maximum(getattr(self, name), getattr(other, name)) for name in ("input_max", "output_max")},
            **cast(dict[str, Any], {name: _count(getattr(self, name), getattr(other, name)) for name in _COUNTED}),
            **dict(zip(SUMS, sums, strict=True)),
            rest=rest,
        )

    def equals(self, other: SiteStats) -> bool:
        """Tell whether everything was counted the very same, to the last bit."""
        arrays = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else bool(a == b) for a, b in arrays)

    def without_sums(self) -> SiteStats:
        """Return what ``counts`` measures: no sums but those of units that never fired."""
        dropped = [name for name in SUMS if name.startswith("output")]
        rest = self.rest.copy()
        rest[[SUMS.index(name) for name in dropped]] = 0.0
        return replace(
            self, rest=rest, **cast(dict[str, Any], dict.fromkeys(dropped, np.full(self.site.units, math.nan)))
        )

    def without_settled(self) -> SiteStats:
        """Return what ``verdict`` measures: of units whose verdict can only be live, no more than their witness.

        Which units these are does not depend on where the samples were divided among batches or processes, and the
        numbers of the others are exact.
        """
        where = settled(
            self.site.family, self.fired, self.flat, self.observations, self.input_min, self.input_max
        ) | (self.fired == UNKNOWN)  # fmt: skip
        counts = {name: np.where(where, UNKNOWN, getattr(self, name)) for name in _COUNTED if name != "nonfinite"}
        names = ("input_min", "input_max", "output_min", "output_max", *SUMS)
        numbers = {name: np.where(where, math.nan, getattr(self, name)) for name in names}
        return replace(self, **cast(dict[str, Any], {**counts, **numbers}))

    @property
    def zero_rate(self) -> FloatArray:
        """APoZ of each unit: zeros / observations (Hu et al. 2016, arXiv 1607.03250); NaN where not counted."""
        return _rate(self.zeros, self.observations)

    @property
    def firing_rate(self) -> FloatArray:
        """Share of samples in which each unit was on at least once; NaN where not counted."""
        return _rate(self.fired, self.samples)

    @property
    def mean_abs(self) -> FloatArray:
        """Mean of ``|h|`` per unit."""
        return self.output_abs_sum / max(self.observations, 1)

    @property
    def margin(self) -> FloatArray:
        """``max z / sd z`` of units that never fired (never above 0 for a rectifier); NaN for the others."""
        n = max(self.observations, 1)
        mean = self.silent_input_sum / n
        variance = np.maximum(self.silent_input_square_sum / n - mean**2, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.input_max / np.sqrt(variance)


_COUNTED = ("zeros", "positive", "flat", "fired", "nonfinite")


def settled(family: Family, fired: Any, flat: Any, observations: int, input_min: Any, input_max: Any) -> Any:
    """Tell which units no further sample can give a verdict but live, rare or faint; arrays or tensors, per unit."""
    done = fired > 0
    if family in (Family.LEAKY, Family.SMOOTH):
        done = done & (input_max > 0)
    if family in (Family.CLIPPED, Family.SQUASHING):
        done = done & (flat < observations)
    if family in (Family.RECTIFIER, Family.CLIPPED, Family.LEAKY):
        done = done & ((input_min <= 0) | (flat > 0))
    return done


def _rate(counts: IntArray, of: int) -> FloatArray:
    return np.where(counts == UNKNOWN, math.nan, counts / max(of, 1))


def _count(a: IntArray, b: IntArray) -> IntArray:
    """Add counts, some of which may not be known."""
    return np.where((a == UNKNOWN) | (b == UNKNOWN), UNKNOWN, a + b)


def _summed(a: SiteStats, b: SiteStats) -> tuple[FloatArray, FloatArray]:
    """Return the sums of two scans and what rounding drops from them (two-sum, Knuth TAOCP 2, 4.2.2)."""
    x, y = (np.stack([getattr(stats, name) for name in SUMS]) for stats in (a, b))
    with np.errstate(invalid="ignore"):
        total = x + y
        back = total - x
        rest = np.nan_to_num(a.rest + b.rest + ((x - (total - back)) + (y - back)), nan=0.0)
        rounded = total + rest
        return rounded, np.nan_to_num(rest - (rounded - total), nan=0.0)


def _first(a: IntArray, b: IntArray) -> IntArray:
    """Return the smaller index of two where both are known, else the known one."""
    return np.where(a < 0, b, np.where(b < 0, a, np.minimum(a, b)))


NEVER_RAN = "never ran on this sample"
"""Why a module was not measured of which nothing ran."""


@dataclass(frozen=True)
class Skipped:
    """Something that was not measured or not changed, with the reason."""

    what: str
    """The operator, module or file."""

    where: str
    """Module path, file or site."""

    reason: str
    """Why, in words for the user."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was measured, and how its file was read."""

    path: str | None
    sha256: str | None
    bytes: int | None
    format: str
    """``torch-module``, ``state-dict``, ``safetensors``, … or ``object`` for a live module."""

    read: str
    """``rebuilt``, ``arch``, ``allowed-class``, ``audited``, ``trusted`` or ``object``."""

    arch: str | None = None
    prefix_stripped: str | None = None


@dataclass(frozen=True)
class DataIdentity:
    """Which data the model was run on."""

    source: str
    sha256: str | None
    samples: int
    """Samples that were run."""

    synthetic: bool = False


@dataclass(frozen=True)
class Environment:
    """What the counts were measured with."""

    torch: str
    device: str
    dtype: str
    mode: str = "eval"
    seed: int = 0
    world_size: int = 1
    stats: str = "full"
    """How much was measured; one of ``settings.STATS``."""


@dataclass(frozen=True)
class InputSummary:
    """Range, mean and spread of one input tensor over the scan: wrong preprocessing looks like death."""

    name: str
    shape: tuple[int, ...]
    """Shape of one sample."""

    dtype: str
    min: float
    max: float
    mean: float
    sd: float
    features: int
    """Elements of one sample."""

    constant_features: int
    """Elements that had one value in every sample."""


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock while the batches of one process ran."""

    data: float = 0.0
    """Waiting for batches, looking at what is in them, and moving them to the device."""

    forward: float = 0.0
    """All the rest: the forward passes and the counting in them."""

    counting: float | None = None
    """What went into counting and following tensors, a ReLU included that is run and counted in one pass.

    The seconds of all threads: with two batches side by side it may be more than ``forward``. None on a GPU, which
    counts on its own time.
    """


@dataclass(frozen=True)
class Measurement:
    """Everything one scan saw."""

    model: ModelIdentity
    data: DataIdentity
    env: Environment
    sites: tuple[SiteStats, ...]
    """In the order in which they first ran."""

    skipped: tuple[Skipped, ...] = ()
    inputs: tuple[InputSummary, ...] = ()
    warnings: tuple[str, ...] = ()
    """Guesses and oddities, one sentence each."""

    output_constant: bool | None = None
    """Whether the model gave the same output for every sample; None when it could not be told."""

    seconds: float = field(default=0.0, compare=False)
    spent: Spent = field(default=Spent(), compare=False)
    started: str = field(default="", compare=False)
