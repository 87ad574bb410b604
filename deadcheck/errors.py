"""What can go wrong, and the exit code that each failure stands for."""

import re
from enum import IntEnum, unique


@unique
class ExitCode(IntEnum):
    """The process exit codes of every deadcheck command."""

    PASSED = 0
    """Measured, and no rule failed."""

    FAILED = 1
    """Measured, and a rule failed."""

    ERROR = 2
    """Could not do the job: usage, config, unreadable file, mismatch, or a crash."""

    NOTHING_JUDGED = 3
    """Nothing to judge: no activation, no or too few samples; at a gate also random data, a baseline of other data."""

    REFUSED = 4
    """Refused: reading this would need trust."""

    INTERRUPTED = 130
    """Stopped by the user."""


class DeadcheckError(Exception):
    """Base of every error deadcheck raises on purpose; its text says what, where, and what to do next."""

    exit_code = ExitCode.ERROR


class UsageError(DeadcheckError):
    """The options do not fit together, or name something that does not exist."""


class ConfigError(DeadcheckError):
    """A configuration file is wrong."""


class ModelFileError(DeadcheckError):
    """The model file cannot be read as anything deadcheck knows."""


class ArchitectureError(DeadcheckError):
    """The architecture cannot be built, or does not fit the weights."""


class DataError(DeadcheckError):
    """The data cannot be read, or does not suit the model."""


class ForwardError(DeadcheckError):
    """The model's own forward pass raised."""


class ProbeError(DeadcheckError):
    """The probe was misused, by nesting two of them for example."""


class PatchError(DeadcheckError):
    """A patch cannot be made, read or applied."""


class NothingMeasured(DeadcheckError):
    """There was nothing to measure."""

    exit_code = ExitCode.NOTHING_JUDGED


class TrustRequired(DeadcheckError):
    """Reading the file would need trust that was not given."""

    exit_code = ExitCode.REFUSED


class ReportedElsewhere(DeadcheckError):
    """Another process reports for this one too: the first that torchrun started, or the one that joins the shards."""

    exit_code = ExitCode.PASSED


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none.

    One that tells a traceback, as those of TorchScript and of the workers of a DataLoader do, says why below that.
    """
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    if not any(_TOLD_TRACEBACK.match(line) for line in rest):
        return first
    raised = [line.partition(": ")[2] for line in rest if _RAISED.match(line)]
    return raised[-1] if raised else rest[-1]


_TOLD_TRACEBACK = re.compile("(Original )?Traceback ")
_RAISED = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt|Warning): .")


def internal_error(error: Exception) -> str:
    """Say that a fault is ours; what is not a DeadcheckError was not foreseen."""
    return f"internal error ({type(error).__name__}: {first_line(error)[:500]}); run again with --debug and report it"
