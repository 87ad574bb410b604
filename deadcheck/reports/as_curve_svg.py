"""The picture of a curve over the inputs of a model, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from deadcheck.curve import BINS, HIGH, LOW, Curve
from deadcheck.reports.as_curve import words
from deadcheck.reports.base import RenderOptions
from deadcheck.safe_text import shown

_TOP = 2.0
_WIDTH, _HEIGHT, _LEFT, _RIGHT = 760, 460, 60, 20
_CURVE_TOP, _CURVE_BOTTOM, _BARS_TOP, _BARS_BOTTOM = 50, 270, 290, 390


def render(curve: Curve, options: RenderOptions) -> str:
    """Draw the curve above the inputs, with no script, font or file from elsewhere."""
    title = escape(shown(f"{curve.replacement} over the inputs of {curve.model}"))
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="28" font-size="15">{title}</text>',
        *_grid(curve),
        *_bars(curve),
        *_curves(curve),
    ]
    for number, line in enumerate(words(curve)):
        parts.append(f'<text x="{_LEFT}" y="{_BARS_BOTTOM + 36 + 15 * number}" fill="#444">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(value: float) -> float:
    return round(_LEFT + (value - LOW) / (HIGH - LOW) * (_WIDTH - _LEFT - _RIGHT), 2)


def _y(value: float, curve: Curve) -> float:
    share = (_TOP - value) / (_TOP - curve.lowest)
    return round(_CURVE_TOP + share * (_CURVE_BOTTOM - _CURVE_TOP), 2)


def _grid(curve: Curve) -> Iterator[str]:
    for x in range(int(LOW), int(HIGH) + 1):
        at, color = _x(x), "#999" if x == 0 else "#e4e4e4"
        yield f'<line x1="{at}" y1="{_CURVE_TOP}" x2="{at}" y2="{_BARS_BOTTOM}" stroke="{color}"/>'
        yield f'<text x="{at}" y="{_BARS_BOTTOM + 16}" text-anchor="middle" fill="#444">{x}</text>'
    for y in range(math.ceil(curve.lowest), 3):
        color = "#999" if y == 0 else "#e4e4e4"
        yield f'<line x1="{_LEFT}" y1="{_y(y, curve)}" x2="{_WIDTH - _RIGHT}" y2="{_y(y, curve)}" stroke="{color}"/>'
        yield f'<text x="{_LEFT - 8}" y="{_y(y, curve) + 4}" text-anchor="end" fill="#444">{y}</text>'
    yield f'<line x1="{_LEFT}" y1="{_BARS_BOTTOM}" x2="{_WIDTH - _RIGHT}" y2="{_BARS_BOTTOM}" stroke="#999"/>'
    middle = (_BARS_TOP + _BARS_BOTTOM) // 2
    yield f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end" fill="#444">inputs</text>'


def _bars(curve: Curve) -> Iterator[str]:
    top = max(curve.counts, default=0) or 1
    step = (HIGH - LOW) / BINS
    for number, count in enumerate(curve.counts):
        if count:
            start = LOW + number * step
            height = round(count / top * (_BARS_BOTTOM - _BARS_TOP), 2)
            color = "#c0504d" if start < 0 else "#4f81bd"
            place = f'x="{_x(start)}" y="{round(_BARS_BOTTOM - height, 2)}"'
            size = f'width="{round(_x(start + step) - _x(start), 2)}" height="{height}"'
            yield f'<rect {place} {size} fill="{color}" fill-opacity="0.75"/>'


def _curves(curve: Curve) -> Iterator[str]:
    relu = f"{_x(LOW)},{_y(0, curve)} {_x(0)},{_y(0, curve)} {_x(HIGH)},{_y(HIGH, curve)}"
    yield f'<polyline points="{relu}" fill="none" stroke="#888" stroke-width="1.5" stroke-dasharray="5 4"/>'
    xs = [LOW + (HIGH - LOW) * i / 280 for i in range(281)]
    points = " ".join(f"{_x(x)},{_y(curve.value(x), curve)}" for x in xs)
    yield f'<polyline points="{points}" fill="none" stroke="#1f4e79" stroke-width="2.5"/>'
    yield f'<text x="{_LEFT + 10}" y="{_CURVE_TOP + 16}" fill="#1f4e79">{escape(str(curve.replacement))}</text>'
    yield f'<text x="{_LEFT + 10}" y="{_CURVE_TOP + 32}" fill="#888">relu (dashed)</text>'
