"""Deaths planted by construction are found exactly, layer by layer, and the benchmark says what it saw."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.adapters import TOOLS, Found, Tool
from benchmarks.by_hand import GELU_BORDER
from benchmarks.planted import CASES, FIRST, NOT_MEASURED, SECOND, built, data, judged
from benchmarks.timing import interleaved, slope, unresolved
from deadcheck.errors import NothingMeasured

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COVERAGE = BENCHMARKS / "coverage.py"


def found(tool: str, name: str) -> Found:
    """Ask a tool about a case."""
    case = CASES[name]
    return TOOLS[tool].ask(built(case), data(case.shape), case.axis)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_MEASURED])
def test_every_planted_death_is_found_and_no_other(name: str) -> None:
    assert tuple(found("deadcheck", name).values()) == CASES[name].dead


@pytest.mark.parametrize("name", NOT_MEASURED)
def test_a_relu_written_by_hand_is_said_not_to_be_measured(name: str) -> None:
    with pytest.raises(NothingMeasured, match="not measured"):
        found("deadcheck", name)


@pytest.mark.parametrize("tool", ["zero-mean hooks", "storing hooks"])
def test_hooks_see_modules_and_no_functions(tool: str) -> None:
    assert set(found(tool, "nn.ReLU").values()) - {frozenset()} == {FIRST, SECOND}
    assert not any(found(tool, "F.relu").values())


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ({"a": FIRST, "b": SECOND}, "exact"),
        ({"a": FIRST, "relu": FIRST, "b": SECOND, "c": frozenset()}, "exact"),
        ({"b": SECOND}, "part"),
        ({"a": FIRST | {4}, "b": SECOND}, "wrong"),
        ({"a": FIRST, "b": SECOND, "c": frozenset({7})}, "wrong"),
        ({"a": frozenset()}, "not seen"),
        ({}, "not seen"),
        ({"a": 3, "b": 2}, "exact"),
        ({"a": 3, "b": 0}, "part"),
        ({"a": 15, "b": 10}, "wrong"),
    ],
)
def test_scores(answer: Found, score: str) -> None:
    assert judged(answer, (FIRST, SECOND)) == score


def test_a_tool_that_is_not_installed_is_said_to_be_missing() -> None:
    tool = Tool(TOOLS["deadcheck"].ask, "", (), ("a_package_that_nobody_has",))

    assert tool.missing() == "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"


def coverage(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark."""
    return subprocess.run([sys.executable, str(COVERAGE), *args], capture_output=True, text=True, check=False)


def test_the_benchmark_prints_a_table_and_writes_every_answer(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run = coverage("--only", "F.relu", "--tools", "deadcheck", "zero-mean hooks", "--json", str(path))

    assert (run.returncode, run.stderr) == (0, "")
    assert "| F.relu       | exact     | not seen        |" in run.stdout.splitlines()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["cases"]["F.relu"]["deadcheck"]["found"] == {":relu#1": [1, 3, 6], ":relu#2": [0, 5]}
    assert set(written["versions"]) == {"python", "torch", "torch-deadcheck"}


def test_a_case_that_is_not_there_is_refused() -> None:
    run = coverage("--only", "nonsense")

    assert (run.returncode, run.stdout) == (2, "")
    assert "no case has 'nonsense' in its name" in run.stderr


@pytest.mark.parametrize(
    ("sizes", "seconds", "power"),
    [
        ([1, 2, 4], [3, 6, 12], 1),
        ([2, 4, 8], [3, 12, 48], 2),
        ([1, 10, 100], [5, 5, 5], 0),
        ([1, 2, 4], [1, 4, 4], 1),  # in powers of two: (0, 0), (1, 2), (2, 2), and least squares through these
        ([1, 2, 8], [1, 2, 64], 29 / 14),  # (0, 0), (1, 1), (3, 6): products about the means 29/3, squares 14/3
    ],
)
def test_the_slope_is_the_power_of_growth(sizes: list[float], seconds: list[float], power: float) -> None:
    assert math.isclose(slope(sizes, seconds), power, abs_tol=1e-12)


def test_works_are_timed_in_turn_and_the_first_round_is_forgotten() -> None:
    asked: list[str] = []

    def clock(name: str) -> float:
        asked.append(name)
        return float(len(asked))

    taken = interleaved({name: lambda name=name: clock(name) for name in "ab"}, 2)  # type: ignore[misc]

    assert asked == ["a", "b"] * 3
    assert taken == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(
    ("again", "moved"),
    [([], None), ([1.0, 1.02, 0.98], None), ([1.0, 1.25], 0.25), ([0.75, 1.125], 0.25)],
)
def test_what_moves_against_itself_is_said(again: list[float], moved: float | None) -> None:
    assert unresolved(again) == moved


def test_the_border_of_gelu_is_where_its_slope_is_a_thousandth() -> None:
    around = torch.tensor([GELU_BORDER - 1e-3, GELU_BORDER + 1e-3], dtype=torch.float64, requires_grad=True)
    F.gelu(around).sum().backward()
    steep = around.grad.abs() > 1e-3

    assert steep.tolist() == [False, True]


WRONG = """
from deadcheck import sites
init = sites.SiteStats.__init__
def wrong(self, *args, **kwargs):
    init(self, *args, **kwargs)
    for unit, name in enumerate(("zeros", "fired", "positive")):
        counts = getattr(self, name).copy()
        counts[unit] += 1
        object.__setattr__(self, name, counts)
sites.SiteStats.__init__ = wrong
"""
"""Started by every Python that finds it: counts of units 0, 1 and 2 are off by one."""


def short(only: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the short form, of which the check of counts alone and of that a part."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import run; run.SHORT['counts'] = {['--only', only]}"
    command = [sys.executable, "-c", f"{code}; run.main()", "--short", "--only", "counts"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


NETWORK, CASE = "Convnet 64x32", "residual block"


@pytest.mark.parametrize("only", [NETWORK, CASE])
def test_the_short_form_passes_where_counts_are_right(only: str, tmp_path: Path) -> None:
    run = short(only, tmp_path)

    assert (run.returncode, "failed" in run.stderr) == (0, False)


@pytest.mark.parametrize(
    ("only", "told"),
    [
        (
            NETWORK,
            [
                f"{NETWORK}, {way}: 1: {name} of 1 units; of unit {unit}"
                for way in ("one at a time", "side by side", "without the kernel")
                for unit, name in enumerate(("zeros", "fired", "positive"))
            ],
        ),
        (CASE, [f"{CASE}, planted: dead units [[3, 6], [0, 5]], planted [[1, 3, 6], [0, 5]]"]),
    ],
)
def test_the_short_form_fails_where_counts_are_wrong(only: str, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WRONG)

    run = short(only, tmp_path)

    assert run.returncode == 1
    assert "failed: counts" in run.stderr
    assert [line for line in told if line not in run.stderr] == []
