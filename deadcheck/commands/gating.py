"""Judges the models and the finished reports that a command was given."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from deadcheck.commands.inputs import baseline_for
from deadcheck.commands.measuring import Run, attempted, scans
from deadcheck.gate import judge, with_unused
from deadcheck.record import Record
from deadcheck.reports import Outcome
from deadcheck.reports.from_json import read_report, read_reports


def gated(models: Sequence[Path], reports: Sequence[Path], run: Run) -> list[Outcome]:
    """Return the outcome of every model and report; one that fails does not stop the others."""
    today = datetime.date.today()
    found = list(scans(models, run)) if models or not reports else []
    found += [outcome for path in reports for outcome in _read(path, run)]
    outcomes = [_judged(outcome, run, today) for outcome in found]
    results = [(o.name, o.record, o.gate) for o in outcomes if o.record is not None and o.gate is not None]
    final = iter(with_unused(results, run.config.policy, today=today))
    return [outcome if outcome.gate is None else replace(outcome, gate=next(final)) for outcome in outcomes]


def _read(path: Path, run: Run) -> Sequence[Outcome]:
    outcomes: list[Outcome] = []

    def work() -> Outcome:
        outcomes.extend(replace(outcome, gate=None) for outcome in read_reports(path, per_unit=run.per_unit))
        return outcomes[0]

    first = attempted(str(path), work, debug=run.debug)
    return outcomes or [first]


def _judged(outcome: Outcome, run: Run, today: datetime.date) -> Outcome:
    if outcome.record is None:
        return outcome
    return attempted(outcome.model, partial(_judge, outcome, outcome.record, run, today), debug=run.debug)


def _judge(outcome: Outcome, record: Record, run: Run, today: datetime.date) -> Outcome:
    baseline = run.baseline or baseline_for(outcome.model, run.config)
    then = None if baseline is None else read_report(baseline, outcome.model)
    result = judge(record, then, run.config.policy, today=today, name=outcome.model)
    return replace(outcome, gate=result if then is None else replace(result, baseline=str(baseline)))
