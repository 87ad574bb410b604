"""Deaths planted by construction are found exactly, layer by layer, and the benchmark says what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.adapters import TOOLS, Found, Tool
from benchmarks.planted import CASES, FIRST, SECOND, built, data, judged
from deadcheck.errors import NothingMeasured

COVERAGE = Path(__file__).parent.parent / "benchmarks" / "coverage.py"
BY_HAND = ("torch.where(x > 0, x, 0)", "x * (x > 0)")


def found(tool: str, name: str) -> Found:
    """Ask a tool about a case."""
    case = CASES[name]
    return TOOLS[tool].ask(built(case), data(case.shape), case.axis)


@pytest.mark.parametrize("name", [name for name in CASES if name not in BY_HAND])
def test_every_planted_death_is_found_and_no_other(name: str) -> None:
    assert tuple(found("deadcheck", name).values()) == CASES[name].dead


@pytest.mark.parametrize("name", BY_HAND)
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
