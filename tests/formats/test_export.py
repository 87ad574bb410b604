"""Exported programs: the audit, the batch they are fixed to, their example inputs, branches."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck import LoadOptions
from deadcheck.errors import ModelFileError, TrustRequired

pytestmark = pytest.mark.filterwarnings("ignore")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.GELU()).eval()


def exported(model: nn.Module, x: Tensor, path: Path, *, dynamic: bool = False) -> Path:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), path)
    return path


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the description of the program in an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("models/model.json"))
    program = json.loads(members[name])
    change(program)
    members[name] = json.dumps(program).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def test_inputs_of_another_type_than_the_weights_stay_as_the_program_takes_them(tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net().half()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.half())  # type: ignore[no-any-return]

    path = exported(Cast(), torch.randn(4, 6), tmp_path / "m.pt2")
    diagnosis = deadcheck.scan(path, torch.randn(8, 6, dtype=torch.float64), load=LoadOptions(trust=True))

    assert diagnosis.sites[0].stats.samples == 8
    assert "inputs of float64 were cast to float32, the model's own type" in diagnosis.measurement.warnings


@pytest.mark.parametrize("samples", [1, 4, 7, 8, 21])
def test_a_fixed_batch_counts_every_sample_once(tmp_path: Path, samples: int) -> None:
    model, x = net(), torch.randn(21, 6)[:samples]
    path = exported(model, torch.randn(4, 6), tmp_path / "m.pt2")

    diagnosis = deadcheck.scan(path, x)

    hidden = torch.relu(model[0](x))
    assert diagnosis.measurement.data.samples == samples
    assert diagnosis.sites[0].stats.samples == samples
    assert diagnosis.sites[0].stats.zeros.tolist() == (hidden == 0).sum(0).tolist()
    assert diagnosis.sites[0].stats.fired.tolist() == (hidden > 0).sum(0).tolist()


def test_its_example_inputs_are_one_synthetic_sample(tmp_path: Path) -> None:
    diagnosis = deadcheck.scan(exported(net(), torch.randn(4, 6), tmp_path / "m.pt2"))

    assert (diagnosis.measurement.data.samples, diagnosis.measurement.data.synthetic) == (1, True)
    assert diagnosis.sites[0].stats.observations == 4
    assert any(note.startswith("no data was given, so the example inputs") for note in diagnosis.measurement.warnings)


def test_a_live_program_is_measured_by_its_names_and_left_alone() -> None:
    model, x = net(), torch.randn(4, 6)
    program = torch.export.export(model, (x,))
    code = program.graph_module.code

    diagnosis = deadcheck.scan(program, x)

    assert [site.stats.site for site in diagnosis] == [site.stats.site for site in deadcheck.scan(model, x)]
    assert program.graph_module.code == code


def test_a_branch_is_seen(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x).relu()
            return torch.cond(y.sum() >= 0, lambda t: self.b(t).relu(), lambda t: self.b(t).sigmoid(), (y,))

    model, x = Branch().eval(), torch.randn(5, 3)

    diagnosis = deadcheck.scan(exported(model, x, tmp_path / "m.pt2"), x)

    assert [(site.key, site.stats.site.fed_by) for site in diagnosis] == [(":relu#1", ("a",)), (":relu#2", ("b",))]
    y = torch.relu(model.a(x))
    assert diagnosis.sites[1].stats.zeros.tolist() == (torch.relu(model.b(y)) == 0).sum(0).tolist()


@pytest.mark.parametrize(
    "target", ["torch.os.system", "torch.hub.load", "torch.ops.aten.save", "torch.ops.aten.from_file.default",
               "torch.ops.mine.op.default", "_operator.attrgetter", "torch.load", "torch.ops.aten.__class__"],
)  # fmt: skip
def test_a_call_that_does_more_than_compute_is_refused(tmp_path: Path, target: str) -> None:
    def plant(program: dict[str, Any]) -> None:
        program["graph_module"]["graph"]["nodes"][1]["target"] = target

    path = edited(exported(net(), torch.randn(4, 6), tmp_path / "m.pt2"), plant)

    with pytest.raises(TrustRequired, match=r"it calls .* which is no operator of torch that only computes"):
        deadcheck.scan(path)


def test_python_in_an_expression_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = exported(net(), torch.randn(4, 6), tmp_path / "m.pt2", dynamic=True)

    def plant(value: Any) -> None:
        if isinstance(value, dict):
            if "expr_str" in value:
                value["expr_str"] = f"__import__('os').mkdir({str(marker)!r})"
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                plant(item)

    with pytest.raises(TrustRequired, match="is more than arithmetic"):
        deadcheck.scan(edited(path, plant))
    assert not marker.exists()


def test_python_in_a_name_is_refused(tmp_path: Path) -> None:
    path = exported(net(), torch.randn(4, 6), tmp_path / "m.pt2")

    def plant(program: dict[str, Any]) -> None:
        text = json.dumps(program).replace('"input"', '"input, y=print(1)"')
        program.update(json.loads(text))

    with pytest.raises(TrustRequired, match="is no name"):
        deadcheck.scan(edited(path, plant))


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path: Path) -> None:
    path = exported(net(), torch.randn(4, 6), tmp_path / "m.pt2")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("sample_inputs/model.pt"))
    torch.save(Path("x"), tmp_path / "planted.pt")
    members[name] = (tmp_path / "planted.pt").read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)

    with pytest.raises(TrustRequired, match=r"sample_inputs/model.pt is a pickle that names pathlib"):
        deadcheck.scan(path)


def test_compiled_code_is_refused(tmp_path: Path) -> None:
    path = exported(net(), torch.randn(4, 6), tmp_path / "m.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data/aotinductor/model/model.so", b"\x7fELF")

    with pytest.raises(TrustRequired, match="is compiled code"):
        deadcheck.scan(path)


def test_a_program_of_another_version_gets_one_sentence(tmp_path: Path) -> None:
    def plant(program: dict[str, Any]) -> None:
        program["schema_version"] = {"major": 999, "minor": 0}

    path = edited(exported(net(), torch.randn(4, 6), tmp_path / "m.pt2"), plant)

    with pytest.raises(ModelFileError, match="an exported program that this torch cannot load"):
        deadcheck.scan(path)


def test_every_exported_zoo_program_passes_the_audit(tmp_path: Path) -> None:
    """The audit must not refuse what torch itself writes."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    models: list[tuple[nn.Module, Tensor]] = [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), torch.randn(2, 3, 9, 9)),
        (nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 8)),
        (nn.LSTM(6, 5, batch_first=True), torch.randn(2, 4, 6)),
        (nn.Sequential(nn.Linear(6, 8), nn.GELU("tanh"), nn.Softmax(-1)), torch.randn(2, 6)),
        (nn.Sequential(nn.Upsample(scale_factor=2), nn.ELU()), torch.randn(2, 3, 4, 4)),
    ]  # fmt: skip
    for number, (model, x) in enumerate(models):
        for dynamic in (True, False):
            path = exported(model.eval(), x, tmp_path / f"{number}{dynamic}.pt2", dynamic=dynamic)
            assert deadcheck.scan(path, x, load=LoadOptions()).measurement.model.read == "audited"
