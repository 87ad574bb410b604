"""The versioned JSON report that other programs read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from deadcheck import __version__
from deadcheck.breach import Breach
from deadcheck.diagnosis import Verdict
from deadcheck.errors import ExitCode
from deadcheck.gate import GateResult
from deadcheck.record import COUNTED, Record, SiteRecord, finite
from deadcheck.reports.base import Outcome, RenderOptions, code_of, status_of, worst_code
from deadcheck.sites import InputSummary

SCHEMA_VERSION = "1.0"
"""Raised in its first number when a key changes its name or meaning; new keys do not raise it."""

_SITE_KEYS = tuple(f.name for f in fields(SiteRecord))


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render what became of one model, or of several as a list of such reports; every number is finite."""
    if len(outcomes) == 1:
        return _spelled(_report(outcomes[0], options))
    code = worst_code(outcomes, options)
    reports = [_report(outcome, options) for outcome in outcomes]
    return _spelled({**_head(status_of(_worst(outcomes)), code), "reports": reports, "error": None})


def render_failure(code: ExitCode, message: str, model: str | None) -> str:
    """Render a command that ended before there was an outcome, under the same keys."""
    return _spelled(_failed(code, message, model))


def _worst(outcomes: Sequence[Outcome]) -> ExitCode:
    return worst_code(outcomes, RenderOptions())


def _head(status: str, code: ExitCode) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "deadcheck", "version": __version__},
        "status": status,
        "exit_code": int(code),
    }


def _failed(code: ExitCode, message: str, model: str | None) -> dict[str, Any]:
    return {
        **_head(status_of(code), code),
        "model": {"path": model}, "data": None, "env": None, "totals": None, "sites": [], "skipped": [],
        "findings": [], "warnings": [], "error": {"code": int(code), "message": message}, "run": None,
    }  # fmt: skip


def _report(outcome: Outcome, options: RenderOptions) -> dict[str, Any]:
    if outcome.record is None:
        failure = outcome.failure
        code, message = (ExitCode.ERROR, "") if failure is None else (failure.code, failure.message)
        return _failed(code, message, outcome.model)
    record = outcome.record
    report = _head(outcome.status, worst_code([outcome], options))
    for name in ("model", "data", "env"):
        report[name] = asdict(getattr(record, name))
    report["totals"] = _totals(record)
    report["sites"] = [_site(site) for site in record.sites]
    if options.per_unit:
        for site, numbers in zip(report["sites"], record.per_unit, strict=False):
            if numbers is not None:
                site["per_unit"] = numbers
    report["skipped"] = [asdict(item) for item in record.skipped]
    report["findings"] = (
        [{**asdict(item), "rule": code_of(item.id) or None} for item in record.findings]
        if outcome.gate is None
        else [_finding(item) for item in outcome.gate.findings]
    )
    report["warnings"] = list(record.warnings)
    report["error"] = None if outcome.failure is None else asdict(outcome.failure)
    report["inputs"] = [_input(item) for item in record.inputs]
    report["thresholds"] = {**asdict(record.thresholds), "n_star": record.thresholds.n_star}
    report["rules_version"] = record.rules_version
    report["gate"] = None if outcome.gate is None else _gate(outcome.gate)
    report["run"] = None if record.run is None else asdict(record.run)
    return report


def _totals(record: Record) -> dict[str, Any]:
    counts = {name: _total([site.counts.get(name, 0) for site in record.sites]) for name in COUNTED}
    dead, silent = (record.count(verdict) for verdict in (Verdict.DEAD, Verdict.SILENT))
    return {
        "sites": len(record.sites),
        "units": record.units,
        "dead": dead,
        "silent": silent,
        "dead_share": dead / max(record.units, 1),
        "counts": counts,
        "output_constant": record.output_constant,
    }


def _total(counts: Sequence[int | None]) -> int | None:
    """Add up what every site counted; None where one did not."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _site(site: SiteRecord) -> dict[str, Any]:
    return {name: getattr(site, name) for name in _SITE_KEYS}


def _input(item: InputSummary) -> dict[str, Any]:
    numbers = {name: finite(getattr(item, name)) for name in ("min", "max", "mean", "sd")}
    return {**asdict(item), **numbers}


def _finding(item: Breach) -> dict[str, Any]:
    return {
        "id": item.id, "level": item.level, "where": item.where, "message": item.message, "rule": item.rule or None,
        "count": item.count, "of": item.of, "limit": item.limit, "units": item.units,
        "ignored": None if item.ignored is None else asdict(item.ignored),
    }  # fmt: skip


def _gate(result: GateResult) -> dict[str, Any]:
    return {
        "judged": result.judged,
        "limits": dict(result.limits),
        "baseline": result.baseline,
        "notes": list(result.notes),
    }


def _spelled(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=True) + "\n"
