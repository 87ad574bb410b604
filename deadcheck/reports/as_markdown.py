"""Markdown for a step summary or a comment on a merge request, within the hosts' size limits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from deadcheck.breach import Breach
from deadcheck.diagnosis import Verdict
from deadcheck.errors import ExitCode
from deadcheck.record import Record
from deadcheck.reports.base import Outcome, RenderOptions
from deadcheck.safe_text import shortened, shown
from deadcheck.shares import number_of, percent

_MOST_BYTES = 60_000
"""A comment may have 65,536 characters; a step summary 1 MiB."""

_LAYERS = 25
_NAME = 120
_MARKS = {"error": "❌", "inconclusive": "❔", "warning": "⚠️", "note": "💬"}
_ANSWERS = {
    ExitCode.PASSED: "✅ passed",
    ExitCode.FAILED: "❌ failed",
    ExitCode.NOTHING_JUDGED: "❔ not judged",
    ExitCode.REFUSED: "⛔ refused",
}
_PLAIN = re.compile(r"[\w ,.;:%()'/=|+-]*", re.ASCII)


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render what became of some models; what does not fit is counted at the end."""
    rows = [(outcome, row) for outcome in outcomes for row in _rows(outcome)]
    heads = {id(outcome): list(_head(outcome)) for outcome in outcomes}
    layers = {id(outcome): list(_layers(outcome, options)) for outcome in outcomes}
    room = _MOST_BYTES - sum(len(line.encode()) + 1 for lines in heads.values() for line in lines) - 200
    out: list[str] = []
    left = 0
    for outcome in outcomes:
        out += heads[id(outcome)]
        own = [row for other, row in rows if other is outcome]
        if own:
            out += ["| | rule | layer | finding |", "|---|---|---|---|"]
        for row in own:
            room -= len(row.encode()) + 1
            if room > 0:
                out.append(row)
            else:
                left += 1
        room -= sum(len(line.encode()) + 1 for line in layers[id(outcome)])
        if room > 0:
            out += layers[id(outcome)]
        out.append("")
    if left:
        out.append(f"{left:,} more findings do not fit here; the JSON report has them all.")
    # Two line ends: a host may append to a summary, and what follows a tag without a blank line is part of it.
    return "\n".join(out).rstrip() + "\n\n"


def _head(outcome: Outcome) -> Iterator[str]:
    answer = _ANSWERS.get(outcome.code, "❌ error")
    if outcome.gate is None and outcome.failure is None:
        answer = "measured"
    yield f"## deadcheck: {code_span(outcome.name)} {answer}"
    yield ""
    if outcome.failure is not None:
        yield prose(outcome.failure.message)
    record = outcome.record
    if record is None:
        return
    judged = len(record.sites) if outcome.gate is None else outcome.gate.judged
    parts = [
        f"{number_of(judged, 'layer')} on {number_of(record.data.samples, 'sample')} of {code_span(record.data.source)}"
    ]
    if outcome.gate is not None and outcome.gate.baseline:
        parts.append(f"against {code_span(outcome.gate.baseline)}")
    yield ", ".join(parts)
    yield ""


def _rows(outcome: Outcome) -> Iterator[str]:
    for item in outcome.findings:
        mark = _MARKS[item.level] if item.active else "💤"
        rule = f"{item.rule} {item.id}" if item.rule else item.id
        yield f"| {mark} | {prose(rule)} | {code_span(item.where) if item.where else ''} | {prose(_words(item))} |"


def _words(item: Breach) -> str:
    message = item.message.removeprefix(f"{item.where}: ")
    if item.ignored is None:
        return message
    until = f", until {item.ignored.until}" if item.ignored.until else ""
    return f"{message} (ignored: {item.ignored.reason}{until})"


def _layers(outcome: Outcome, options: RenderOptions) -> Iterator[str]:
    record = outcome.record
    if record is None or not record.sites:
        return
    most = options.limit or _LAYERS
    yield ""
    yield f"<details><summary>{_total(record)}</summary>"
    yield ""
    yield "| layer | activation | units | dead | silent | negative only |"
    yield "|---|---|---:|---:|---:|---:|"
    for site in record.worst()[:most]:
        numbers = [
            f"{number:,} ({percent(number, site.units)})" if number else "0"
            for number in (site.count(v) for v in (Verdict.DEAD, Verdict.SILENT, Verdict.NEGATIVE_ONLY))
        ]
        yield f"| {code_span(site.key)} | {code_span(site.activation)} | {site.units:,} | {' | '.join(numbers)} |"
    yield ""
    if len(record.sites) > most:
        yield f"{len(record.sites) - most:,} more layers, with a smaller share each."
        yield ""
    yield "</details>"


def _total(record: Record) -> str:
    dead = record.count(Verdict.DEAD)
    return f"{dead:,} of {record.units:,} units are dead ({percent(dead, record.units)})".replace("<", "&lt;").replace(
        ">", "&gt;"
    )


def prose(text: str) -> str:
    """Return text that Markdown shows as it is written: plain words as they are, anything else as code."""
    if _PLAIN.fullmatch(text) and "www." not in text and "://" not in text:
        return text.replace("|", "\\|").replace("_", "\\_")
    return code_span(text, 2_000)


def code_span(text: str, most: int = _NAME) -> str:
    """Return a code span that holds any text: no markup, no mention and no link is read in it."""
    text = shortened(shown(text), most).replace("|", "\\|") or " "
    ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"
