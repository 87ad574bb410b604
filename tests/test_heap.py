"""What a command does to the memory of its own process."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from deadcheck import heap
from deadcheck.heap import collect_as_usual, collect_rarely

USUAL = (700, 10, 10)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a collector as a new process has; another test may have started a command in this one."""
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    monkeypatch.setattr(heap, "_USUAL", USUAL)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.usefixtures("collector")
def test_python_seldom_looks_for_garbage_while_a_command_starts() -> None:
    collect_rarely()
    assert gc.get_threshold()[0] > 10 * USUAL[0]

    collect_as_usual()
    assert gc.get_threshold() == USUAL
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("collector")
def test_what_one_model_leaves_is_garbage_to_the_next() -> None:
    collect_rarely()
    collect_as_usual()
    left: list[object] = [np.zeros(3)]
    left.append(left)
    gone = weakref.ref(left[0])
    del left
    collect_as_usual()
    assert gone() is None


def run(code: str, *argv: str) -> str:
    told = subprocess.run([sys.executable, "-c", f"import gc\nbefore = gc.get_threshold()\n{code}", *argv],
                          capture_output=True, text=True)  # fmt: skip
    return told.stdout.splitlines()[-1]


def test_importing_the_package_leaves_the_collector_of_a_user_as_it_is() -> None:
    assert run("import deadcheck, deadcheck.cli\nprint(before == gc.get_threshold())") == "True"


def test_a_command_looks_for_garbage_again_when_a_model_is_scanned() -> None:
    code = (
        "import atexit\nfrom deadcheck.cli import main\n"
        "atexit.register(lambda: print(before == gc.get_threshold(), gc.get_freeze_count() > 100_000))\nmain()"
    )
    assert run(code, "scan", "sample_models/digits_mlp.pt") == "True True"
