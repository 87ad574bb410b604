"""The gate's answer for a person, at a terminal or in a CI log: what failed, where, and what it comes to."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from deadcheck.breach import Breach
from deadcheck.errors import ExitCode
from deadcheck.ranges import count, listed
from deadcheck.record import STUCK, Record
from deadcheck.reports.base import Outcome, RenderOptions, worst_code
from deadcheck.safe_text import inert, shown
from deadcheck.shares import number_of, percent

_MOST = 30
"""Findings that are spelled out for one model when no limit is given."""

_WORDS = {
    ExitCode.PASSED: "PASSED",
    ExitCode.FAILED: "FAILED",
    ExitCode.NOTHING_JUDGED: "NOT JUDGED",
    ExitCode.REFUSED: "REFUSED",
}
_LABELS = {"error": "error", "inconclusive": "no proof", "warning": "warning", "note": "note"}
_COLORS = {"error": "31", "inconclusive": "35", "warning": "33", "note": "2", "ignored": "2"}
_ANSWER = {ExitCode.PASSED: "1;32", ExitCode.NOTHING_JUDGED: "1;35"}


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render what became of some models, one after another, and of all of them together."""
    page = _Page(options)
    blocks = [block for outcome in outcomes if (block := list(page.model(outcome)))]
    if len(outcomes) > 1 and not (options.quiet and worst_code(outcomes, options) is ExitCode.PASSED):
        blocks.append([page.together(outcomes)])
    text = inert("\n\n".join("\n".join(block) for block in blocks))
    text = f"{text}\n" if text else ""
    return text if options.unicode else text.encode("ascii", "backslashreplace").decode("ascii")


class _Page:
    def __init__(self, options: RenderOptions) -> None:
        self._options = options

    def model(self, outcome: Outcome) -> Iterator[str]:
        """Yield the lines about one model; none for one that passed where only failures are wanted."""
        if self._options.quiet and outcome.code is ExitCode.PASSED:
            return
        yield self._painted(self._shown(outcome.name), "1")
        if outcome.record is None:
            message = "" if outcome.failure is None else outcome.failure.message
            yield from self._wrapped("  ", self._shown(message))
        else:
            if not self._options.quiet:
                yield self._painted(self._shown(f"  {_head(outcome, outcome.record)}"), "2")
            yield from self._findings(outcome.findings)
            if self._options.verbose:
                yield from self._layers(outcome.record)
        yield self._answer(outcome)

    def together(self, outcomes: Sequence[Outcome]) -> str:
        """Return the line about all models."""
        codes = Counter(outcome.code for outcome in outcomes)
        parts = [f"{number} {_WORDS.get(code, 'ERROR').lower()}" for code, number in sorted(codes.items())]
        return f"{len(outcomes)} models: {', '.join(parts)}"

    def _findings(self, findings: Sequence[Breach]) -> Iterator[str]:
        chosen = [item for item in findings if item.active and item.level != "note"]
        if self._options.quiet:
            chosen = [item for item in chosen if item.level != "warning"]
        else:
            chosen += [item for item in findings if not item.active]
        if self._options.verbose:
            chosen += [item for item in findings if item.active and item.level == "note"]
        most = self._options.limit or _MOST
        for item in chosen[:most]:
            label, color = (_LABELS[item.level], item.level) if item.active else ("ignored", "ignored")
            head = f"  {label:<8} {item.rule or '-':<5}  "
            lines = list(self._wrapped(head, self._shown(item.message)))
            yield self._painted(lines[0][: len(head)], _COLORS[color]) + lines[0][len(head) :]
            yield from lines[1:]
            if item.active and 0 < count(item.units) < (item.of or 0):
                yield from self._wrapped(" " * len(head), listed(item.units))
            if item.ignored is not None:
                until = f", until {item.ignored.until}" if item.ignored.until else ""
                yield from self._wrapped(" " * len(head), self._shown(f"because {item.ignored.reason}{until}"))
        if len(chosen) > most:
            rest = Counter(item.rule or item.id for item in chosen[most:])
            named = ", ".join(f"{number:,} {rule}" for rule, number in sorted(rest.items()))
            yield f"  and {len(chosen) - most:,} more: {named} (--limit shows more, the JSON report has all)"

    def _layers(self, record: Record) -> Iterator[str]:
        for site in record.worst()[: self._options.limit or None]:
            stuck = site.count(*STUCK)
            yield f"  {self._shown(site.key)}: {stuck:,} of {site.units:,} units stuck ({percent(stuck, site.units)})"

    def _answer(self, outcome: Outcome) -> str:
        word = _WORDS.get(outcome.code, "ERROR")
        if outcome.gate is None and outcome.failure is None:
            word = "MEASURED"
        gate = outcome.gate
        parts = []
        if gate is not None:
            ignored = sum(not item.active for item in gate.findings)
            for number, name in ((gate.number("error"), "error"), (gate.number("warning"), "warning")):
                parts += [number_of(number, name)] if number else []
            parts += [f"{ignored:,} ignored"] if ignored else []
            codes = [item.rule for item in gate.findings if item.active and item.level in ("error", "inconclusive")]
            parts += [f"'deadcheck rule {codes[0]}' says more"] if codes else []
        return self._painted(word, _ANSWER.get(outcome.code, "1;31")) + (f"  {', '.join(parts)}" if parts else "")

    def _wrapped(self, head: str, text: str) -> Iterator[str]:
        room = max(self._options.width - len(head), 20)
        lines = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        yield head + lines[0]
        for line in lines[1:]:
            yield " " * len(head) + line

    def _shown(self, text: str) -> str:
        return shown(text, unicode=self._options.unicode)

    def _painted(self, text: str, color: str) -> str:
        return f"\x1b[{color}m{text}\x1b[0m" if self._options.color else text


def _head(outcome: Outcome, record: Record) -> str:
    judged = len(record.sites) if outcome.gate is None else outcome.gate.judged
    parts = [f"{number_of(judged, 'layer')} on {number_of(record.data.samples, 'sample')} of {record.data.source}"]
    if outcome.gate is not None and outcome.gate.baseline:
        parts.append(f"against {outcome.gate.baseline}")
    return ", ".join(parts)
