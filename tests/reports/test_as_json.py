"""The JSON report: its keys, its numbers, and that nothing in it can break a parser."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from deadcheck.errors import ExitCode
from deadcheck.reports import REPORTS, RenderOptions
from deadcheck.reports.as_json import render_failure
from deadcheck.sites import Measurement, Skipped
from tests.records import input_summary, measurement, outcome, site_stats

TOP = [
    "schema_version", "tool", "status", "exit_code", "model", "data", "env", "totals", "sites", "skipped", "findings",
    "warnings", "error", "run",
]  # fmt: skip
SITE = [
    "key", "module", "activation", "fed_by", "axis", "axis_from", "units", "samples", "observations", "zero_rate",
    "counts", "upper_bound", "dead_units", "silent_units",
]  # fmt: skip
PARTS = {
    "tool": ["name", "version"],
    "model": ["path", "sha256", "bytes", "format", "read", "arch", "prefix_stripped"],
    "data": ["source", "sha256", "samples", "synthetic"],
    "env": ["torch", "device", "dtype", "mode", "seed", "world_size"],
    "totals": ["sites", "units", "dead", "silent", "dead_share"],
    "run": ["started", "seconds", "host"],
}
COUNTS = ["dead", "silent", "rare", "faint", "saturated", "always_on", "negative_only", "invalid", "live"]
PER_UNIT = ["zeros", "fired", "first_fired", "max", "verdict"]


def text_of(seen: Measurement, **options: Any) -> str:
    return REPORTS["json"]([outcome(seen, per_unit=options.get("per_unit", False))], RenderOptions(**options))


def report_of(seen: Measurement, **options: Any) -> dict[str, Any]:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text_of(seen, **options), parse_constant=reject)


def keys(part: dict[str, Any], expected: list[str]) -> list[str]:
    """The keys in their order, less those that were added to the agreed ones."""
    return [key for key in part if key in expected]


def test_the_agreed_keys_stand_in_their_order() -> None:
    report = report_of(measurement(site_stats(off=[0])))

    assert keys(report, TOP) == TOP
    assert keys(report["sites"][0], SITE) == SITE
    assert list(report["sites"][0]["counts"]) == COUNTS
    for part, expected in PARTS.items():
        assert keys(report[part], expected) == expected, part


def test_the_values_are_those_that_were_measured() -> None:
    seen = measurement(
        site_stats("a", units=6, off=[0, 1, 4]),
        site_stats("b", samples=200, off=[3]),
        skipped=(Skipped("aten.where", "block", "written by hand"),),
        inputs=(input_summary(),),
        warnings=("axis guessed at b",),
    )
    report = report_of(seen)

    assert (report["schema_version"], report["status"], report["exit_code"]) == ("1.0", "pass", 0)
    assert report["model"]["path"] == "net.pt"
    assert report["data"] == {"source": "net.sample.npz", "sha256": "cd34", "samples": 1000, "synthetic": False}
    assert report["skipped"] == [{"what": "aten.where", "where": "block", "reason": "written by hand"}]
    assert report["warnings"] == ["axis guessed at b"]
    assert report["inputs"][0]["sd"] == 0.25
    assert report["error"] is None
    assert report["run"]["seconds"] == 1.25
    assert {name: report["totals"][name] for name in PARTS["totals"]} == {
        "sites": 2, "units": 10, "dead": 3, "silent": 1, "dead_share": 0.3,
    }  # fmt: skip
    first, second = report["sites"]
    assert (first["dead_units"], first["silent_units"]) == ([[0, 1], [4, 4]], [])
    assert (second["dead_units"], second["silent_units"]) == ([], [[3, 3]])
    assert first["zero_rate"] == 0.7  # (3 x 1000 + 3 x 400) / 6000
    assert first["upper_bound"] == pytest.approx(0.002991, abs=5e-7)
    assert (first["fed_by"], first["axis"], first["axis_from"]) == (["features.0"], 1, "conv2d")


def test_the_parts_add_up() -> None:
    report = report_of(
        measurement(site_stats("a", off=[0]), site_stats("b", samples=200, off=[1, 2], nonfinite=[1, 0, 0, 0]))
    )

    for site in report["sites"]:
        assert sum(site["counts"].values()) == site["units"]
    for name in COUNTS:
        assert sum(site["counts"][name] for site in report["sites"]) == report["totals"]["counts"][name]
    assert report["totals"]["dead"] == report["totals"]["counts"]["dead"]


def test_sites_stand_in_the_order_in_which_they_ran() -> None:
    report = report_of(measurement(site_stats("z"), site_stats("a", off=[0, 1]), site_stats("m", off=[0])))

    assert [site["key"] for site in report["sites"]] == ["z", "a", "m"]


def test_per_unit_numbers_come_on_request() -> None:
    seen = measurement(site_stats(units=2, off=[1], first_fired=[7, -1]))
    per_unit = report_of(seen, per_unit=True)["sites"][0]["per_unit"]

    assert "per_unit" not in report_of(seen)["sites"][0]
    assert keys(per_unit, PER_UNIT) == PER_UNIT
    assert {name: per_unit[name] for name in PER_UNIT} == {
        "zeros": [400, 1000], "fired": [600, 0], "first_fired": [7, None], "max": [1.0, 0.0],
        "verdict": ["live", "dead"],
    }  # fmt: skip
    assert all(len(values) == 2 for values in per_unit.values())


def test_what_is_not_finite_is_null_with_a_finding_beside_it() -> None:
    stats = site_stats(
        nonfinite=[2, 0, 0, 0], output_max=[np.inf, 1, 1, 1], output_sum=[np.nan, 1, 1, 1],
        output_abs_sum=[np.nan, 300, 300, 300],
    )  # fmt: skip
    report = report_of(measurement(stats, inputs=(input_summary(mean=np.nan, max=np.inf),)), per_unit=True)
    site = report["sites"][0]

    assert site["per_unit"]["max"] == [None, 1.0, 1.0, 1.0]
    assert (site["mean_output"], site["max_abs_output"], site["nonfinite"]) == (None, None, 2)
    assert (report["inputs"][0]["mean"], report["inputs"][0]["max"]) == (None, None)
    assert [finding["id"] for finding in report["findings"]] == ["invalid"]


def test_the_same_input_gives_the_same_bytes() -> None:
    seen = measurement(site_stats(off=[0]), inputs=(input_summary(),))

    assert text_of(seen, per_unit=True) == text_of(seen, per_unit=True, width=40, color=True, unicode=False)


@pytest.mark.parametrize(
    "name", ["[red]x[/red]", "\x1b[31mred", "two\nlines", "\u202egnp", "\ud800", '"\\', "</script>", "a" * 300]
)
def test_no_name_breaks_the_report(name: str) -> None:
    text = text_of(measurement(site_stats(name), warnings=(name,), skipped=(Skipped(name, name, name),)))
    report = json.loads(text)

    assert text.isascii()
    assert text.endswith("}\n")
    assert "\x1b" not in text
    assert report["sites"][0]["key"] == report["warnings"][0] == report["skipped"][0]["where"] == name


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ExitCode.ERROR, "error"),
        (ExitCode.NOTHING_JUDGED, "inconclusive"),
        (ExitCode.REFUSED, "refused"),
        (ExitCode.FAILED, "fail"),
        (ExitCode.INTERRUPTED, "error"),
    ],
)
def test_a_failure_has_the_same_keys(code: ExitCode, status: str) -> None:
    report = json.loads(render_failure(code, "no such file", "gone.pt"))

    assert keys(report, TOP) == TOP
    assert (report["status"], report["exit_code"]) == (status, int(code))
    assert report["error"]["message"] == "no such file"
    assert report["model"] == {"path": "gone.pt"}
    assert report["sites"] == []
