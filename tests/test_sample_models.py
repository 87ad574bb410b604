"""The sample models are what their README says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import deadcheck
from deadcheck import LoadOptions, Verdict
from deadcheck.formats import open_model

FOLDER = Path(__file__).parent.parent / "sample_models"


def rows() -> list[tuple[str, str | None, float, list[int]]]:
    """Return (file, arch, held-out accuracy, dead units) of every row of the README's table."""
    out = []
    for line in (FOLDER / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0].startswith("`"):
            arch = re.search(r"--arch (\S+?)`", cells[1])
            name = None if arch is None else str(FOLDER.parent / arch[1])
            dead = [int(n) for n in re.findall(r"(\d+) of", cells[4])]
            out.append((cells[0].strip("`"), name, float(cells[3].split("/")[1]), dead))
    return out


def test_the_readme_names_every_model() -> None:
    files = {p.name for p in FOLDER.iterdir() if p.suffix in (".pt", ".safetensors")}

    assert {name for name, *_ in rows()} == files


def test_together_they_are_small() -> None:
    assert sum(p.stat().st_size for p in FOLDER.iterdir() if p.is_file()) < 3_000_000


@pytest.mark.parametrize(("name", "arch", "accuracy", "dead"), rows(), ids=lambda value: str(value)[:30])
def test_each_model_is_as_accurate_and_as_dead_as_documented(name, arch, accuracy, dead) -> None:
    options = LoadOptions(arch=arch)
    sample = np.load(FOLDER / f"{Path(name).stem}.sample.npz")
    model = open_model(FOLDER / name, options).module.eval()
    with torch.no_grad():
        right = (model(torch.from_numpy(sample["x"])).argmax(1).numpy() == sample["y"]).mean()

    diagnosis = deadcheck.scan(FOLDER / name, load=options)

    assert abs(right - accuracy) < 0.01
    assert [site.counts[Verdict.DEAD] for site in diagnosis] == dead
