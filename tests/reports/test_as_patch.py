"""Reports of a patch, from hand-written records; no run stands behind them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deadcheck.diagnosis import Diagnosis, diagnose
from deadcheck.errors import ExitCode
from deadcheck.patch_plan import Kind, PatchPlan, Replacement, SiteChange, Units
from deadcheck.patch_result import (
    Advice,
    AlphaSearch,
    Drift,
    GradientReach,
    PatchResult,
    Response,
    SideBySide,
    SiteEffect,
    Written,
)
from deadcheck.reports import RenderOptions
from deadcheck.reports.as_compare import COMPARISONS
from deadcheck.reports.patches import PATCHES
from deadcheck.sites import Family, ModelIdentity, Skipped
from tests.records import measurement, site_stats

MODEL = ModelIdentity("net.pt", "ab12", 3456, "torch-module", "rebuilt")
DRIFT = Drift(1000, 0.0123, 2.5, 0, 1000, 7, 900, 893)


def before() -> Diagnosis:
    return diagnose(measurement(site_stats("fc.1", off=[0, 2]), site_stats("fc.3", units=8)))


def after() -> Diagnosis:
    leaky = site_stats(
        "fc.1", family=Family.LEAKY, input_max=[-1.0, 1.0, -1.0, 1.0], zeros=0, site={"activation": "leaky_relu"}
    )
    return diagnose(measurement(leaky, site_stats("fc.3", units=8, family=Family.LEAKY)))


def result(**changes: Any) -> PatchResult:
    old, new = before(), after()
    units = Units(4, ((0, 0), (2, 2)), "u4", 2)
    sites = (
        SiteEffect(
            SiteChange("fc.1", "relu", ("fc.0",), modules=("fc.1",), units=units), "leaky_relu(0.01)", None,
            old.sites[0], new.sites[0], GradientReach(4, 2, 0, 0.0, 0.25),
        ),
        SiteEffect(
            SiteChange("fc.3", "relu", modules=("fc.3",)), "leaky_relu(0.01)", None, old.sites[1], new.sites[1], None,
            "its incoming weights are not parameters of the model",
        ),
    )  # fmt: skip
    values: dict[str, Any] = {
        "model": MODEL,
        "plan": PatchPlan(Replacement(Kind.LEAKY, 0.01), tuple(site.change for site in sites)),
        "sites": sites,
        "skipped": (),
        "before": old,
        "after": new,
        "drift": DRIFT,
    }
    return PatchResult(**{**values, **changes})


def table(width: int = 80, *, unicode: bool = True, **changes: Any) -> str:
    return PATCHES["table"](result(**changes), RenderOptions(width=width, unicode=unicode))


def test_the_table_says_what_was_done() -> None:
    text = table()

    assert "change  ReLU → leaky_relu(0.01) at 2 sites, dead units alone" in text
    assert " fc.1    leaky_relu(0.01)   2 of 4   2 → 0         2 → 0" in text
    assert " fc.3    leaky_relu(0.01)        8   0 → 0             ?" in text
    assert "x above 0 with slope 1, 0.01 x below with\nslope 0.01 (the other units: 0, slope 0)" in text
    assert "2 dead units → 0; 2 units still never rise above 0, and pass on what is below" in text
    assert "mean |gradient| at the incoming weights of dead units: 0 → 0.25" in text
    assert "outputs moved by 1.23% (mean over 1,000 samples), one number by 2.5 at most" in text
    assert "7 of 1,000 decisions changed (0.7%); right: 900 → 893 (90.0% → 89.3%)" in text
    assert "at some sites: its incoming weights are not parameters of the model" in text.replace("\n", " ")
    assert "nothing was written" in text


@pytest.mark.parametrize("width", [60, 80, 140])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = table(
        width,
        skipped=(Skipped("relu", "a.very.long.path.to.a.site" * 3, "reasons " * 20),),
        advice=(Advice("a", "words " * 60),),
    )

    assert all(len(line) <= width for line in text.split("\n"))


def test_plain_ascii() -> None:
    assert table(unicode=False).isascii()
    assert "2 -> 0" in table(unicode=False)


def test_what_was_not_reached_and_what_is_wrong_stand_out() -> None:
    skipped = (Skipped("relu", "rnn:relu#1", "it is inside"), Skipped("relu", "rnn:relu#2", "it is inside"))
    wrong = replace(result().sites[0], fault="its slope at 0 is 1 and should be 0.01")
    text = table(140, skipped=skipped, sites=(wrong,))

    assert "not changed, though it was meant to be:\n  rnn:relu#1, rnn:relu#2 (relu: it is inside)" in text
    assert "wrong at fc.1: its slope at 0 is 1 and should be 0.01" in text
    assert "checked at and around 0" not in text
    assert result(skipped=skipped).exit_code is ExitCode.NOTHING_JUDGED
    assert result(sites=(wrong,)).exit_code is ExitCode.NOTHING_JUDGED
    assert result().exit_code is ExitCode.PASSED


def test_a_search_shows_its_trials() -> None:
    search = AlphaSearch(0.01, ((1e-4, 0.0031), (3.17e-4, 0.0099)), 3.17e-4, 450, 225, 0.0105)
    text = table(search=search)

    assert "slope chosen on 450 samples so that outputs move by 1.00% at most:" in text
    assert "0.0001        0.31%\n  0.000317      0.99%  chosen" in text
    assert "on 225 samples that a search did not see, its slope moved them by 1.05%" in text
    assert "no other samples" in table(search=replace(search, verified_samples=0, verified_drift=None))


def test_without_data_nothing_is_claimed() -> None:
    bare = SiteEffect(SiteChange("fc.1", "relu", modules=("fc.1",)), "leaky_relu(0.01)", None)
    text = table(before=None, after=None, drift=None, sites=(bare,))

    assert "without data nothing was measured" in text
    assert "dead" not in text.split("without data")[0].replace("deadcheck", "")
    assert "This changes" not in text


def test_files_and_what_they_need_are_named() -> None:
    text = table(written=(Written("fixed.pt", "the patched model, whole", "the class my.Net"),))

    assert "wrote fixed.pt (the patched model, whole; loading it takes the class my.Net)" in text
    assert "nothing was written (--dry-run)" in table(is_dry=True)


def test_rounding_never_hides_a_drift() -> None:
    assert "outputs moved by less than 0.01%" in table(drift=replace(DRIFT, relative=1e-7))
    assert "outputs moved by 0.00%" in table(drift=replace(DRIFT, relative=0.0))
    assert "outputs moved by an unknown share" in table(drift=replace(DRIFT, relative=float("nan")))
    assert "3 numbers of the output became NaN or infinite" in table(drift=replace(DRIFT, nonfinite=3))


HOSTILE = "<script>[red]\x1b[31m`|a\u202e\n::error::b"


@pytest.mark.parametrize("name", sorted(PATCHES))
def test_names_are_inert(name: str) -> None:
    site = replace(result().sites[0], change=SiteChange(HOSTILE, HOSTILE, modules=(HOSTILE,)))
    skipped = (Skipped(HOSTILE, HOSTILE, HOSTILE),)
    text = PATCHES[name](
        result(sites=(site,), skipped=skipped, model=replace(MODEL, path=HOSTILE), advice=(Advice("x", HOSTILE),)),
        RenderOptions(),
    )

    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\n::error::" not in text
    if name == "markdown":
        assert all(line.startswith(("#", "|", "-", "ReLU", "**", "Before", "")) for line in text.split("\n"))


def test_json_is_json_and_finite() -> None:
    report = json.loads(PATCHES["json"](result(drift=replace(DRIFT, relative=float("nan"))), RenderOptions()))

    assert report["schema_version"] == "1.0"
    assert (report["status"], report["exit_code"]) == ("pass", 0)
    assert report["sites"][0]["changed_units"] == [[0, 0], [2, 2]]
    assert report["sites"][0]["before"]["counts"]["dead"] == 2
    assert report["sites"][1]["gradient"] is None
    assert report["drift"]["relative"] is None
    assert report["totals"] == {"sites_changed": 2, "sites_not_changed": 0, "dead_before": 2, "dead_after": 0}


def test_markdown_is_a_table() -> None:
    text = PATCHES["markdown"](result(), RenderOptions())

    assert "| layer | was | is | units | dead | no gradient | function |" in text
    assert "| `fc.1` | `relu` | leaky_relu(0.01) | 2 of 4 | 2 → 0 | 2 → 0 | checked |" in text


def comparison(kind: Kind = Kind.LEAKY, alpha: float | None = 0.01) -> SideBySide:
    return SideBySide(
        result(plan=PatchPlan(Replacement(kind, alpha))),
        (Response(-1, 0, 0), Response(0, 0, 0), Response(1, 1, 1)),
        (Response(-1, -0.01, 0.01), Response(0, 0, 0.01), Response(1, 1, 1)),
        0.002,
        0.003,
        64,
    )


def test_the_comparison_is_the_articles_table() -> None:
    text = COMPARISONS["table"](comparison(), RenderOptions(width=80))

    for line in (
        " output for x < 0                   0                 0.01 x",
        " slope above, at, below 0           1, 0, 0           1, 0.01, 0.01",
        " risk: units that are dead          2 of 12 (16.7%)   0 of 12 (0%)",
        " never above 0, leak alone          0 of 12 (0%)      2 of 12 (16.7%)",
        " learning: units without gradient   2 of 4 (50.0%)    0 of 4 (0%)",
        " cost: 64 samples take              2 ms              3 ms (1.50x)",
    ):
        assert line in text


def test_other_functions_are_compared_by_their_values() -> None:
    text = COMPARISONS["markdown"](comparison(Kind.GELU, None), RenderOptions())

    assert "| output for x > 0 | x | 1 at 1 |" in text
    assert "| output for x < 0 | 0 | -0.01 at -1 |" in text


def test_the_comparison_in_json() -> None:
    report = json.loads(COMPARISONS["json"](comparison(), RenderOptions()))

    assert (report["relu"]["dead"], report["stand_in"]["negative_only"]) == (2, 2)
    assert report["stand_in"]["units_without_gradient"] == 0
    assert report["run"]["seconds_stand_in"] == 0.003
