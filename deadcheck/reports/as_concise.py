"""One line a finding, for grep and for editors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deadcheck.reports.base import Outcome, RenderOptions
from deadcheck.safe_text import inert, shown


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render ``MODEL: RULE LEVEL MESSAGE`` for every finding; nothing where there is none."""
    lines = [shown(line, unicode=options.unicode) for outcome in outcomes for line in _lines(outcome, options)]
    return inert("".join(f"{line}\n" for line in lines))


def _lines(outcome: Outcome, options: RenderOptions) -> Iterator[str]:
    if outcome.failure is not None:
        # A failure's message usually begins with the file.
        message = outcome.failure.message.removeprefix(f"{outcome.name}: ").replace("\n", "; ")
        yield f"{outcome.name}: {outcome.status} {message}"
    for item in outcome.findings:
        fails = item.active and item.level in ("error", "inconclusive")
        if (options.quiet and not fails) or (item.level == "note" and not options.verbose):
            continue
        why = "" if item.ignored is None else f" (because {item.ignored.reason})"
        level = item.level if item.active else "ignored"
        yield f"{outcome.name}: {item.rule or item.id} {level} {item.message}{why}"
