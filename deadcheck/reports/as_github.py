"""GitHub annotations: workflow commands on stdout, no more of a level than a step may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from deadcheck.breach import Breach
from deadcheck.reports.base import Outcome, RenderOptions
from deadcheck.reports.locations import relative
from deadcheck.safe_text import shortened, shown

_MOST = 10
"""Annotations of one level that GitHub keeps of a step; it drops the rest without a word."""

_COMMANDS = {"error": "error", "inconclusive": "error", "warning": "warning", "note": "notice"}
_LONGEST = 4_000


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render findings as annotations of their model's file, the worst first; the last notice counts the rest."""
    commands: list[tuple[str, str]] = []
    for outcome in outcomes:
        if outcome.failure is not None:
            commands.append(("error", _command("error", outcome, outcome.status, outcome.failure.message)))
        commands += [_finding(outcome, item) for item in outcome.findings]
    room = Counter({"error": _MOST, "warning": _MOST, "notice": _MOST - 1})
    lines = []
    for level, line in commands:
        room[level] -= 1
        if room[level] >= 0:
            lines.append(line)
    if len(lines) < len(commands):
        lines.append(f"::notice title=deadcheck::{len(commands) - len(lines):,} more findings; the report has them all")
    return "".join(f"{line}\n" for line in lines)


def _finding(outcome: Outcome, item: Breach) -> tuple[str, str]:
    level = _COMMANDS[item.level] if item.active else "notice"
    why = "" if item.ignored is None else f" (ignored: {item.ignored.reason})"
    return level, _command(level, outcome, f"{item.rule} {item.id}".strip(), item.message + why)


def _command(level: str, outcome: Outcome, title: str, message: str) -> str:
    place = "" if outcome.model is None else f",file={_property(relative(outcome.model))}"
    return f"::{level} title={_property(f'deadcheck {title}')}{place}::{_data(message)}"


def _data(text: str) -> str:
    return shortened(shown(text), _LONGEST).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
