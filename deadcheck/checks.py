"""What each rule looks at: one model's record, layer by layer, in whole numbers."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cached_property

from deadcheck.breach import WEIGHTS, Breach, Ignored, finding
from deadcheck.comparison import NEVER_RAN, Comparison, LayerChange
from deadcheck.diagnosis import Verdict
from deadcheck.policy import Compare, Level, Policy
from deadcheck.ranges import Ranges, count
from deadcheck.record import STUCK, Record, SiteRecord
from deadcheck.shares import exceeds, number_of, percent, reaches, spelled, too_few

_OFF = (Verdict.DEAD, Verdict.SILENT)


class Case:
    """One model before the gate, and what weighs on every finding about it."""

    def __init__(
        self, record: Record, policy: Policy, comparison: Comparison | None, today: datetime.date, name: str | None
    ) -> None:
        self.record = record
        self.policy = policy
        self.comparison = comparison
        self.name = name or record.model.path or ""
        self._today = today
        self._modules = {site.key: site.module for site in record.sites}

    @cached_property
    def judged(self) -> list[SiteRecord]:
        """Layers that the policy does not turn off."""
        return [site for site in self.record.sites if self.level(site.key) is not Level.OFF and site.units]

    @cached_property
    def changes(self) -> Mapping[str, LayerChange]:
        """Change of every layer against a baseline that can be compared."""
        if self.comparison is None or self.comparison.obstacles:
            return {}
        return {change.key: change for change in self.comparison.layers}

    @cached_property
    def enough(self) -> int:
        """Samples that it takes to judge."""
        own = self.policy.min_samples
        return self.record.thresholds.n_star if own is None else own

    @cached_property
    def blind(self) -> bool:
        """Whether nothing that rests on the data as a whole is proof."""
        data = self.record.data
        return data.synthetic or data.samples < self.enough or self.one_sample

    @cached_property
    def one_sample(self) -> bool:
        """Whether every sample was the same."""
        inputs = [item for item in self.record.inputs if item.features]
        return bool(inputs) and all(item.constant_features == item.features for item in inputs)

    def level(self, where: str) -> Level:
        """Return the most that a finding at a place may weigh."""
        return self.policy.layer(where, self._modules.get(where, where)).level

    def weighed(self, item: Breach) -> Breach | None:
        """Return a finding with the level that the policy gives it; None where it is turned off."""
        if item.level == "inconclusive":
            return item
        own = self.policy.rules.get(item.rule)
        cap = self.level(item.where) if item.where else Level.ERROR
        if Level.OFF in (own, cap):
            return None
        # A rule's own level raises or lowers what would fail; the warning before a limit stays a warning.
        level = item.level
        if own is Level.WARN or cap is Level.WARN:
            level = "warning" if level == "error" else level
        elif own is Level.ERROR and item.limit is None:
            level = "error"
        if level == "error" and item.rule != "DC005" and (self.blind or item.where in self.few):
            item = replace(item, message=f"{item.message} (unproven: too little was seen to judge)")
            level = "warning"
        return replace(item, level=level, ignored=self._ignored(item))

    @cached_property
    def few(self) -> frozenset[str]:
        """Layers that saw fewer samples than it takes, in a scan that has enough."""
        return frozenset(site.key for site in self.judged if site.samples < self.enough and not self.blind)

    @cached_property
    def first_peak(self) -> float | None:
        """Largest |h| of the first layer that gave anything, to measure growth by."""
        return next((site.max_abs_output for site in self.record.sites if site.max_abs_output), None)

    def _ignored(self, item: Breach) -> Ignored | None:
        for entry in self.policy.ignores:
            if entry.rule == item.rule and entry.fits(self.name, item.where) and not entry.expired(self._today):
                return Ignored(entry.reason, None if entry.until is None else entry.until.isoformat())
        return None


def of_model(case: Case) -> Iterator[Breach]:
    """Yield what is wrong with the scan and with the model as a whole."""
    record, data = case.record, case.record.data
    if not case.judged:
        turned_off = f"all {len(record.sites):,} layers are turned off by policy.layers" if record.sites else ""
        yield finding("nothing-judged", "", f"no layer was judged: {turned_off or 'the scan measured no activation'}",
                       level="inconclusive")  # fmt: skip
    if data.synthetic:
        yield finding("synthetic-data", "", "the inputs are random numbers; give real samples with --data",
                       level="inconclusive")  # fmt: skip
    if data.samples < case.enough:
        yield finding("too-few-samples", "", f"{too_few(data.samples, 'sample')} to judge; it takes "
                       f"{case.enough:,}", level="inconclusive")  # fmt: skip
    elif case.one_sample:
        yield finding("too-few-samples", "", "every sample is the same, so the scan saw one; check the data",
                       level="inconclusive")  # fmt: skip
    if case.comparison is not None:
        for obstacle in case.comparison.obstacles:
            yield finding("baseline-not-comparable", "", f"{obstacle}; write the baseline again, on the same data",
                           level="inconclusive")  # fmt: skip
    if record.output_constant:
        yield finding("output-constant", "", f"the model gave the same output for all {data.samples:,} samples")
    yield from _model_share(case)


def _model_share(case: Case) -> Iterator[Breach]:
    limit = case.policy.max_model_dead
    if limit is None:
        return
    units = sum(site.units for site in case.judged)
    off, stuck = (sum(site.count(*verdicts) for site in case.judged) for verdicts in (_OFF, STUCK))
    if exceeds(off, units, limit):
        yield _over("model-mostly-dead", "", off, units, limit)
    elif exceeds(stuck, units, limit):
        yield _over("negative-only", "", stuck, units, limit)


def of_layer(case: Case, site: SiteRecord) -> Iterator[Breach]:
    """Yield what is wrong with one layer."""
    invalid = site.count(Verdict.INVALID)
    if invalid:
        yield finding("invalid", site.key, f"{invalid:,} of {site.units:,} units gave NaN or infinity", count=invalid,
                       of=site.units)  # fmt: skip
    yield from _strictest(case, list(_layer_share(case, site)))
    yield from _strictest(case, list(_layer_change(case, site)))
    saturated = site.count(Verdict.SATURATED)
    if reaches(saturated, site.units, case.policy.warn_layer_dead):
        yield finding(
            "saturated", site.key,
            f"{saturated:,} of {site.units:,} units ({percent(saturated, site.units)}) never leave a rail",
            level="warning", count=saturated, of=site.units,
        )  # fmt: skip
    first = case.first_peak
    if first and site.max_abs_output and site.max_abs_output / first > case.policy.explosion_growth:
        yield finding(
            "explosion", site.key,
            f"its largest |h|, {site.max_abs_output:.3g}, is {site.max_abs_output / first:.3g} times the first layer's",
            level="warning",
        )  # fmt: skip
    if site.key in case.few and site.count(*STUCK):
        yield from _unsettled(case, site)


def _unsettled(case: Case, site: SiteRecord) -> Iterator[Breach]:
    """Say that a layer cannot be judged, where a limit would be broken by units that too few samples reached."""
    if any(item.level == "error" for item in (*_layer_share(case, site), *_layer_change(case, site))):
        yield finding("too-few-samples", site.key, f"only {number_of(site.samples, 'sample')} reached this layer, "
                       f"{case.enough:,} are needed to judge it", level="inconclusive")  # fmt: skip


def _strictest(case: Case, candidates: list[Breach]) -> Iterator[Breach]:
    """Yield findings on one matter, less those that a stricter one has already said."""
    said = 0
    for item in candidates:
        weighed = case.weighed(item)
        if weighed is None or WEIGHTS[weighed.level] <= said:
            continue
        # An ignore silences the rule that it names, and no other.
        said = WEIGHTS[weighed.level] if weighed.active else said
        yield item


def _layer_share(case: Case, site: SiteRecord) -> Iterator[Breach]:
    """Yield what can be said of the dead share of a layer, the strictest first."""
    units, off, stuck = site.units, site.count(*_OFF), site.count(*STUCK)
    limit = case.policy.limit("max_layer_dead", case.policy.layer(site.key, site.module))
    warn = case.policy.warn_layer_dead
    if off == units:
        yield finding("layer-dead", site.key, f"no unit ever fired: all {units:,} are {_state(site)}", count=off,
                       of=units, units=_merged(site, stuck=False))  # fmt: skip
    elif stuck == units:
        yield finding(
            "negative-only", site.key,
            f"no unit ever leaves the negative side: all {units:,} are dead or pass the leak alone",
            count=stuck, of=units, units=_merged(site, stuck=True),
        )  # fmt: skip
    if limit is not None and exceeds(off, units, limit):
        yield _over("layer-mostly-dead", site.key, off, units, limit, _merged(site, stuck=False))
    elif limit is not None and exceeds(stuck, units, limit):
        yield _over("negative-only", site.key, stuck, units, limit, _merged(site, stuck=True))
    if reaches(off, units, warn):
        yield finding(
            "layer-mostly-dead", site.key, f"{off:,} of {units:,} units ({percent(off, units)}) are {_state(site)}",
            level="warning", count=off, of=units, limit=spelled(warn), units=_merged(site, stuck=False),
        )  # fmt: skip
    elif reaches(stuck, units, warn):
        yield finding(
            "negative-only", site.key,
            f"{stuck:,} of {units:,} units ({percent(stuck, units)}) never leave the negative side",
            level="warning", count=stuck, of=units, limit=spelled(warn), units=_merged(site, stuck=True),
        )  # fmt: skip


def _layer_change(case: Case, site: SiteRecord) -> Iterator[Breach]:
    """Yield what can be said of a layer against its baseline."""
    change = case.changes.get(site.key)
    if change is None:
        return
    layer, units = case.policy.layer(site.key, site.module), site.units
    limit = case.policy.limit("max_new_dead", layer)
    if limit is not None and case.policy.compare is Compare.UNITS:
        new, stuck = count(change.newly_off), count(change.newly_stuck)
        if exceeds(new, units, limit):
            yield _new("newly-dead", site, change.newly_off, limit, "never fire now and did in the baseline")
        elif exceeds(stuck, units, limit):
            yield _new("negative-only", site, change.newly_stuck, limit, "are stuck now and were not in the baseline")
    slack = case.policy.limit("max_worse", layer)
    if slack is None:
        return
    for rule, after in (("worse-than-baseline", change.off), ("negative-only", change.after)):
        if exceeds(after - change.before, units, slack):
            yield finding(
                rule, site.key,
                f"{after:,} of {units:,} units ({percent(after, units)}) are {_state(site)}, "
                f"{change.before:,} ({percent(change.before, units)}) were in the baseline; "
                f"allowed: {spelled(slack)} of the layer more",
                count=after, of=units, limit=spelled(slack),
            )  # fmt: skip
            return


def of_skipped(case: Case) -> Iterator[Breach]:
    """Yield the parts of the model that never ran."""
    lost = case.comparison.lost if case.comparison is not None and not case.comparison.obstacles else ()
    for item in case.record.skipped:
        if item.reason.startswith(NEVER_RAN):
            was = [key for key in lost if f"{key}.".startswith((f"{item.where}.", f"{item.where}:", f"{item.where}#"))]
            then = "; the baseline measured it" if was else ""
            yield finding("never-ran", item.where, f"{item.what} {item.reason}, so it was not judged{then}",
                           level="error" if was else "warning")  # fmt: skip


def _over(rule: str, where: str, found: int, of: int, limit: Fraction, units: Ranges = ()) -> Breach:
    words = "are dead" if rule != "negative-only" else "are dead or never leave the negative side"
    return finding(
        rule, where,
        f"{found:,} of {of:,} units ({percent(found, of, limit)}) {words}; allowed: {spelled(limit)}",
        count=found, of=of, limit=spelled(limit), units=units,
    )  # fmt: skip


def _new(rule: str, site: SiteRecord, units: Ranges, limit: Fraction, words: str) -> Breach:
    new = count(units)
    return finding(
        rule, site.key,
        f"{new:,} of {site.units:,} units ({percent(new, site.units, limit)}) {words}; allowed: {spelled(limit)}",
        count=new, of=site.units, limit=spelled(limit), units=units,
    )  # fmt: skip


def _state(site: SiteRecord) -> str:
    dead, silent, leaking = (site.count(verdict) for verdict in STUCK)
    parts = [("dead", dead), ("silent", silent), ("stuck on the negative side", leaking)]
    return " or ".join(name for name, number in parts if number) or "dead"


def _merged(site: SiteRecord, *, stuck: bool) -> Ranges:
    ranges = site.off_units + (site.negative_only_units or () if stuck else ())
    return tuple(sorted(ranges))
