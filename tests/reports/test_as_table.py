"""The terminal table: golden output, and that it holds its width and its words whatever the names are.

DEADCHECK_UPDATE_GOLDEN=1 writes the golden files anew; look at the difference before it is committed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len

from deadcheck.reports import REPORTS, RenderOptions
from deadcheck.reports.strip import legend, strip
from deadcheck.safe_text import shown
from deadcheck.shares import percent
from deadcheck.sites import Family, Measurement, Skipped
from tests.records import input_summary, measurement, outcome, site_stats

GOLDEN = Path(__file__).parent.parent / "golden"
HOSTILE = [
    "[red]x[/red]",
    "\x1b[31mred",
    "two\nlines",
    "\u202egnp.exe",
    "\ud800",
    "caf\u00e9",
    "\u5c42" * 60,
    "a" * 300,
]


def table(seen: Measurement, **options: Any) -> str:
    return REPORTS["table"]([outcome(seen)], RenderOptions(**options))


def sick_model() -> Measurement:
    """A model with some of everything."""
    return measurement(
        site_stats("features.1", units=64),
        site_stats("features.4", units=256, off=[*range(40, 130), 200, 255], output_abs_sum=[1.0] * 3 + [300.0] * 253),
        site_stats("classifier.residual.block.17.activation#2", units=1024, samples=120, off=[3, 900]),
        site_stats("encoder.0:gelu#1", units=48, family=Family.SMOOTH, input_max=[-1.0] * 20 + [1.0] * 28,
                   site={"activation": "gelu"}),
        site_stats("gate", units=10, family=Family.SQUASHING, flat=[1000] + [0] * 9, nonfinite=[0] * 9 + [2],
                   site={"activation": "hardsigmoid"}),
        site_stats("head.1", units=8, off=range(8)),
        skipped=tuple(Skipped("aten.where", f"block.{i}", "looks like an activation, not measured") for i in range(6)),
        inputs=(input_summary(),),
        warnings=("the axis of gate was guessed; set it with --units",),
    )  # fmt: skip


@pytest.mark.parametrize("unicode", [True, False], ids=["unicode", "ascii"])
@pytest.mark.parametrize("width", [80, 140])
def test_the_table_is_the_golden_one(width: int, unicode: bool) -> None:
    text = table(sick_model(), width=width, unicode=unicode)
    golden = GOLDEN / f"table_{width}_{'unicode' if unicode else 'ascii'}.txt"
    if os.environ.get("DEADCHECK_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")

    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [60, 80, 99, 100, 140])
def test_no_line_is_wider_than_asked(width: int, unicode: bool) -> None:
    big = site_stats("a.very.long.name.of.a.module.in.a.deep.model", units=3_000_000, samples=300, off=range(7))
    text = table(measurement(big, *sick_model().sites), width=width, unicode=unicode)

    assert max(cell_len(line) for line in text.splitlines()) <= width
    if width >= 80:
        assert re.search(r"a\.v.*el .* 3,000,000 .* 7 +<0.1% .* 40.0% ", text)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [80, 140])
def test_hostile_names_are_shown_escaped_in_one_line(name: str, unicode: bool, width: int) -> None:
    seen = measurement(
        site_stats(name, off=range(4), site={"activation": name}),
        skipped=(Skipped(name, name, name),),
        warnings=(name,),
    )
    text = table(seen, width=width, unicode=unicode)
    rows = [line for line in text.splitlines() if re.search(r"4 +\|? *4 +100% ", line)]

    assert len(rows) == 1
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    if not unicode:
        assert text.isascii()


def test_markup_is_shown_as_it_is_written() -> None:
    assert "[red]x[/red]" in table(measurement(site_stats("[red]x[/red]")), color=True)


def test_long_names_keep_both_ends() -> None:
    name = "encoder.layers.0." + "deep." * 30 + "activation#7"

    row = next(line for line in table(measurement(site_stats(name)), width=80).splitlines() if "#7" in line)
    assert re.match(r" encoder\.lay[a-z.]*…[a-z.]*activation#7 ", row)
    assert "..." in table(measurement(site_stats(name)), width=80, unicode=False)


def test_colour_adds_nothing_but_colour() -> None:
    plain, colored = table(sick_model()), table(sick_model(), color=True)

    assert "\x1b[" in colored
    assert "\x1b" not in plain
    without = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert [line.rstrip() for line in without.splitlines()] == plain.splitlines()


def test_the_worst_layer_comes_first_and_a_limit_is_said() -> None:
    seen = measurement(site_stats("good"), site_stats("bad", off=[0, 1, 2]), site_stats("middling", off=[0]))
    text = table(seen, limit=2)

    assert text.index(" bad ") < text.index(" middling ")
    assert " good " not in text
    assert "not shown: 1 more (--limit)" in text


def test_printed_parts_add_up_to_printed_totals() -> None:
    text = table(sick_model(), width=140)
    row = re.compile(r"  (?:relu|gelu|hardsigmoid) +([\d,]+) +(?:([\d,]+) +[<>\d.]+%|-) +([\d,]+|-) ")
    found = [tuple(int(n.replace(",", "").strip("-") or 0) for n in numbers) for numbers in row.findall(text)]
    units, dead, silent = map(sum, zip(*found, strict=True))

    assert len(found) == 6
    assert f"{dead:,} of {units:,} units are dead (" in text
    assert f", {silent:,} more never fired" in text
    depths = re.findall(r"(\d+) (?:deep|mid|shallow)\b", text)
    assert sum(map(int, depths)) == dead + silent


def test_units_whose_depth_is_unknown_are_counted_too() -> None:
    stats = site_stats(
        off=[0, 1], input_max=[-1, 0, 1, 1], silent_input_sum=[-3000, 0, 0, 0],
        silent_input_square_sum=[10_000, 0, 0, 0],
    )  # fmt: skip

    assert "0 deep, 1 mid, 0 shallow, 1 without spread" in table(measurement(stats))


def test_the_bound_is_that_of_the_layers_with_dead_units() -> None:
    # A branch that saw 20 samples has no dead unit, and so no part in "each fires in fewer than".
    text = table(measurement(site_stats("trunk", off=[0]), site_stats("branch", samples=20)))

    assert "each fires in fewer than 0.003 of such samples (95% sure)" in text


def test_many_findings_of_a_kind_are_counted() -> None:
    text = table(measurement(*(site_stats(f"layer{i}", off=range(4)) for i in range(20))))

    assert text.count("no unit ever fired") == 4
    assert "ERROR: the same in 16 more: layer4, layer5, layer6, layer7 and 12 more" in text


def test_many_skips_and_notes_are_counted() -> None:
    text = table(measurement(site_stats(), skipped=tuple(Skipped("op", f"m{i}", "unknown") for i in range(9)),
                             warnings=tuple(f"guess {i}" for i in range(30))))  # fmt: skip

    assert "  op in m0, m1, m2, m3 and 5 more: unknown\n" in text
    assert text.count("note: guess") == 8
    assert "and 22 more notes" in text


def test_a_healthy_model_reads_well() -> None:
    text = table(measurement(site_stats(), inputs=(input_summary(),)))

    assert "0 of 4 units are dead (0%)\n" in text
    assert "where in the layer" not in text
    assert "input 0: 1x8x8 float32, 0 to 1, mean 0.3, sd 0.25\n" in text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 10, "0%"),
        (0, 0, "0%"),
        (10, 10, "100%"),
        (1, 3, "33.3%"),
        (1, 1_000_000, "<0.1%"),
        (1, 1000, "0.1%"),
        (1, 5000, "<0.1%"),
        (999, 1000, "99.9%"),
        (9995, 10_000, ">99.9%"),
        (999_999, 1_000_000, ">99.9%"),
    ],
)
def test_percentages_never_round_to_nothing_or_to_all(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


@pytest.mark.parametrize(
    ("raw", "unicode", "text"),
    [
        ("plain [b]", True, "plain [b]"),
        ("\x1b[2J\n", True, "\\x1b[2J\\x0a"),
        ("\u202e", True, "\\u202e"),
        ("\ud800", True, "\\ud800"),
        ("\U000e0041", True, "\\U000e0041"),
        ("caf\u00e9", True, "caf\u00e9"),
        ("caf\u00e9", False, "caf\\xe9"),
    ],
)
def test_what_cannot_be_printed_is_spelled_out(raw: str, unicode: bool, text: str) -> None:
    assert shown(raw, unicode=unicode) == text


@pytest.mark.parametrize(
    ("off", "text", "plain"),
    [
        ([0, 0, 0, 0], "····", "    "),
        ([1, 1, 1, 1], "████", "####"),
        ([1, 0, 0, 1], "█··█", "#  #"),
        ([], "·", " "),
        # 32 units in 4 cells of 8: none, 1 of 8, 7 of 8, all.
        ([0] * 8 + [1] + [0] * 7 + [1] * 7 + [0] + [1] * 8, "·▁▇█", " .%#"),
    ],
)
def test_a_strip_shows_where_units_are_off(off: list[int], text: str, plain: str) -> None:
    assert strip(np.array(off, bool), 4, unicode=True) == text
    assert strip(np.array(off, bool), 4, unicode=False) == plain


def test_only_a_full_cell_is_drawn_full() -> None:
    off = np.ones(1000, bool)
    off[500] = False

    assert strip(off, 1, unicode=True) == "▇"
    assert strip(~off, 1, unicode=True) == "▁"


def test_the_legend_uses_the_strips_own_characters() -> None:
    assert legend(unicode=True) == "where in the layer units never fire: · none  ▁ few  ▄ some  █ all"
    assert legend(unicode=False) == "where in the layer units never fire: blank none  . few  = some  # all"
