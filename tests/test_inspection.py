"""What a file holds is told without torch and without building anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deadcheck import activations, torch_file
from deadcheck.denied import is_plain
from deadcheck.errors import ModelFileError
from deadcheck.inspection import TensorInfo, inspect
from deadcheck.inspectors.of_saved import ACTIVATIONS
from deadcheck.reports import as_inspection


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 5), nn.GELU()))


STATE = [TensorInfo("0.weight", "float32", (8, 6)), TensorInfo("0.bias", "float32", (8,)),
         TensorInfo("2.0.weight", "float32", (5, 8)), TensorInfo("2.0.bias", "float32", (5,))]  # fmt: skip


def test_a_name_that_looks_like_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(net(), "-m.pt")

    assert inspect(Path("-m.pt")).next == "deadcheck scan ./-m.pt --data DATA"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module(tmp_path: Path, zipped: bool) -> None:
    torch.save(net(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)

    found = inspect(tmp_path / "m.pt")

    assert (found.kind, found.problems, found.refused) == ("torch-module", (), False)
    assert list(found.tensors) == STATE
    assert found.activations == (("1", "ReLU"), ("2.1", "GELU"))
    assert found.next == f"deadcheck scan {tmp_path}/m.pt --data DATA"


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"m.{kind}"
    state = {f"module.{name}": value for name, value in net().state_dict().items()}
    torch.save(state, path) if kind == "pt" else save_file(state, path)

    found = inspect(path)

    assert sorted(t.name for t in found.tensors) == sorted(f"module.{t.name}" for t in STATE)
    assert found.prefix == "module."
    assert "--arch FILE.py:FACTORY" in found.next


def test_a_checkpoint_names_its_entries_and_the_sample_beside_it(tmp_path: Path) -> None:
    torch.save(
        {"epoch": 3, "ema": net().state_dict(), "model": net().state_dict(), "args": Path("x")}, tmp_path / "m.pt"
    )
    (tmp_path / "m.sample.npz").write_bytes(b"PK")

    found = inspect(tmp_path / "m.pt")

    assert dict(found.entries) == {
        "epoch": "3", "ema": "weights, 4 tensors", "model": "weights, 4 tensors", "args": "a pathlib.PosixPath",
    }  # fmt: skip
    assert found.sample == str(tmp_path / "m.sample.npz")
    assert found.next == f"deadcheck scan {tmp_path}/m.pt --arch FILE.py:FACTORY --key ema"


class Own(nn.Module):
    pass


def test_a_class_of_the_users_is_named_with_the_flag(tmp_path: Path) -> None:
    torch.save(Own(), tmp_path / "m.pt")

    found = inspect(tmp_path / "m.pt")

    assert found.refused
    assert found.problems == ("tests.test_inspection.Own is no class of torch, and a class is code",)
    assert "--allow-class tests.test_inspection.Own" in found.next


@pytest.mark.filterwarnings("ignore")
def test_programs(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(net().eval()), tmp_path / "script.pt")
    torch.jit.save(torch.jit.freeze(torch.jit.script(net().eval())), tmp_path / "frozen.pt")
    torch.export.save(torch.export.export(net().eval(), (torch.randn(2, 6),)), tmp_path / "m.pt2")

    script, frozen, exported = (inspect(tmp_path / name) for name in ("script.pt", "frozen.pt", "m.pt2"))

    assert script.kind == frozen.kind == "torchscript"
    assert script.next == f"deadcheck scan {tmp_path}/script.pt --trust --data DATA"
    assert (
        sorted(t.shape for t in script.tensors)
        == sorted(t.shape for t in frozen.tensors)
        == [(5,), (5, 8), (8,), (8, 6)]
    )
    assert {name for _, name in script.activations} >= {"relu", "gelu"}
    assert exported.activations == (("1", "relu"), ("2.1", "gelu"))
    assert sorted(t.name for t in exported.tensors) == sorted(t.name for t in STATE)
    assert (exported.problems, exported.next) == ((), f"deadcheck scan {tmp_path}/m.pt2")


def test_what_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07" * 30)

    with pytest.raises(ModelFileError, match="an ONNX model"):
        inspect(tmp_path / "m.onnx")


def test_a_damaged_file_is_inspected_as_far_as_it_goes(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:300])

    found = inspect(tmp_path / "m.pt")

    assert found.kind == "torch"
    assert "damaged" in found.problems[0]
    assert found.next == ""


def test_json_and_text_hold_the_same(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "m.pt")
    found = inspect(tmp_path / "m.pt")

    report = json.loads(as_inspection.render_json(found))

    assert report["tensors"][0] == {"name": "0.weight", "dtype": "float32", "shape": [8, 6]}
    assert report["model"] == {"path": str(tmp_path / "m.pt"), "bytes": found.bytes, "format": "torch-module"}
    text = as_inspection.render_text(found)
    # 8 * 6 + 8 + 5 * 8 + 5 = 101
    assert "4 with 101 numbers (float32, 404 bytes)" in text
    assert "ReLU at 1" in text


def test_it_needs_no_torch(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "m.pt")
    code = f"""
import sys
from pathlib import Path
from deadcheck.inspection import inspect
inspect(Path({str(tmp_path / "m.pt")!r}))
print("torch" in sys.modules)
"""

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout == "False\n"


def test_its_tables_are_those_of_the_loaders() -> None:
    assert {cls.__name__ for cls in activations.MODULES} == ACTIVATIONS
    harmless = {"torch.nn.parameter.UninitializedParameter", "torch.nn.parameter.UninitializedBuffer",
                "copyreg._reconstructor"}  # fmt: skip
    assert [name for name in torch_file._MAKERS if not is_plain(name)] == sorted(
        harmless, key=list(torch_file._MAKERS).index
    )
