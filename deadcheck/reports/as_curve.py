"""The picture of a curve over the inputs of a model, in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import pairwise

from deadcheck.curve import BINS, HIGH, LOW, Curve
from deadcheck.reports.base import RenderOptions
from deadcheck.safe_text import shown
from deadcheck.shares import number_of, percent

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " .:-=+*#@"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character by row and column."""

_ROWS, _BAR_ROWS = 10, 5
_TOP = 2.0


def render(curve: Curve, options: RenderOptions) -> str:
    """Draw the curve and the distribution under it with characters."""
    width = max(30, min(options.width - 8, BINS))
    lines = [f"deadcheck plot alpha  {shown(curve.model, unicode=options.unicode)}", ""]
    lines += _drawing(curve, width, unicode=options.unicode)
    lines += _histogram(curve, width, unicode=options.unicode)
    lines += [_axis(width), ""]
    for line in words(curve):
        lines += textwrap.wrap(line, options.width, break_on_hyphens=False)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def words(curve: Curve) -> Iterator[str]:
    """Say what the picture shows."""
    below = percent(curve.negative, curve.total)
    sites = number_of(curve.sites, "site")
    yield f"above: {curve.replacement}; below: the inputs of {sites} over {number_of(curve.samples, 'sample')}"
    yield f"{below} of the inputs are below 0, where a ReLU gives 0 and lets no gradient through"
    outside = [
        f"{percent(count, curve.total)} {side}"
        for count, side in ((curve.below, f"below {LOW:g}"), (curve.above, f"at {HIGH:g} or above"))
        if count
    ]
    if outside:
        yield f"not shown: {', '.join(outside)}"


def _drawing(curve: Curve, width: int, *, unicode: bool) -> list[str]:
    """Draw the curve, four dots high and two wide to a character, or one where there is no braille."""
    down, across = (4, 2) if unicode else (1, 1)
    height, columns = _ROWS * down, width * across
    grid, tall = [[False] * columns for _ in range(height)], _TOP - curve.lowest
    before: int | None = None
    for column in range(columns):
        y = curve.value(LOW + (HIGH - LOW) * (column + 0.5) / columns)
        row = min(max(round((_TOP - y) / tall * (height - 1)), 0), height - 1)
        last = row if before is None else before
        for between in range(min(row, last), max(row, last) + 1):
            grid[between][column] = True
        before = row
    zero = round(_TOP / tall * (height - 1)) // down
    labels, border = {0: f"{_TOP:g}", zero: "0"}, "│" if unicode else "|"
    rows = (_line(grid[row * down : (row + 1) * down], unicode=unicode) for row in range(_ROWS))
    return [f"{labels.get(number, ''):>4} {border} {row}" for number, row in enumerate(rows)]


def _line(rows: list[list[bool]], *, unicode: bool) -> str:
    if not unicode:
        return "".join("*" if dot else " " for dot in rows[0])
    out = []
    for column in range(0, len(rows[0]), 2):
        bits = sum(_DOTS[r][c] for r in range(4) for c in range(2) if rows[r][column + c])
        out.append(chr(0x2800 + bits) if bits else " ")
    return "".join(out)


def _histogram(curve: Curve, width: int, *, unicode: bool) -> list[str]:
    borders = [i * BINS // width for i in range(width + 1)]
    # Where characters do not divide the bins evenly, each is weighed by the bins that it holds.
    parts = [curve.counts[a : max(b, a + 1)] for a, b in pairwise(borders)]
    heights = [sum(part) / len(part) for part in parts]
    top = max(heights) or 1.0
    bars = _BARS if unicode else _ASCII_BARS
    steps = len(bars) - 1
    lines = []
    for row in range(_BAR_ROWS, 0, -1):
        cells = []
        for height in heights:
            filled = height / top * _BAR_ROWS - (row - 1)
            level = min(max(round(filled * steps), 0), steps)
            cells.append(bars[level])
        lines.append(f"     {'│' if unicode else '|'} {''.join(cells)}")
    return lines


def _axis(width: int) -> str:
    line = [" "] * (width + 2)
    for x in range(int(LOW), int(HIGH) + 1):
        at = round((x - LOW) / (HIGH - LOW) * (width - 1))
        for i, character in enumerate(f"{x:d}"):
            if at + i < len(line):
                line[at + i] = character
    return "       " + "".join(line)
