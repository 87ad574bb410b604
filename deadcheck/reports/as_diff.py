"""What changed between two scans: for a terminal, for a program, for a comment."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deadcheck import __version__
from deadcheck.comparison import Comparison, LayerChange
from deadcheck.errors import ExitCode
from deadcheck.ranges import count, listed
from deadcheck.reports.as_markdown import code_span
from deadcheck.reports.base import RenderOptions, status_of
from deadcheck.safe_text import inert, shortened, shown
from deadcheck.shares import number_of, percent

_MOST = 30


@dataclass(frozen=True)
class Diff:
    """Two reports and how they compare."""

    old: str
    new: str
    comparison: Comparison

    @property
    def code(self) -> ExitCode:
        """What it comes to: a difference that means nothing is not one."""
        return ExitCode.NOTHING_JUDGED if self.comparison.obstacles else ExitCode.PASSED

    @property
    def changed(self) -> list[LayerChange]:
        """Layers with any change, the one that lost the largest share first."""
        moved = [change for change in self.comparison.layers if change.newly_stuck or change.back or _grew(change)]
        return sorted(moved, key=lambda change: -_grew(change) / change.units)


def _grew(change: LayerChange) -> int:
    return change.after - change.before


def as_text(diff: Diff, options: RenderOptions) -> str:
    """Render a diff for a person."""

    def spelled(text: str) -> str:
        return shown(text, unicode=options.unicode)

    lines = [spelled(f"{diff.old} -> {diff.new}")]
    lines += [f"cannot be compared: {spelled(obstacle)}" for obstacle in diff.comparison.obstacles]
    lines += [f"note: {spelled(note)}" for note in diff.comparison.notes]
    changed = diff.changed
    chosen = changed[: options.limit or _MOST]
    if chosen:
        lines += ["", *_columns(chosen, options)]
    if len(chosen) < len(changed):
        lines.append(f"and {number_of(len(changed) - len(chosen), 'more layer')} (--limit shows more)")
    same = len(diff.comparison.layers) - len(changed)
    new, back = (sum(count(getattr(c, name)) for c in changed) for name in ("newly_stuck", "back"))
    lines += ["", f"{number_of(new, 'unit')} newly stuck, {back:,} came back; {number_of(same, 'layer')} unchanged"]
    text = inert("\n".join(line.rstrip() for line in lines)) + "\n"
    return text if options.unicode else text.encode("ascii", "backslashreplace").decode("ascii")


def _columns(changes: Sequence[LayerChange], options: RenderOptions) -> list[str]:
    head = ("layer", "units", "stuck then", "stuck now", "newly", "back")
    rows = [
        (
            shortened(shown(change.key, unicode=options.unicode), max(16, options.width - 70)),
            f"{change.units:,}",
            f"{change.before:,} {percent(change.before, change.units):>6}",
            f"{change.after:,} {percent(change.after, change.units):>6}",
            f"{count(change.newly_stuck):,}",
            f"{count(change.back):,}",
        )
        for change in changes
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "   ".join((cells[0].ljust(widths[0]), *numbers))

    lines = [line(head)]
    for change, row in zip(changes, rows, strict=True):
        lines.append(line(row))
        if change.newly_stuck and count(change.newly_stuck) < change.units:
            lines.append(f"    newly stuck: {listed(change.newly_stuck)}")
    return lines


def as_markdown(diff: Diff, options: RenderOptions) -> str:
    """Render a diff for a comment on a merge request."""
    lines = [f"## deadcheck: {code_span(diff.old)} → {code_span(diff.new)}", ""]
    lines += [f"- cannot be compared: {code_span(obstacle)}" for obstacle in diff.comparison.obstacles]
    lines += [f"- note: {code_span(note)}" for note in diff.comparison.notes]
    changed = diff.changed
    if changed:
        lines += ["", "| layer | units | stuck then | stuck now | newly | back |", "|---|---:|---:|---:|---:|---:|"]
    for change in changed[: options.limit or _MOST]:
        lines.append(
            f"| {code_span(change.key)} | {change.units:,} | {change.before:,} | {change.after:,} | "
            f"{count(change.newly_stuck):,} | {count(change.back):,} |"
        )
    left = len(changed) - len(changed[: options.limit or _MOST])
    same = len(diff.comparison.layers) - len(changed)
    lines += ["", f"{number_of(same, 'layer')} unchanged" + (f", {left:,} more changed" if left else "") + "."]
    return "\n".join(lines) + "\n"


def as_json(diff: Diff, options: RenderOptions) -> str:
    """Render a diff for a program; ranges of units are inclusive."""
    comparison = diff.comparison
    document = {
        "schema_version": "1.0",
        "tool": {"name": "deadcheck", "version": __version__},
        "status": status_of(diff.code),
        "exit_code": int(diff.code),
        "old": diff.old,
        "new": diff.new,
        "obstacles": comparison.obstacles,
        "notes": comparison.notes,
        "lost": comparison.lost,
        "layers": [
            {
                "key": c.key, "units": c.units, "stuck_then": c.before, "stuck_now": c.after, "off_now": c.off,
                "newly_off": c.newly_off, "newly_stuck": c.newly_stuck, "back": c.back,
            }
            for c in comparison.layers
        ],
        "error": None,
    }  # fmt: skip
    return json.dumps(document, indent=1, ensure_ascii=True) + "\n"


DIFFS: dict[str, Callable[[Diff, RenderOptions], str]] = {
    "text": as_text,
    "json": as_json,
    "markdown": as_markdown,
}
"""Name, as ``-f`` takes it -> the function that renders it."""
