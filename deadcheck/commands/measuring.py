"""Scans the models that a command was given; one that fails does not stop the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deadcheck.commands.inputs import Target, keywords, targets_of
from deadcheck.commands.output import progress
from deadcheck.commands.printing import print_note
from deadcheck.config import Config
from deadcheck.errors import DeadcheckError, ExitCode, ReportedElsewhere, UsageError, internal_error
from deadcheck.record import Record
from deadcheck.reports import Failure, Outcome
from deadcheck.shard import WHOLE, Shard

if TYPE_CHECKING:
    from deadcheck.formats import LoadOptions


@dataclass(frozen=True)
class Reading:
    """What the command line says about reading a model; trust is given here and nowhere else."""

    arch: str | None
    arch_args: Sequence[str]
    allow_classes: Sequence[str]
    key: str | None
    trust: bool = False

    def options(self, target: Target) -> LoadOptions:
        """Return what is said of one model, here before the configuration."""
        from deadcheck.formats import LoadOptions

        return LoadOptions(
            arch=self.arch or target.arch,
            arch_args=keywords(self.arch_args) or (target.arch_args if self.arch is None else {}),
            allow_classes=tuple(self.allow_classes),
            key=self.key or target.key,
            trust=self.trust,
        )


@dataclass(frozen=True)
class Run:
    """What holds for every model of one run."""

    config: Config
    reading: Reading
    baseline: Path | None
    """From the command line; it stands before those of the configuration."""

    shard: Shard = WHOLE
    checkpoint: Path | None = None
    per_unit: bool = False
    quiet: bool = False
    debug: bool = False


def scans(models: Sequence[Path], run: Run) -> Iterator[Outcome]:
    """Yield the outcome of every model that was named, or that the configuration names."""
    targets = targets_of(models, run.config)
    if run.checkpoint is not None and len(targets) > 1:
        raise UsageError(f"--checkpoint keeps one scan, and there are {len(targets)} models; name one")
    for target in targets:
        try:
            yield attempted(target.path, partial(_scan, target, run), debug=run.debug)
        except ReportedElsewhere as told:
            if run.checkpoint is not None:
                print_note(str(told))


def _scan(target: Target, run: Run) -> Outcome:
    return Outcome(target.path, scanned(target, run))


def scanned(target: Target, run: Run) -> Record:
    """Scan one model; a DeadcheckError says why it cannot be."""
    from deadcheck import pipeline
    from deadcheck.heap import collect_as_usual, keep_freed_memory
    from deadcheck.record import record_of

    collect_as_usual()
    keep_freed_memory()
    load, path = run.reading.options(target), Path(target.path)
    # What the user's code prints is not the report.
    with redirect_stdout(sys.stderr), progress(path.name, quiet=run.quiet) as advance:
        if run.shard != WHOLE and run.checkpoint is None:  # torchrun's
            diagnosis = pipeline.scan_together(path, load, target.config, run.shard, advance)
        else:
            diagnosis = pipeline.scan_file(
                path, load, target.config, advance, shard=run.shard, checkpoint=run.checkpoint
            )
    record = record_of(diagnosis, per_unit=run.per_unit)
    if record.run is not None and record.run.note is not None and not run.quiet:
        print_note(f"{target.path}: {record.run.note}")
    return record


def joined(paths: Sequence[Path], config: Config, *, per_unit: bool) -> Outcome:
    """Join what the shards of one scan counted."""
    from deadcheck import parts
    from deadcheck.diagnosis import diagnose
    from deadcheck.record import record_of

    seen = parts.merged([(str(path), parts.load(path)) for path in paths])
    return Outcome(seen.model.path, record_of(diagnose(seen, config.thresholds), per_unit=per_unit))


def attempted(name: str | None, work: Callable[[], Outcome], *, debug: bool) -> Outcome:
    """Return the outcome of some work on one model, or why there is none."""
    try:
        return work()
    except DeadcheckError as error:
        if debug or isinstance(error, ReportedElsewhere):
            raise
        return Outcome(name, failure=Failure(error.exit_code, str(error)))
    except Exception as error:  # a fault of ours in one model must not hide what the others came to
        if debug:
            raise
        return Outcome(name, failure=Failure(ExitCode.ERROR, internal_error(error)))
