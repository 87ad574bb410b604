"""Reads a JSON report back, without torch; what is in it is checked, since a report may come from anywhere."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from deadcheck import rules
from deadcheck.breach import WEIGHTS, Breach, Ignored
from deadcheck.config import Thresholds
from deadcheck.diagnosis import Finding
from deadcheck.errors import ExitCode, UsageError
from deadcheck.gate import GateResult
from deadcheck.ranges import Ranges
from deadcheck.record import Record, RunRecord, SiteRecord
from deadcheck.reports.base import Failure, Outcome
from deadcheck.sites import DataIdentity, Environment, InputSummary, ModelIdentity, Skipped

_T = TypeVar("_T")


class _Model(msgspec.Struct):
    path: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    format: str = ""
    read: str = ""
    arch: str | None = None
    prefix_stripped: str | None = None


class _Totals(msgspec.Struct):
    output_constant: bool | None = None


class _Input(msgspec.Struct):
    name: str
    shape: tuple[int, ...]
    dtype: str
    min: float | None
    max: float | None
    mean: float | None
    sd: float | None
    features: int = 0
    constant_features: int = 0


class _Found(msgspec.Struct):
    id: str
    level: str
    where: str
    message: str
    rule: str | None = None
    count: int | None = None
    of: int | None = None
    limit: str | None = None
    units: Ranges = ()
    ignored: Ignored | None = None


class _Gate(msgspec.Struct):
    judged: int
    limits: dict[str, str] = {}
    baseline: str | None = None
    notes: tuple[str, ...] = ()


class _Error(msgspec.Struct):
    code: int
    message: str


class _Report(msgspec.Struct):
    schema_version: str
    status: str = ""
    model: _Model | None = None
    data: DataIdentity | None = None
    env: Environment | None = None
    totals: _Totals | None = None
    sites: tuple[SiteRecord, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    findings: tuple[_Found, ...] = ()
    warnings: tuple[str, ...] = ()
    inputs: tuple[_Input, ...] = ()
    thresholds: Thresholds = msgspec.field(default_factory=Thresholds)
    rules_version: int = rules.VERSION
    gate: _Gate | None = None
    run: RunRecord | None = None
    error: _Error | None = None
    reports: tuple[_Report, ...] | None = None


class _UnitNumbers(msgspec.Struct):
    per_unit: dict[str, list[object]] | None = None


class _UnitsOnly(msgspec.Struct):
    sites: tuple[_UnitNumbers, ...] = ()
    reports: tuple[_UnitsOnly, ...] | None = None


def read_reports(path: Path, *, per_unit: bool = False) -> tuple[Outcome, ...]:
    """Return what a JSON report holds: one outcome, or several where several models were judged at once.

    ``per_unit`` reads every unit's numbers too. Raises UsageError for what is no such report.
    """
    text = _bytes_of(path)
    _check_command(text, path)
    document = _decoded(text, _Report, path)
    numbers = _decoded(text, _UnitsOnly, path) if per_unit else _UnitsOnly()
    sites = [site for part in (numbers, *(numbers.reports or ())) for site in part.sites]
    if sites and not any(site.per_unit for site in sites):
        raise UsageError(f"{path}: holds no numbers of each unit; write it anew with --per-unit, or leave that out")
    if document.reports is None:
        return (_outcome(document, numbers, path),)
    each = numbers.reports or (_UnitsOnly(),) * len(document.reports)
    return tuple(_outcome(part, own, path) for part, own in zip(document.reports, each, strict=True))


def read_report(path: Path, model: str | None = None) -> Record:
    """Return the scan that a JSON report holds; of several the one on this model. UsageError where there is none."""
    outcomes = read_reports(path)
    chosen = outcomes if len(outcomes) == 1 else [outcome for outcome in outcomes if outcome.model == model]
    if len(chosen) != 1:
        raise UsageError(f"{path}: a report on {len(outcomes)} models, of which {len(chosen)} are {model or 'named'}; "
                         "give the report of one model")  # fmt: skip
    record, failure = chosen[0].record, chosen[0].failure
    if record is None:
        why = failure.message if failure is not None else "no reason given"
        raise UsageError(f"{path}: the report of a run that measured nothing ({why}); scan the model again")
    return record


def _bytes_of(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UsageError(f"{path}: a folder, not a report; name the JSON file in it")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: not a regular file; name a JSON report")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such report; write one with 'deadcheck scan MODEL -o json={path}'") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the file") from error


def _decoded(text: bytes, shape: type[_T], path: Path) -> _T:
    try:
        try:
            return msgspec.json.decode(text, type=shape)
        except msgspec.DecodeError:
            # A name may hold half of a surrogate pair, which JSON can spell and msgspec's reader refuses.
            return msgspec.convert(json.loads(text, parse_constant=_finite, parse_float=_finite), type=shape)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        start = text[:40].lstrip()
        if not start.startswith((b"{", b"[")):
            kind = (
                "a Git LFS pointer; run 'git lfs pull'" if start.startswith(b"version https://git-lfs") else "not JSON"
            )
            raise UsageError(f"{path}: {kind}; name a report that deadcheck wrote with -o json=PATH") from error
        raise UsageError(f"{path}: not a deadcheck report ({error}); write it anew with -o json=PATH") from error


def _check_command(text: bytes, path: Path) -> None:
    """Refuse the report of a command that measures in another way, as of a patch."""
    try:
        own = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):  # whoever reads it says so
        return
    if {"tool", "status"} <= own.keys() and own.keys() & {"patch", "stand_in", "tensors", "layers"}:
        raise UsageError(
            f"{path}: a report of another command, and not of a scan or a gate; name one that 'deadcheck scan' or "
            "'gate' wrote"
        )


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _outcome(report: _Report, numbers: _UnitsOnly, path: Path) -> Outcome:
    if not report.schema_version.startswith("1."):
        raise UsageError(
            f"{path}: written in version {report.schema_version} of the format, this deadcheck reads version 1; "
            "use the deadcheck that wrote it"
        )
    name = None if report.model is None else report.model.path
    if report.error is not None:
        codes = {int(code): code for code in ExitCode}
        return Outcome(name, failure=Failure(codes.get(report.error.code, ExitCode.ERROR), report.error.message))
    record = _record(report, numbers, path)
    return Outcome(name, record, None if report.gate is None else _result(report, report.gate))


def _record(report: _Report, numbers: _UnitsOnly, path: Path) -> Record:
    if report.model is None or report.data is None:
        missing = "model" if report.model is None else "data"
        raise UsageError(f"{path}: not a deadcheck report (it has no {missing}); write it anew with -o json=PATH")
    for fault in _faults(report):
        raise UsageError(f"{path}: the report contradicts itself ({fault}); write it anew with -o json=PATH")
    model = report.model
    return Record(
        model=ModelIdentity(
            model.path, model.sha256, model.bytes, model.format, model.read, model.arch, model.prefix_stripped
        ),
        data=report.data,
        env=report.env or Environment("", "", ""),
        sites=report.sites,
        skipped=report.skipped,
        findings=tuple(Finding(f.id, f.level, f.where, f.message) for f in report.findings),
        warnings=report.warnings,
        inputs=tuple(_input(item) for item in report.inputs),
        thresholds=report.thresholds,
        rules_version=report.rules_version,
        output_constant=None if report.totals is None else report.totals.output_constant,
        run=report.run,
        per_unit=tuple(site.per_unit for site in numbers.sites),
    )


def _input(item: _Input) -> InputSummary:
    low, high, mean, sd = (math.nan if value is None else value for value in (item.min, item.max, item.mean, item.sd))
    return InputSummary(item.name, item.shape, item.dtype, low, high, mean, sd, item.features, item.constant_features)


def _result(report: _Report, gate: _Gate) -> GateResult:
    findings = tuple(
        Breach(f.id, f.level, f.where, f.message, f.rule or "", f.count, f.of, f.limit, f.units, f.ignored)
        for f in report.findings
    )
    return GateResult(findings, gate.judged, gate.limits, gate.baseline, gate.notes)


def _faults(report: _Report) -> Iterator[str]:
    """Yield what cannot be true; the gate must not be talked into a pass by a report that was edited by hand."""
    assert report.data is not None
    if report.data.samples < 0:
        yield f"{report.data.samples} samples"
    if any(finding.level not in WEIGHTS for finding in report.findings):
        yield "a finding has a level that there is not"
    doubled = [key for key, times in Counter(site.key for site in report.sites).items() if times > 1]
    if doubled:
        yield f"layer {doubled[0]!r} stands twice"
    for site in report.sites:
        wrong = _site_fault(site)
        if wrong is not None:
            yield f"layer {site.key!r}: {wrong}"


def _site_fault(site: SiteRecord) -> str | None:
    counts = [count for count in site.counts.values() if count is not None]
    if min(site.units, site.samples, site.observations, *counts, 0) < 0:
        return "a count below 0"
    if sum(counts) != site.units:
        return f"its verdicts are on {sum(counts):,} of {site.units:,} units"
    listed: Mapping[str, Ranges | None] = {
        "dead": site.dead_units, "silent": site.silent_units, "negative_only": site.negative_only_units,
    }  # fmt: skip
    for name, ranges in listed.items():
        wrong = _ranges_fault(name, ranges, site)
        if wrong is not None:
            return wrong
    if sum(bool(ranges) for ranges in listed.values()) < 2:
        return None
    together = sorted((pair for ranges in listed.values() for pair in ranges or ()), key=lambda pair: pair[0])
    if any(last >= first for (_, last), (first, _) in pairwise(together)):
        return "a unit has two verdicts"
    return None


def _ranges_fault(name: str, ranges: Ranges | None, site: SiteRecord) -> str | None:
    expected = site.counts.get(name) or 0
    if ranges is None:
        return None
    number = 0
    if ranges:
        starts, ends = np.array(ranges).T
        ascending = (starts <= ends).all() and (starts[1:] > ends[:-1]).all()
        if not ascending or starts[0] < 0 or ends[-1] >= site.units:
            return f"its {name} units are not ascending ranges within {site.units:,} units"
        number = int((ends - starts + 1).sum())
    return None if number == expected else f"{expected:,} units are {name}, and {number:,} are listed"
