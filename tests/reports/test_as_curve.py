"""Pictures of a curve: in a terminal and as SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from deadcheck.curve import BINS, Curve, value_of
from deadcheck.patch_plan import Kind, Replacement
from deadcheck.reports import RenderOptions, as_curve, as_curve_svg

SVG = "{http://www.w3.org/2000/svg}"


def curve(counts: dict[int, int] | None = None, kind: Kind = Kind.LEAKY, alpha: float | None = 0.1) -> Curve:
    counts = {40: 30, 110: 10} if counts is None else counts
    bins = tuple(counts.get(i, 0) for i in range(BINS))
    return Curve("net<&>\x1b.pt", Replacement(kind, alpha), 2, 450, bins, 5, 7, 35, sum(bins) + 12)


@pytest.mark.parametrize("width", [60, 80, 140, 300])
@pytest.mark.parametrize("unicode", [True, False])
def test_the_drawing_fits_its_width(width: int, unicode: bool) -> None:
    text = as_curve.render(curve(), RenderOptions(width=width, unicode=unicode))

    assert all(len(line) <= width for line in text.split("\n"))
    assert "\x1b" not in text
    assert unicode or text.isascii()


def test_words_tell_the_shares() -> None:
    text = as_curve.render(curve(), RenderOptions(width=80))

    # 35 of 52 inputs are below 0; 5 lie left of the picture and 7 right of it.
    assert "67.3% of the inputs are below 0, where a ReLU gives 0 and lets no gradient\nthrough\n" in text
    assert "not shown: 9.6% below -5, 13.5% at 2 or above" in text


def test_bars_stand_where_the_inputs_are() -> None:
    # At 148 columns each character is one of the 140 bins: bar 40 is -3, bar 110 is 0.5.
    lines = as_curve.render(curve(), RenderOptions(width=148)).split("\n")
    bars = [line[7:] for line in lines if line.startswith("     │ ")][-5:]

    assert [line.find("█") for line in bars] == [40] * 5
    assert bars[-1][110] == "█"
    assert bars[-2][110] in "▅▆"  # a third of five rows is 1.67 rows


def test_a_steep_slope_is_drawn_whole() -> None:
    # 0.5 x is -2.5 at -5, so the picture is 4.5 tall: 220 from y = 50 on.
    root = ElementTree.fromstring(as_curve_svg.render(curve(alpha=0.5), RenderOptions()))
    _, leaky = (line.get("points", "").split() for line in root.iter(f"{SVG}polyline"))
    drawn = as_curve.render(curve(alpha=0.5), RenderOptions(width=80)).split("\n")[2:12]

    assert leaky[0] == "60.0,270.0"
    assert leaky[140] == "400.0,184.44"  # x = -1.5, so -0.75: 50 + 220 * 2.75 / 4.5 = 184.44
    assert drawn[-1][7] == "⣀"


def test_an_empty_picture_is_one_too() -> None:
    assert "█" not in as_curve.render(curve({}), RenderOptions(width=80))
    ElementTree.fromstring(as_curve_svg.render(curve({}), RenderOptions()))


def test_svg_is_well_formed_and_to_scale() -> None:
    root = ElementTree.fromstring(as_curve_svg.render(curve(), RenderOptions()))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill-opacity")]
    relu, leaky = (line.get("points", "").split() for line in root.iter(f"{SVG}polyline"))

    assert [bar.get("fill") for bar in bars] == ["#c0504d", "#4f81bd"]  # below 0, above 0
    assert float(bars[0].get("height", "0")) == pytest.approx(3 * float(bars[1].get("height", "0")), rel=1e-3)
    # The picture is 680 wide from x = 60 for 7 units: 0 stands at 60 + 5 * 680 / 7 = 545.71.
    assert relu[1].startswith("545.71,")
    assert leaky[0].split(",")[1] != relu[0].split(",")[1]
    assert "script" not in {element.tag.removeprefix(SVG) for element in root.iter()}


@pytest.mark.parametrize(
    ("kind", "alpha", "x", "y"),
    [(Kind.LEAKY, 0.1, -2, -0.2), (Kind.LEAKY, 0.1, 2, 2), (Kind.ELU, 1.0, -1, -0.6321206),
     (Kind.GELU, None, -1, -0.1586553),
     (Kind.SILU, None, -1, -0.2689414), (Kind.PRELU, 0.25, -4, -1)],
)  # fmt: skip
def test_values(kind: Kind, alpha: float | None, x: float, y: float) -> None:
    assert value_of(Replacement(kind, alpha), x) == pytest.approx(y, abs=1e-6)
