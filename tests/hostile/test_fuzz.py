"""A short run of the fuzzer; ``python -m tests.hostile.fuzz --count 20000`` is the long one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import fuzz
from tests.hostile.cases import saved
from tests.hostile.forks import ROOT, Run
from tests.hostile.mutations import changed

ANSWER = {"argv": ["scan", "x.pt"], "code": 2, "said": True, "err": "deadcheck: error: x", "lines": 1, "failed": False,
          "seconds": 0.1}  # fmt: skip
MIB = 1 << 10  # in KiB


def ended(**more: Any) -> Run:
    return Run(0, json.dumps([{**ANSWER, **more}]), "", 0.2, 200 * MIB)


def test_changed_files_of_every_kind_end_well() -> None:
    # Three of each of 35 files.
    command = [sys.executable, "-m", "tests.hostile.fuzz", "--count", "105", "--seed", "1"]

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert "105 inputs from 35 files" in run.stdout, run.stderr
    assert ": 0 faults" in run.stdout, run.stdout
    assert run.returncode == 0


def test_a_child_that_ends_well_has_no_faults() -> None:
    assert fuzz.faults(ended(), 100 * MIB) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"code": 5}, "exit code 5"), ({"code": 1, "err": "ValueError"}, "an error, and all is well"),
        ({"failed": True}, "a crash"), ({"said": False}, "not a word"), ({"lines": 41}, "41 lines of error"),
        ({"seconds": 11.0}, "11 s"),
    ],
)  # fmt: skip
def test_an_answer_that_is_wrong_is_a_fault(more: Mapping[str, Any], told: str) -> None:
    (fault,) = fuzz.faults(ended(**more), 100 * MIB)

    assert fault.startswith(f"scan x.pt: {told}")


def test_a_death_a_marker_and_much_memory_are_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzz.MARKER.mkdir()

    assert fuzz.faults(replace(ended(), code=-11), 0) == ["the process died (-11): "]
    assert fuzz.faults(replace(ended(), peak=2000 * MIB), 100 * MIB) == ["took 1900 MiB", "ran code of the file"]
    assert not fuzz.MARKER.exists()


@pytest.mark.parametrize(("name", "data"), [("x.pt", saved(b"N")), ("x.json", b'{"a": [{"b": {}}, 1, {"c": []}]}')])
def test_an_input_is_made_anew_from_its_number(name: str, data: bytes) -> None:
    """Whatever was made before: 2,000 in the one order, and in the other."""

    def made(number: int) -> bytes:
        return changed(random.Random(f"1:{number}"), data, [data], name)

    inputs = [made(number) for number in range(2000)]

    assert inputs == [made(number) for number in reversed(range(2000))][::-1]
    assert len(set(inputs)) > 500
