"""Writes and tightens baselines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deadcheck.baseline import pruned, trimmed, worse
from deadcheck.commands.inputs import baseline_for, refuse_measuring, settings, targets_of
from deadcheck.commands.measuring import Reading, Run, scanned
from deadcheck.commands.output import check_place, write
from deadcheck.commands.printing import print_text
from deadcheck.comparison import Comparison, compare
from deadcheck.config import Config
from deadcheck.errors import ExitCode, NothingMeasured, UsageError
from deadcheck.ranges import count
from deadcheck.record import STUCK, Record
from deadcheck.reports import REPORTS, Outcome, RenderOptions
from deadcheck.reports.from_json import read_report
from deadcheck.safe_text import shown
from deadcheck.shares import number_of, percent

_NAMED = 5


@dataclass(frozen=True)
class Source:
    """Where the scan comes from: a model, or a finished report."""

    model: Path | None
    report: Path | None
    data: str | None
    reading: Reading
    config: Path | None


def write_baseline(source: Source, output: Path | None, *, accept_worse: bool, quiet: bool, debug: bool) -> ExitCode:
    """Write a scan down as a baseline; one that is there already is not made worse unless that is accepted."""
    config = settings(source.config, {"scan.data": source.data})
    name, record = _scan(source, config, quiet=quiet, debug=debug)
    place = output or baseline_for(name, config)
    if place is None:
        raise UsageError("where should the baseline go? add -o baseline.json, or name it in deadcheck.yaml")
    check_place(f"-o {str(place)!r}", str(place), str(place), is_baseline=True)
    if place.exists() and not accept_worse:
        comparison = compare(read_report(place), record)
        _refuse_other(place, comparison, "--accept-worse replaces it all the same")
        grown = worse(comparison, config.policy.compare)
        if grown:
            lost = [f"{c.key}: {c.before:,} units stuck then, {c.after:,} now, {count(c.newly_stuck):,} of them new"
                    for c in grown[:_NAMED]]  # fmt: skip
            lost += [f"and {number_of(len(grown) - _NAMED, 'more layer')}"] if len(grown) > _NAMED else []
            _say(f"{place} is better, so it was left as it is; --accept-worse replaces it", *lost)
            return ExitCode.FAILED
    _save(place, trimmed(record))
    return ExitCode.PASSED


def prune_baseline(source: Source, place: Path, *, quiet: bool, debug: bool) -> ExitCode:
    """Take what has healed out of a baseline."""
    config = settings(source.config, {"scan.data": source.data})
    old = read_report(place)
    _, record = _scan(source, config, quiet=quiet, debug=debug)
    comparison = compare(old, record)
    _refuse_other(place, comparison, "write it again instead")
    healed = sum(count(change.back) for change in comparison.layers)
    _save(place, trimmed(pruned(old, comparison.layers)))
    _say(f"{number_of(healed, 'unit')} came back, no longer accepted as stuck")
    return ExitCode.PASSED


def _scan(source: Source, config: Config, *, quiet: bool, debug: bool) -> tuple[str | None, Record]:
    if (source.report is None) == (source.model is None) and (source.report is not None or len(config.models) != 1):
        raise UsageError("name either a model or a report: deadcheck baseline write MODEL, or --report REPORT.json")
    if source.report is not None:
        how = source.reading
        refuse_measuring(
            {"data": source.data, "arch": how.arch, "arch_arg": how.arch_args, "allow_class": how.allow_classes,
             "key": how.key, "trust": how.trust}
        )  # fmt: skip
        record = read_report(source.report)
        name = record.model.path
    else:
        targets = targets_of([] if source.model is None else [source.model], config)
        if len(targets) != 1:
            raise UsageError(f"{len(targets)} models fit; name one, since each has a baseline of its own")
        name, record = targets[0].path, scanned(targets[0], Run(config, source.reading, None, quiet=quiet, debug=debug))
    if record.data.synthetic:
        raise NothingMeasured("a scan on random numbers is no baseline; give real samples with --data")
    if not record.sites or record.data.samples < record.thresholds.n_star:
        samples = number_of(record.data.samples, "sample")
        raise NothingMeasured(
            f"{number_of(len(record.sites), 'layer')} on {samples} are no baseline; it takes "
            f"{record.thresholds.n_star:,} samples to tell dead units"
        )
    return name, record


def _refuse_other(place: Path, comparison: Comparison, what_next: str) -> None:
    if comparison.obstacles:
        raise NothingMeasured(f"{place} cannot be compared with this scan: {comparison.obstacles[0]}; {what_next}")


def _save(place: Path, record: Record) -> None:
    write(str(place), REPORTS["json"]([Outcome(record.model.path, record)], RenderOptions()), "baseline")
    stuck = record.count(*STUCK)
    _say(f"{place}: {stuck:,} of {record.units:,} units ({percent(stuck, record.units)}) are accepted as stuck, in "
         f"{number_of(len(record.sites), 'layer')}")  # fmt: skip


def _say(head: str, *lines: str) -> None:
    print_text("".join(f"{shown(line)}\n" for line in (head, *(f"  {line}" for line in lines))))
