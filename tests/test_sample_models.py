"""The sample models are what their README says."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deadcheck
from deadcheck import LoadOptions, Verdict
from deadcheck.formats import open_model

FOLDER = Path(__file__).parent.parent / "sample_models"


def rows() -> list[tuple[str, str | None, tuple[float, float], list[int]]]:
    """Return (file, arch, accuracies on training and held-out data, dead units) of every row of the README's table."""
    out = []
    for line in (FOLDER / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            arch = re.search(r"--arch (\S+?)`", cells[1])
            name = None if arch is None else str(FOLDER.parent / arch[1])
            train, held = (float(rate) for rate in cells[3].split("/"))
            dead = [int(n) for n in re.findall(r"(\d+) of", cells[4])]
            out.append((cells[0].strip("`"), name, (train, held), dead))
    return out


ROWS = pytest.mark.parametrize(("name", "arch", "accuracy", "dead"), rows(), ids=[row[0] for row in rows()])


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return make.py's own split: training images and labels, then the held-out ones."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("make").digits()


def sample(name: str) -> tuple[Tensor, Tensor]:
    with np.load(FOLDER / f"{Path(name).stem}.sample.npz") as arrays:
        return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])


def share_right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def dead_by_brute_force(open_it: Callable[[], nn.Module], x: Tensor) -> list[int]:
    """Return the units that are never above 0 of each ReLU call, seen by replacing the function itself."""
    dead = []

    def watched(relu: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            h = relu(z, *args, **kwargs)
            rows_of_units = h.movedim(1, -1) if h.dim() == 4 else h  # (N, C, H, W): channels are the units
            dead.append(int((~(rows_of_units > 0).flatten(0, -2).any(0)).sum()))
            return h

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("relu", "relu_"):
            patch.setattr(F, name, watched(getattr(F, name)))
        open_it().eval()(x)  # with gradients on, so that the encoder layer does not take its fused path
    return dead


def test_the_readme_names_every_model() -> None:
    files = {p.name for p in FOLDER.iterdir() if p.suffix in (".pt", ".safetensors")}

    assert {name for name, *_ in rows()} == files


def test_together_they_are_small() -> None:
    assert sum(p.stat().st_size for p in FOLDER.iterdir() if p.is_file()) < 3_000_000


@ROWS
def test_each_sample_is_the_held_out_data(name, arch, accuracy, dead, digits) -> None:
    _, _, held_x, held_y = digits
    x, y = sample(name)

    assert (x.dtype, y.dtype, len(x)) == (torch.float32, torch.int64, 450)
    assert torch.equal(x, held_x)
    assert torch.equal(y, held_y)


@ROWS
def test_each_model_is_as_accurate_as_documented(name, arch, accuracy, dead, digits) -> None:
    train_x, train_y, held_x, held_y = digits
    model = open_model(FOLDER / name, LoadOptions(arch=arch)).module.eval()

    measured = (share_right(model, train_x, train_y), share_right(model, held_x, held_y))

    assert measured == pytest.approx(accuracy, abs=0.01)


@ROWS
def test_each_model_is_as_dead_as_documented(name, arch, accuracy, dead) -> None:
    options = LoadOptions(arch=arch)
    x, _ = sample(name)

    assert dead_by_brute_force(lambda: open_model(FOLDER / name, options).module, x) == dead
    assert [site.counts[Verdict.DEAD] for site in deadcheck.scan(FOLDER / name, load=options)] == dead
