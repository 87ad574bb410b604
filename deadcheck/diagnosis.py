"""Turns what was counted into a verdict on every unit, with its evidence; pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, unique
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from deadcheck.confidence import firing_bound, never_fired_bound, settled_below
from deadcheck.config import Thresholds
from deadcheck.ranges import ranges_of
from deadcheck.shares import number_of, reaches, too_few
from deadcheck.sites import UNKNOWN, Family, InputSummary, IntArray, Measurement, SiteStats


@unique
class Verdict(str, Enum):
    """What a unit is; the first that fits, in this order."""

    INVALID = "invalid"
    """A value was NaN or infinite."""

    DEAD = "dead"
    """Never on, in enough samples to bound its firing rate below ``p_dead``."""

    SILENT = "silent"
    """Never on, in too few samples to call it dead."""

    NEGATIVE_ONLY = "negative_only"
    """An activation that leaks, whose input was never above 0."""

    RARE = "rare"
    """On in some samples, at a rate settled below ``p_rare``."""

    FAINT = "faint"
    """On, with a mean |h| at most ``tau`` of its layer's mean."""

    SATURATED = "saturated"
    """On a rail in every observation: no slope anywhere."""

    ALWAYS_ON = "always_on"
    """Input above 0 in every observation: the activation does nothing to it."""

    LIVE = "live"
    """None of these."""


VERDICTS = tuple(Verdict)
_CODE = {verdict: code for code, verdict in enumerate(VERDICTS)}
_UNTOLD = {"full": (), "counts": (Verdict.FAINT,), "verdict": (Verdict.RARE, Verdict.FAINT)}
"""Verdicts that a scan which measured less than everything does not give; such units pass for live."""

_FEWER = (
    "a unit that fired was not asked again (--stats verdict), so rare and faint units pass for live ones, NaN that "
    "came later was not looked for, and rates of zeros and explosions were not measured"
)
_LESS = {
    "counts": ("note", "means were not measured (--stats counts), so no unit is told to be faint or dormant"),
    "verdict": ("warning", _FEWER),
}
"""What has to be said of a scan that measured less than everything, and how loudly."""

_GOES_OFF = (Family.RECTIFIER, Family.CLIPPED, Family.SMOOTH, Family.GATED, Family.NONZERO)

DEPTHS = ("shallow", "mid", "deep")
"""How far below 0 a silent unit's input stays, in its own standard deviations: a heuristic, not a bound."""


@dataclass(frozen=True)
class Finding:
    """Something that a reader should know, in words."""

    id: str
    """Stable name of the kind: ``layer-dead``, ``invalid``, ``explosion``, …"""

    level: str
    """``error``, ``warning`` or ``note``."""

    where: str
    """Site key; empty for the whole model."""

    message: str


@dataclass(frozen=True)
class UnitVerdict:
    """The verdict on one unit and the evidence for it."""

    unit: int
    verdict: Verdict
    samples: int
    fired: int | None
    """Samples in which it was on; None where that was not counted, as ``zero_rate`` and ``upper_bound`` are NaN."""

    zero_rate: float
    upper_bound: float
    """Exact one-sided upper bound on its firing rate."""

    witness: int | None
    """Index of the first sample in which it was on."""

    depth: str | None
    """``shallow``, ``mid`` or ``deep`` for a unit that was never on."""

    samples_needed: int
    """Further samples without firing after which it would be called dead; 0 for all but silent units."""

    because: str


@dataclass(frozen=True, eq=False)
class SiteDiagnosis:
    """The verdicts on the units of one site."""

    stats: SiteStats
    codes: npt.NDArray[np.int8]
    """Index into ``VERDICTS`` per unit."""

    thresholds: Thresholds
    level: str = "full"
    """How much was measured; one of ``settings.STATS``."""

    @property
    def key(self) -> str:
        """The site's key."""
        return self.stats.site.key

    @property
    def units(self) -> int:
        """Number of units."""
        return self.stats.site.units

    @cached_property
    def counts(self) -> Mapping[Verdict, int]:
        """Units per verdict."""
        totals = np.bincount(self.codes, minlength=len(VERDICTS))
        return {verdict: int(totals[code]) for verdict, code in _CODE.items()}

    @property
    def untold(self) -> tuple[Verdict, ...]:
        """Verdicts that were not asked for; such units count as live."""
        return _UNTOLD[self.level]

    @property
    def dead_share(self) -> float:
        """Share of the units that are dead."""
        return self.counts[Verdict.DEAD] / max(self.units, 1)

    @property
    def zero_rate(self) -> float:
        """Share of all observations that are 0: the layer's APoZ; NaN where they were not counted."""
        return _share(self.stats.zeros, self.stats.observations)

    @property
    def upper_bound(self) -> float:
        """Upper bound on the firing rate of any one unit that never fired."""
        return never_fired_bound(self.stats.samples, self.thresholds.delta)

    @property
    def positive_share(self) -> float:
        """Share of the inputs above 0: one half where they are symmetric about it; NaN where not counted."""
        return _share(self.stats.positive, self.stats.observations)

    @property
    def mean_output(self) -> float:
        """Mean of the output over units and observations."""
        return float(self.stats.output_sum.sum()) / max(self.stats.observations * self.units, 1)

    @property
    def max_abs_output(self) -> float:
        """Largest |h|."""
        return float(np.maximum(np.abs(self.stats.output_min), np.abs(self.stats.output_max)).max(initial=0.0))

    @cached_property
    def scores(self) -> npt.NDArray[np.float64]:
        """Mean |h| of each unit over the layer's mean of it (Sokar et al. 2023)."""
        return self.stats.mean_abs / (_layer_mean(self.stats) + 1e-9)

    @property
    def dormant_shares(self) -> Mapping[float, float]:
        """Share of units whose score is at most tau, for each tau; empty where means were not measured."""
        if np.isnan(self.scores).any() and self.level != "full":
            return {}
        return {tau: float((self.scores <= tau).mean()) if self.units else 0.0 for tau in self.thresholds.taus}

    @cached_property
    def depths(self) -> Mapping[str, int]:
        """Number of silent and dead units by depth."""
        margin = self.stats.margin[np.isin(self.codes, (_CODE[Verdict.DEAD], _CODE[Verdict.SILENT]))]
        deep = int((margin <= self.thresholds.deep).sum())
        shallow = int((margin > self.thresholds.shallow).sum())
        # NaN where there is no spread to measure by: an input that was always 0, or one that was not seen.
        return {"shallow": shallow, "mid": int((~np.isnan(margin)).sum()) - deep - shallow, "deep": deep}

    def ranges(self, verdict: Verdict) -> list[tuple[int, int]]:
        """Return the units of a verdict as inclusive ranges."""
        return list(ranges_of(self.codes == _CODE[verdict]))

    def verdict(self, unit: int) -> Verdict:
        """Return the verdict on one unit."""
        return VERDICTS[int(self.codes[unit])]

    def unit(self, unit: int) -> UnitVerdict:
        """Return the verdict on one unit with its evidence; IndexError where there is no such unit."""
        unit = range(self.units)[unit]
        stats, verdict = self.stats, self.verdict(unit)
        count, first = int(stats.fired[unit]), int(stats.first_fired[unit])
        fired = None if count == UNKNOWN else count
        needed = max(self.thresholds.n_star - stats.samples, 0) if verdict is Verdict.SILENT else 0
        margin = float(stats.margin[unit])
        return UnitVerdict(
            unit=unit,
            verdict=verdict,
            samples=stats.samples,
            fired=fired,
            zero_rate=float(stats.zero_rate[unit]),
            upper_bound=math.nan if fired is None else firing_bound(fired, stats.samples, self.thresholds.delta),
            witness=first if first >= 0 else None,
            depth=_depth(margin, self.thresholds) if verdict in (Verdict.DEAD, Verdict.SILENT) else None,
            samples_needed=needed,
            because=_because(verdict, stats, unit, self.thresholds),
        )


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The verdicts on every unit of a model, and what follows from them."""

    measurement: Measurement
    thresholds: Thresholds
    sites: tuple[SiteDiagnosis, ...]
    findings: tuple[Finding, ...]

    def __iter__(self) -> Iterator[SiteDiagnosis]:
        """Iterate over the sites in the order in which they first ran."""
        return iter(self.sites)

    def site(self, key: str) -> SiteDiagnosis:
        """Return the site with this key; KeyError names those there are."""
        for site in self.sites:
            if site.key == key:
                return site
        raise KeyError(f"no site {key!r}; there are {', '.join(site.key for site in self.sites)}")

    @property
    def units(self) -> int:
        """Units of all sites."""
        return sum(site.units for site in self.sites)

    def count(self, verdict: Verdict) -> int:
        """Return the number of units with a verdict."""
        return sum(site.counts[verdict] for site in self.sites)

    @property
    def dead(self) -> int:
        """Dead units."""
        return self.count(Verdict.DEAD)

    @property
    def silent(self) -> int:
        """Units that never fired, in too few samples to say dead."""
        return self.count(Verdict.SILENT)

    @property
    def dead_share(self) -> float:
        """Share of all units that are dead."""
        return self.dead / max(self.units, 1)

    def worst(self) -> list[SiteDiagnosis]:
        """Return the sites, the one with the largest share of units that never fire first."""
        bad = (Verdict.INVALID, Verdict.DEAD, Verdict.SILENT, Verdict.NEGATIVE_ONLY, Verdict.SATURATED)
        return sorted(self.sites, key=lambda s: -sum(s.counts[v] for v in bad) / max(s.units, 1))

    def __repr__(self) -> str:
        data, model = self.measurement.data, self.measurement.model
        sites = number_of(len(self.sites), "site")
        lines = [
            f"Diagnosis of {model.path or 'a live module'} on {number_of(data.samples, 'sample')} of {data.source}",
            f"  {self.dead:,} dead and {self.silent:,} silent of {self.units:,} units in {sites}",
        ]
        for site in self.worst()[:5]:
            named = ", ".join(f"{count:,} {v.value}" for v, count in site.counts.items() if count)
            lines.append(f"  {site.key:<24} {site.stats.site.activation:<10} {site.units:>6,} units: {named}")
        if len(self.sites) > 5:
            lines.append(f"  … {len(self.sites) - 5} more in .sites")
        lines += [f"  {finding.level}: {finding.message}" for finding in self.findings[:3]]
        return "\n".join(lines)


def diagnose(measurement: Measurement, thresholds: Thresholds | None = None) -> Diagnosis:
    """Judge every unit of a measurement."""
    limits = thresholds or Thresholds()
    level = measurement.env.stats
    sites = tuple(SiteDiagnosis(stats, _codes(stats, limits), limits, level) for stats in measurement.sites)
    return Diagnosis(measurement, limits, sites, tuple(_findings(measurement, sites, limits)))


def _codes(stats: SiteStats, limits: Thresholds) -> npt.NDArray[np.int8]:
    """Return the code of the first verdict that fits each unit."""
    family, n = stats.site.family, stats.observations
    never = stats.fired == 0
    if family is Family.SQUASHING:
        off = np.zeros_like(never)
    elif family in _GOES_OFF:
        off = never
    else:
        off = never & (stats.zeros == n)
    enough = stats.samples >= limits.n_star
    faint = (stats.mean_abs <= limits.tau * (_layer_mean(stats) + 1e-9)) & ~never
    fired = np.where(stats.fired == UNKNOWN, stats.samples, stats.fired)  # too often to be rare, for all that is known
    rare = settled_below(fired, stats.samples, limits.p_rare, limits.delta) & ~never
    tests = {
        Verdict.INVALID: stats.nonfinite > 0,
        Verdict.DEAD: off & enough,
        Verdict.SILENT: off & (not enough),
        Verdict.NEGATIVE_ONLY: (stats.input_max <= 0) & (family in (Family.LEAKY, Family.SMOOTH)),
        Verdict.RARE: rare & (family in _GOES_OFF),
        Verdict.FAINT: faint & (family is not Family.SQUASHING),
        Verdict.SATURATED: (stats.flat == n) & (family in (Family.CLIPPED, Family.SQUASHING)),
        Verdict.ALWAYS_ON: (stats.input_min > 0)
        & (stats.flat == 0)
        & (family in (Family.RECTIFIER, Family.CLIPPED, Family.LEAKY)),
    }
    codes = np.full(len(never), _CODE[Verdict.LIVE], np.int8)
    for verdict, holds in reversed(tests.items()):
        codes[holds] = _CODE[verdict]
    return codes


def _layer_mean(stats: SiteStats) -> float:
    """Mean |h| over the units whose values were all finite: one infinity would make every other unit look faint."""
    mean = stats.mean_abs[stats.nonfinite == 0]
    return float(mean.mean()) if mean.size else 0.0


def _share(counts: IntArray, observations: int) -> float:
    """Return what part of the observations of all units was counted; NaN where that of some was not."""
    if (counts == UNKNOWN).any():
        return math.nan
    return int(counts.sum()) / max(observations * len(counts), 1)


def _depth(margin: float, limits: Thresholds) -> str | None:
    if not math.isfinite(margin):
        return "deep" if margin == -math.inf else None
    return "shallow" if margin > limits.shallow else "deep" if margin <= limits.deep else "mid"


def _because(verdict: Verdict, stats: SiteStats, unit: int, limits: Thresholds) -> str:
    n, fired = stats.samples, int(stats.fired[unit])
    samples, first = "samples", f"in sample {int(stats.first_fired[unit])}"
    if stats.site.samples_from == "call":
        samples, first = "batches", f"in the batch from sample {int(stats.first_fired[unit])} on"
    if fired == UNKNOWN and verdict is Verdict.LIVE:
        return f"on, first {first}"
    bound = firing_bound(max(fired, 0), n, limits.delta)
    sure = f"{1 - limits.delta:.0%}"
    match verdict:
        case Verdict.INVALID:
            return f"{int(stats.nonfinite[unit])} of {stats.observations} values were NaN or infinite"
        case Verdict.DEAD:
            return f"never on in {n} {samples}: its firing rate is below {bound:.2g} ({sure} sure)"
        case Verdict.SILENT:
            return f"never on in {n} {samples}; {limits.n_star - n} more without firing would make it dead"
        case Verdict.NEGATIVE_ONLY:
            return f"its input never rose above 0 (largest {stats.input_max[unit]:.3g}), so only the leak came through"
        case Verdict.RARE:
            return f"on in {fired} of {n} {samples}, first {first}"
        case Verdict.FAINT:
            return f"its mean |h| of {stats.mean_abs[unit]:.2g} is at most {limits.tau:.1%} of the layer's mean"
        case Verdict.SATURATED:
            return f"on a rail in all {stats.observations} observations (output {stats.output_max[unit]:.3g} at most)"
        case Verdict.ALWAYS_ON:
            return f"its input was never at or below 0 (smallest {stats.input_min[unit]:.3g})"
        case Verdict.LIVE:
            return f"on in {fired} of {n} {samples}"


def _findings(measurement: Measurement, sites: tuple[SiteDiagnosis, ...], limits: Thresholds) -> Iterator[Finding]:
    for site in sites:
        yield from _site_findings(site, limits)
    yield from _explosions(sites, limits)
    if measurement.output_constant:
        yield Finding(
            "output-constant", "error", "",
            f"the model gave the same output for all {measurement.data.samples:,} samples; check data and weights",
        )  # fmt: skip
    silent = sum(site.counts[Verdict.SILENT] for site in sites)
    if silent:
        # Sites on a branch may have seen fewer samples than the others.
        samples = min(site.stats.samples for site in sites if site.counts[Verdict.SILENT])
        yield Finding(
            "too-few-samples", "warning", "",
            f"{number_of(silent, 'unit')} never fired, and {too_few(samples, 'sample')} to call one "
            f"dead; {limits.n_star - samples:,} more would settle it",
        )  # fmt: skip
    if measurement.env.stats in _LESS:
        level, message = _LESS[measurement.env.stats]
        yield Finding("measured-less", level, "", message)
    if measurement.data.synthetic:
        yield Finding(
            "synthetic-data", "warning", "",
            "the inputs are random numbers; what is dead on them says nothing about real data",
        )  # fmt: skip
    # In a single sample every element is constant, which says nothing.
    yield from _input_findings(measurement.inputs if measurement.data.samples > 1 else (), sites)


def _site_findings(site: SiteDiagnosis, limits: Thresholds) -> Iterator[Finding]:
    counts, units, key = site.counts, site.units, site.key
    off = counts[Verdict.DEAD] + counts[Verdict.SILENT]
    # Exact: 0.07 * 100 is above 7 in binary.
    worth = Fraction(str(limits.warn_layer_dead))
    if counts[Verdict.INVALID]:
        yield Finding(
            "invalid", "error", key,
            f"{key}: {counts[Verdict.INVALID]:,} of {units:,} units gave NaN or infinity; look at the first layer that "
            "does, its weights and its inputs",
        )  # fmt: skip
    if units and off == units:
        yield Finding(
            "layer-dead", "error", key,
            f"{key}: no unit ever fired, so nothing passes this layer, and no gradient passes it back; check that the "
            "data is prepared as in training, then the layer's biases and the learning rate",
        )  # fmt: skip
    elif reaches(counts[Verdict.DEAD], units, worth):
        yield Finding(
            "layer-mostly-dead", "warning", key,
            f"{key}: {counts[Verdict.DEAD]:,} of {units:,} units are dead; a network can work well with fewer units "
            "than it has, so compare with an earlier checkpoint before you act",
        )  # fmt: skip
    for verdict, slug, words in (
        (Verdict.NEGATIVE_ONLY, "negative-only", "units never left the negative side"),
        (Verdict.SATURATED, "saturated", "units never left a rail, so no gradient passes them"),
    ):
        if counts[verdict]:
            level = "warning" if reaches(counts[verdict], units, worth) else "note"
            yield Finding(slug, level, key, f"{key}: {counts[verdict]:,} of {units:,} {words}")


def _explosions(sites: tuple[SiteDiagnosis, ...], limits: Thresholds) -> Iterator[Finding]:
    finite = [site for site in sites if 0 < site.max_abs_output < math.inf]
    for site in finite:
        growth = site.max_abs_output / finite[0].max_abs_output
        if growth > limits.explosion_growth:
            yield Finding(
                "explosion", "warning", site.key,
                f"{site.key}: its largest |h|, {site.max_abs_output:.3g}, is {growth:.3g} times the first layer's; "
                "normalisation or a smaller learning rate keeps it in bounds",
            )  # fmt: skip


def _input_findings(inputs: tuple[InputSummary, ...], sites: tuple[SiteDiagnosis, ...]) -> Iterator[Finding]:
    for item in inputs:
        if item.features and item.constant_features == item.features:
            yield Finding("constant-input", "warning", "", f"{item.name}: every sample is the same; check the data")
        elif item.constant_features:
            yield Finding(
                "constant-input", "note", "",
                f"{item.name}: {item.constant_features} of {item.features} elements are the same in every sample, so "
                "units that need them look dead",
            )  # fmt: skip
    off = [(s.counts[Verdict.DEAD] + s.counts[Verdict.SILENT]) / max(s.units, 1) for s in sites]
    wide = [item for item in inputs if "float" in item.dtype and max(abs(item.min), abs(item.max)) > 20]
    if off and min(off) >= 0.1 and wide:
        item = wide[0]
        yield Finding(
            "inputs-suspect", "warning", "",
            f"units are off in every layer, the first one too, and {item.name} runs from {item.min:.4g} to "
            f"{item.max:.4g}; check that the data is prepared as in training",
        )  # fmt: skip
