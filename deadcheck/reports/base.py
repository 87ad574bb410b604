"""What every report takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from deadcheck.breach import Breach
from deadcheck.errors import ExitCode
from deadcheck.gate import GateResult
from deadcheck.record import Record
from deadcheck.rules import BY_NAME

_WORST = (
    ExitCode.INTERRUPTED, ExitCode.REFUSED, ExitCode.ERROR, ExitCode.FAILED, ExitCode.NOTHING_JUDGED, ExitCode.PASSED,
)  # fmt: skip
_STATUS = {
    ExitCode.PASSED: "pass",
    ExitCode.FAILED: "fail",
    ExitCode.NOTHING_JUDGED: "inconclusive",
    ExitCode.REFUSED: "refused",
}


@dataclass(frozen=True)
class RenderOptions:
    """How a report should look."""

    width: int = 120
    """Columns."""

    color: bool = False
    unicode: bool = True
    per_unit: bool = False
    """Every unit's numbers, where the format has room for them."""

    limit: int | None = None
    """Sites or findings shown, worst first; None for as many as the format holds well."""

    quiet: bool = False
    """What fails, and nothing else."""

    verbose: bool = False
    """Layers that passed, and notes, too."""

    exit_zero: bool = False
    """The process will exit with 0 where a rule failed."""


@dataclass(frozen=True)
class Failure:
    """Why a model could not be measured or judged."""

    code: ExitCode
    message: str


@dataclass(frozen=True)
class Outcome:
    """What became of one model."""

    model: str | None
    """As the user named it; None for a live module."""

    record: Record | None = None
    gate: GateResult | None = None
    """None where nothing was judged: a scan, or a failure."""

    failure: Failure | None = None

    @property
    def code(self) -> ExitCode:
        """The exit code that it stands for."""
        if self.failure is not None:
            return self.failure.code
        return ExitCode.PASSED if self.gate is None else self.gate.exit_code

    @property
    def status(self) -> str:
        """As the JSON report spells it."""
        return _STATUS.get(self.code, "error")

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.model or "live module"

    @property
    def findings(self) -> tuple[Breach, ...]:
        """What the gate found, or where there was none, what the scan noticed."""
        if self.gate is not None:
            return self.gate.findings
        noticed = () if self.record is None else self.record.findings
        return tuple(Breach(f.id, f.level, f.where, f.message, code_of(f.id)) for f in noticed)


Render = Callable[[Sequence[Outcome], RenderOptions], str]


def code_of(name: str) -> str:
    """Return the code of the rule with this name; empty when no rule judges it."""
    return BY_NAME[name].code if name in BY_NAME else ""


def worst_code(outcomes: Iterable[Outcome], options: RenderOptions) -> ExitCode:
    """Return the exit code of a run over several models: 4 before 2, 1, 3 and 0."""
    codes = [outcome.code for outcome in outcomes]
    code = min(codes, key=_WORST.index, default=ExitCode.PASSED)
    return ExitCode.PASSED if options.exit_zero and code is ExitCode.FAILED else code


def status_of(code: ExitCode) -> str:
    """Return the JSON report's word for an exit code."""
    return _STATUS.get(code, "error")
