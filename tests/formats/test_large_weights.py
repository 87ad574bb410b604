"""Large weights: the model is built without memory, and takes the file's own pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deadcheck
from deadcheck import LoadOptions
from deadcheck.formats import from_state_dict, open_model

CODE = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())

class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)
        self.shift = torch.full((8,), -0.5)

    def forward(self, x):
        return torch.relu(self.fc(x) * self.scale + self.shift)

def reads():
    model = plain()
    model[0].weight.data[0].sum().item()
    return model
"""


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_state_dict, "LARGE", 1)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "large_net.py").write_text(CODE)
    return tmp_path / "large_net.py"


def built(code: Path, name: str) -> nn.Module:
    space: dict[str, object] = {"__name__": "large_net"}
    exec(compile(code.read_text(), str(code), "exec"), space)
    return space[name]()  # type: ignore[operator]


@pytest.mark.parametrize("factory", ["plain", "Hidden", "reads"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_counts_are_those_of_the_model(tmp_path: Path, code: Path, factory: str, kind: str) -> None:
    model, x = built(code, factory).eval(), torch.randn(13, 6)
    path = tmp_path / f"m.{kind}"
    torch.save(model.state_dict(), path) if kind == "pt" else save_file(model.state_dict(), path)

    diagnosis = deadcheck.scan(path, x, load=LoadOptions(arch=f"{code}:{factory}"))

    expected = deadcheck.scan(model, x)
    assert diagnosis.sites[0].stats.zeros.tolist() == expected.sites[0].stats.zeros.tolist()


def test_weights_share_the_files_pages(tmp_path: Path, code: Path) -> None:
    torch.save(built(code, "plain").state_dict(), tmp_path / "m.pt")

    model = open_model(tmp_path / "m.pt", LoadOptions(arch=f"{code}:plain")).module

    maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else None
    if maps is None:
        pytest.skip("needs /proc")
    pages = [line.split()[0].split("-") for line in maps.splitlines() if line.endswith("m.pt")]
    assert any(int(a, 16) <= model[0].weight.data_ptr() < int(b, 16) for a, b in pages)


def test_writing_to_a_weight_does_not_write_to_the_file(tmp_path: Path, code: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(built(code, "plain").state_dict(), path)
    before = path.read_bytes()

    model: Tensor = open_model(path, LoadOptions(arch=f"{code}:plain")).module[0].weight
    with torch.no_grad():
        model.fill_(7.0)

    assert path.read_bytes() == before


def test_what_is_no_part_of_the_weights_is_said(tmp_path: Path, code: Path) -> None:
    torch.save(built(code, "Hidden").state_dict(), tmp_path / "m.pt")

    loaded = open_model(tmp_path / "m.pt", LoadOptions(arch=f"{code}:Hidden"))

    assert any("is no part of the weights" in note for note in loaded.warnings)
    assert loaded.module.scale.tolist() == [2.0] * 8
