"""What a report holds of a finished scan: enough to judge, draw and compare it without torch and without each unit."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deadcheck import rules
from deadcheck.config import Thresholds
from deadcheck.diagnosis import VERDICTS, Diagnosis, Finding, SiteDiagnosis, Verdict
from deadcheck.ranges import Ranges
from deadcheck.sites import (
    UNKNOWN,
    DataIdentity,
    Environment,
    InputSummary,
    IntArray,
    Measurement,
    ModelIdentity,
    Skipped,
    Spent,
)

STUCK = (Verdict.DEAD, Verdict.SILENT, Verdict.NEGATIVE_ONLY)
"""Verdicts on units that let nothing through, or nothing but a leak."""

COUNTED = ("dead", "silent", "rare", "faint", "saturated", "always_on", "negative_only", "invalid", "live")
"""Verdicts by name, in the order of the JSON report."""

LONG_SCAN = 5.0
"""Seconds from which on it is worth saying what a scan waited for."""


@dataclass(frozen=True)
class SiteRecord:
    """One site; its fields are the keys of the JSON report."""

    key: str
    module: str
    activation: str
    fed_by: tuple[str, ...]
    axis: int
    axis_from: str
    units: int
    samples: int
    observations: int
    """Per unit."""

    zero_rate: float | None
    """None where the scan did not count zeros."""

    counts: Mapping[str, int | None]
    """Units by the name of their verdict; None for one that the scan did not ask for, whose units count as live."""

    upper_bound: float
    dead_units: Ranges
    silent_units: Ranges
    negative_only_units: Ranges | None = None
    """None where the report does not say which they are."""

    aliases: tuple[str, ...] = ()
    family: str = ""
    samples_from: str = "batch"
    depths: Mapping[str, int] = field(default_factory=dict)
    dormant_shares: Mapping[str, float] = field(default_factory=dict)
    zeros: int | None = None
    """Observations that were 0, of all units; None where the report does not say."""

    mean_output: float | None = None
    max_abs_output: float | None = None
    """None where it was not finite, or the report does not say."""

    positive_share: float | None = None
    nonfinite: int | None = None

    def count(self, *verdicts: Verdict) -> int:
        """Return the number of units with one of these verdicts."""
        return sum(self.counts.get(verdict.value) or 0 for verdict in verdicts)

    @property
    def off_units(self) -> Ranges:
        """Units that never fired, in two runs of ranges: the dead, then the silent."""
        return (*self.dead_units, *self.silent_units)


@dataclass(frozen=True)
class RunRecord:
    """When and where a scan ran: what may differ between two runs on the same input."""

    started: str = ""
    seconds: float = 0.0
    host: str = ""
    seconds_data: float = 0.0
    """Of ``seconds``, what went into reading the data; see ``Spent``."""

    seconds_forward: float = 0.0
    seconds_counting: float | None = None
    """What went into counting, in all threads together; see ``Spent``."""

    note: str | None = None
    """What kept the scan from being faster, where that can be changed."""


@dataclass(frozen=True)
class Record:
    """One scan."""

    model: ModelIdentity
    data: DataIdentity
    env: Environment
    sites: tuple[SiteRecord, ...]
    """In the order in which they first ran."""

    skipped: tuple[Skipped, ...] = ()
    findings: tuple[Finding, ...] = ()
    warnings: tuple[str, ...] = ()
    inputs: tuple[InputSummary, ...] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)
    rules_version: int = rules.VERSION
    output_constant: bool | None = None
    run: RunRecord | None = None
    per_unit: tuple[Mapping[str, Sequence[object]] | None, ...] = ()
    """Every unit's numbers by their name, a mapping per site; empty where they were not asked for."""

    @property
    def units(self) -> int:
        """Units of all sites."""
        return sum(site.units for site in self.sites)

    def count(self, *verdicts: Verdict) -> int:
        """Return the number of units with one of these verdicts."""
        return sum(site.count(*verdicts) for site in self.sites)

    def worst(self) -> list[SiteRecord]:
        """Return the sites, the one with the largest share of units that are off, stuck or broken first."""
        bad = (Verdict.INVALID, *STUCK, Verdict.SATURATED)
        return sorted(self.sites, key=lambda site: -site.count(*bad) / max(site.units, 1))


def record_of(diagnosis: Diagnosis, *, per_unit: bool = False) -> Record:
    """Return what a report holds of a diagnosis; every number in it is finite, what is not is None."""
    seen = diagnosis.measurement
    return Record(
        model=seen.model,
        data=seen.data,
        env=seen.env,
        sites=tuple(_site(site) for site in diagnosis),
        skipped=seen.skipped,
        findings=diagnosis.findings,
        warnings=seen.warnings,
        inputs=seen.inputs,
        thresholds=diagnosis.thresholds,
        output_constant=seen.output_constant,
        run=_run(seen),
        per_unit=tuple(_per_unit(site) for site in diagnosis) if per_unit else (),
    )


def _run(seen: Measurement) -> RunRecord:
    spent = seen.spent
    return RunRecord(
        started=seen.started,
        seconds=round(seen.seconds, 3),
        host=platform.node(),
        seconds_data=round(spent.data, 3),
        seconds_forward=round(spent.forward, 3),
        seconds_counting=None if spent.counting is None else round(spent.counting, 3),
        note=_slow_reading(spent),
    )


def _slow_reading(spent: Spent) -> str | None:
    """Say that the data was slower than the model, where that is so and the scan was long enough to matter."""
    both = spent.data + spent.forward
    if both <= LONG_SCAN or spent.data <= both / 2:
        return None
    return (
        f"reading the data took {spent.data:.1f} of {both:.1f} s, and the model waited for it; more --workers read it "
        "ahead (for a DataLoader of your own, num_workers)"
    )


def _site(site: SiteDiagnosis) -> SiteRecord:
    stats, where = site.stats, site.stats.site
    return SiteRecord(
        key=where.key,
        module=where.module,
        activation=where.activation,
        fed_by=where.fed_by,
        axis=where.axis,
        axis_from=where.axis_from,
        units=where.units,
        samples=stats.samples,
        observations=stats.observations,
        zero_rate=finite(site.zero_rate),
        counts={name: None if Verdict(name) in site.untold else site.counts[Verdict(name)] for name in COUNTED},
        upper_bound=site.upper_bound,
        dead_units=tuple(site.ranges(Verdict.DEAD)),
        silent_units=tuple(site.ranges(Verdict.SILENT)),
        negative_only_units=tuple(site.ranges(Verdict.NEGATIVE_ONLY)),
        aliases=where.aliases,
        family=where.family.value,
        samples_from=where.samples_from,
        depths=dict(site.depths),
        dormant_shares={str(tau): share for tau, share in site.dormant_shares.items()},
        zeros=None if math.isnan(site.zero_rate) else int(stats.zeros.sum()),
        mean_output=finite(site.mean_output),
        max_abs_output=finite(site.max_abs_output),
        positive_share=finite(site.positive_share),
        nonfinite=None if site.level == "verdict" else int(stats.nonfinite.sum()),
    )


def _per_unit(site: SiteDiagnosis) -> dict[str, list[object]]:
    stats = site.stats
    return {
        "zeros": _counts(stats.zeros),
        "fired": _counts(stats.fired),
        "first_fired": [index if index >= 0 else None for index in stats.first_fired.tolist()],
        "max": _numbers(stats.output_max),
        "min": _numbers(stats.output_min),
        "input_max": _numbers(stats.input_max),
        "input_min": _numbers(stats.input_min),
        "mean": _numbers(stats.output_sum / max(stats.observations, 1)),
        "mean_abs": _numbers(stats.mean_abs),
        "second_moment": _numbers(stats.output_square_sum / max(stats.observations, 1)),
        "positive": _counts(stats.positive),
        "nonfinite": _counts(np.where((stats.fired == UNKNOWN) & (stats.nonfinite == 0), UNKNOWN, stats.nonfinite)),
        "margin": _numbers(stats.margin),
        "verdict": [VERDICTS[code].value for code in site.codes.tolist()],
    }


def _counts(values: IntArray) -> list[object]:
    return [None if count == UNKNOWN else count for count in values.tolist()]


def _numbers(values: Iterable[object]) -> list[object]:
    return [finite(value) for value in np.asarray(values, np.float64).tolist()]


def finite(value: float) -> float | None:
    """Return a number, or None for one that JSON cannot spell."""
    return value if math.isfinite(value) else None
