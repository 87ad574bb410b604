"""Judges a finished scan against a policy; a pure function of records, without torch."""

from __future__ import annotations

import datetime
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deadcheck.breach import WEIGHTS, Breach, finding
from deadcheck.checks import Case, of_layer, of_model, of_skipped
from deadcheck.comparison import compare
from deadcheck.errors import ExitCode
from deadcheck.policy import Level, Policy
from deadcheck.record import Record
from deadcheck.rules import BY_NAME
from deadcheck.shares import spelled


@dataclass(frozen=True)
class GateResult:
    """The gate's answer on one model."""

    findings: tuple[Breach, ...]
    judged: int
    """Layers that were judged."""

    limits: Mapping[str, str] = field(default_factory=dict)
    """The policy that was applied, as a configuration file spells it."""

    baseline: str | None = None
    """The model of the baseline, or the name that was given for it."""

    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """What it comes to: a rule failed, else something kept the gate from judging, else passed."""
        levels = {item.level for item in self.findings if item.active}
        if "error" in levels:
            return ExitCode.FAILED
        return ExitCode.NOTHING_JUDGED if "inconclusive" in levels else ExitCode.PASSED

    def number(self, level: str) -> int:
        """Return how many findings of a level count."""
        return sum(item.active and item.level == level for item in self.findings)


def judge(
    record: Record, baseline: Record | None, policy: Policy, *, today: datetime.date, name: str | None = None
) -> GateResult:
    """Judge one scan, and compare it with a baseline where there is one. ``name`` is the model's for ignores."""
    case = Case(record, policy, None if baseline is None else compare(baseline, record), today, name)
    found = [*of_model(case), *(item for site in case.judged for item in of_layer(case, site)), *of_skipped(case)]
    noticed = [
        Breach(item.id, "note" if item.level == "note" else "warning", item.where, item.message)
        for item in record.findings
        if item.id not in BY_NAME
    ]
    findings = [case.weighed(item) for item in found]
    kept = [item for item in findings if item is not None]
    kept.sort(key=lambda item: (not item.active, -WEIGHTS[item.level]))  # stable: layers stay in their order
    return GateResult(
        findings=(*kept, *noticed),
        judged=len(case.judged),
        limits=limits_of(policy),
        baseline=None if baseline is None else baseline.model.path,
        notes=() if case.comparison is None else case.comparison.notes,
    )


def with_unused(
    results: Sequence[tuple[str, Record, GateResult]], policy: Policy, *, today: datetime.date
) -> list[GateResult]:
    """Return the results of one run, the first with what DC013 says of exceptions that none of them needed."""
    out = [result for _, _, result in results]
    level = policy.rules.get("DC013", Level.WARN)
    if not out or level is Level.OFF:
        return out
    extra = [
        finding("unused-ignore", "", text, level="error" if level is Level.ERROR else "warning")
        for text in (*_stale(results, policy, today), *_unmatched(results, policy))
    ]
    return [replace(out[0], findings=(*out[0].findings, *extra)), *out[1:]]


def limits_of(policy: Policy) -> dict[str, str]:
    """Return the limits of a policy as a configuration file spells them."""
    names = ("max_layer_dead", "max_model_dead", "max_new_dead", "max_worse")
    values = {name: getattr(policy, name) for name in names}
    spelled_out = {name: "off" if value is None else spelled(value) for name, value in values.items()}
    spelled_out["warn_layer_dead"] = spelled(policy.warn_layer_dead)
    return {**spelled_out, "compare": policy.compare.value}


def _stale(results: Sequence[tuple[str, Record, GateResult]], policy: Policy, today: datetime.date) -> Iterator[str]:
    for entry in policy.ignores:
        what = f"the ignore of {entry.rule} in {entry.layer!r} ({entry.reason})"
        if entry.until is not None and entry.expired(today):
            yield f"{what} expired on {entry.until.isoformat()}; delete it, or give it a new day and a new reason"
        elif not any(
            item.rule == entry.rule and item.ignored is not None and entry.fits(name, item.where)
            for name, _, result in results
            for item in result.findings
        ):
            yield f"{what} fits no finding any more; delete it"


def _unmatched(results: Sequence[tuple[str, Record, GateResult]], policy: Policy) -> Iterator[str]:
    places = {place for _, record, _ in results for site in record.sites for place in (site.key, site.module)}
    places |= {item.where for _, record, _ in results for item in record.skipped}
    for entry in policy.layers:
        if not any(fnmatch.fnmatchcase(place, entry.match) for place in places):
            yield f"the pattern {entry.match!r} of policy.layers matches no layer; correct or delete it"
