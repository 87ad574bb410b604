"""One finding of the gate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deadcheck.ranges import Ranges
from deadcheck.rules import BY_NAME

WEIGHTS = {"note": 0, "warning": 1, "error": 2, "inconclusive": 3}
"""Levels of a finding, the lightest first."""


@dataclass(frozen=True)
class Ignored:
    """Why a finding does not count."""

    reason: str
    until: str | None = None


@dataclass(frozen=True)
class Breach:
    """One finding of the gate: which rule, where, what was measured, what is allowed."""

    id: str
    """Name of the rule."""

    level: str
    """``error``, ``warning``, ``note``, or ``inconclusive`` for what keeps the gate from judging."""

    where: str
    """Site key; empty for the whole model."""

    message: str
    rule: str = ""
    """Code of the rule; empty for what the scan noticed and no rule judges."""

    count: int | None = None
    """Units that were found, of ``of``."""

    of: int | None = None
    limit: str | None = None
    """What is allowed, as ``5%``."""

    units: Ranges = ()
    ignored: Ignored | None = None

    @property
    def active(self) -> bool:
        """Whether it counts."""
        return self.ignored is None


def finding(rule: str, where: str, message: str, *, level: str = "error", **more: object) -> Breach:
    """Return what a rule found at a place, in words that name the place."""
    text = f"{where}: {message}" if where else message
    return replace(Breach(rule, level, where, text, BY_NAME[rule].code), **more)  # type: ignore[arg-type]
