"""Training checkpoints: what lies beside the weights is named and left, and wrappers' prefixes are stripped."""

from __future__ import annotations

import argparse
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import deadcheck
from deadcheck import LoadOptions
from deadcheck.errors import ArchitectureError, UsageError

ARCH = """from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
"""


@dataclass
class Settings:
    lr: float = 0.1


class Phase(enum.Enum):
    TRAIN = 1


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def strays() -> dict[str, Any]:
    """What training scripts leave beside weights, and the name that each goes by."""
    optimiser = torch.optim.Adam(net().parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 3)
    return {
        "numpy._core.multiarray.scalar": np.float64(0.5),
        "argparse.Namespace": argparse.Namespace(lr=0.1),
        "pathlib.PosixPath": Path("runs"),
        "torch.optim.adam.Adam": optimiser,
        "torch.optim.lr_scheduler.StepLR": schedule,
        f"{__name__}.Settings": Settings(),
        f"{__name__}.Phase": Phase.TRAIN,
    }


def scan(saved: Any, folder: Path, *, key: str | None = None) -> deadcheck.Diagnosis:
    torch.save(saved, folder / "m.pt")
    (folder / "arch.py").write_text(ARCH)
    return deadcheck.scan(folder / "m.pt", batch(), load=LoadOptions(arch=f"{folder}/arch.py:net", key=key))


def batch() -> Tensor:
    return torch.linspace(-1, 1, 32).reshape(8, 4)


def zeros(diagnosis: deadcheck.Diagnosis) -> list[list[int]]:
    return [site.stats.zeros.tolist() for site in diagnosis]


@pytest.mark.parametrize("name", strays())
def test_a_stray_is_named_and_the_weights_are_read(name: str, tmp_path: Path) -> None:
    found = scan({"epoch": 3, "state_dict": net().state_dict(), "extra": strays()[name]}, tmp_path)

    assert zeros(found) == zeros(deadcheck.scan(net(), batch()))
    assert f"{name} in the checkpoint was left unread, as it is no weight" in found.measurement.warnings


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "ema_model."])
def test_a_prefix_is_stripped_and_said(prefix: str, tmp_path: Path) -> None:
    found = scan({f"{prefix}{name}": value for name, value in net().state_dict().items()}, tmp_path)

    assert zeros(found) == zeros(deadcheck.scan(net(), batch()))
    said = [note for note in found.measurement.warnings if "was stripped from the names of the weights" in note]
    assert len(said) == prefix.count(".")


def test_the_state_of_an_averaged_model_is_that_of_the_model(tmp_path: Path) -> None:
    found = scan(AveragedModel(net()).state_dict(), tmp_path)

    assert zeros(found) == zeros(deadcheck.scan(net(), batch()))
    assert found.measurement.warnings[:2] == (
        "n_averaged in the file was left unread, as it is no weight: the weights are a mean of others",
        "the prefix 'module.' was stripped from the names of the weights",
    )


def test_a_count_of_the_models_own_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="1 unexpected in the file: 'n_averaged'"):
        scan({**net().state_dict(), "n_averaged": torch.tensor(3)}, tmp_path)


def test_averaged_weights_beside_the_others_are_a_choice(tmp_path: Path) -> None:
    saved = {"model": net().state_dict(), "ema": {name: value * 0 for name, value in net().state_dict().items()}}

    with pytest.raises(UsageError, match=r"several entries hold weights .'model', 'ema'.; choose one with --key"):
        scan(saved, tmp_path)
    # Weights of zero: each of 3 units is off in each of 8 samples.
    assert zeros(scan(saved, tmp_path, key="ema")) == [[8, 8, 8]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("2.bias"), "1 missing from the file: '2.bias'"),
        (lambda state: state.update(more=torch.ones(1)), "1 unexpected in the file: 'more'"),
        (lambda state: state.update({"0.bias": torch.ones(5)}),
         r"'0.bias' is \(5,\) in the file and \(3,\) in the model"),
        (lambda state: state.update({f"x{i}": torch.ones(1) for i in range(300)}),
         "300 unexpected in the file: 'x0', 'x1'"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_never_loaded_in_part(change: Any, told: str, tmp_path: Path) -> None:
    state = net().state_dict()
    change(state)

    with pytest.raises(ArchitectureError, match=told) as raised:
        scan(state, tmp_path)

    assert len(str(raised.value).splitlines()) <= 5
    assert "choose another entry with --key" in str(raised.value)
