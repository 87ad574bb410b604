"""Models whose weights accelerate brings in for each call are counted and named as in memory, and left as they were."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck.errors import ForwardError
from deadcheck.probe import Probe
from tests import oracle, zoo
from tests.test_casting import run
from tests.test_counts import differences

Offload = Callable[[nn.Module, Path], nn.Module]


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu")


def with_buffers(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def spread(model: nn.Module, folder: Path) -> nn.Module:
    """Keep every second child on the disk, as a device map does."""
    places = {name: ("cpu", "disk")[i % 2] for i, (name, _) in enumerate(model.named_children())}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), offload_buffers=True, force_hooks=True
    )


class Network(nn.Module):
    """Convolutions with buffers, weights that two layers share, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight
        self.rnn = nn.GRU(8, 5, batch_first=True)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = torch.relu(self.b(torch.relu(self.a(x))))
        if self.fails:
            raise ValueError("the model broke")
        self.rnn(x)
        return torch.relu(self.c(x))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


X = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
EVERY = pytest.mark.parametrize("offload", [in_memory, with_buffers, on_disk, spread])


def held(model: nn.Module) -> list[object]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    attributes = [(name, id(value)) for module in model.modules() for name, value in vars(module).items()]
    return [*((name, id(tensor), str(tensor.device)) for name, tensor in tensors), *attributes]


@EVERY
@pytest.mark.parametrize("dtype", ["model", "bfloat16", "float64"])
def test_the_counts_and_names_are_those_of_the_model_in_memory(offload: Offload, dtype: str, tmp_path: Path) -> None:
    model = offload(network(), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        model(X)  # which changes what stands for the weights
    before = held(model)

    found = deadcheck.scan(model, X, batch_size=20, dtype=dtype)

    assert held(model) == before
    expected = deadcheck.scan(network(), X, batch_size=20, dtype=dtype)
    assert [site.stats.site for site in found] == [site.stats.site for site in expected]
    assert all(a.stats.equals(b.stats) for a, b in zip(found, expected, strict=True))
    assert found.measurement.env == expected.measurement.env
    assert found.measurement.warnings == expected.measurement.warnings
    assert found.measurement.skipped == expected.measurement.skipped
    with torch.no_grad():
        assert torch.equal(model(X), network()(X))


@EVERY
@pytest.mark.parametrize("kind", [zoo.Functional, zoo.SharedAct, zoo.Heads, zoo.Branches, zoo.SqueezeExcite])
def test_the_counts_are_those_of_the_oracle(kind: type[zoo.Zoo], offload: Offload, tmp_path: Path) -> None:
    data = zoo.inputs(kind, 23)
    expected = oracle.observe(zoo.build(kind).reference, data, 7)

    found = deadcheck.scan(offload(zoo.build(kind), tmp_path), data, batch_size=7)

    assert {site.key for site in found} == set(expected)
    for key, counts in expected.items():
        assert differences(found.site(key).stats, counts) == [], key
    assert not [warning for warning in found.measurement.warnings if "guessed" in warning]


@EVERY
def test_a_forward_that_raises_leaves_the_model_as_it_was(offload: Offload, tmp_path: Path) -> None:
    model = offload(network(), tmp_path)
    with torch.no_grad():
        model(X)
    model.fails = True
    before = held(model)

    with pytest.raises(ForwardError, match="the model broke"):
        deadcheck.scan(model, X)

    assert held(model) == before
    model.fails = False
    with torch.no_grad():
        assert torch.equal(model(X), network()(X))


def test_the_probe_puts_the_forwards_back_by_itself(tmp_path: Path) -> None:
    model = in_memory(network(), tmp_path)
    before = held(model)

    with pytest.raises(KeyboardInterrupt), Probe(model):
        raise KeyboardInterrupt

    assert held(model) == before


# The command line.

BUILD = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4), nn.ReLU()
    )
"""


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files of weights, with their index, and what builds the model, its data and room for files."""
    (tmp_path / "net.py").write_text(BUILD)
    space: dict[str, Callable[[], nn.Module]] = {}
    exec(BUILD, space)
    torch.manual_seed(0)
    state, folder = space["build"]().state_dict(), tmp_path / "model"
    folder.mkdir()
    names = {name: f"model-0000{1 + (number > 3)}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(names.values()):
        safetensors.torch.save_file({name: state[name] for name in state if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text("{}")
    torch.save(torch.randn(320, 6), tmp_path / "x.pt")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return folder


def given(folder: Path, *options: str) -> tuple[str, ...]:
    beside = folder.parent
    return (str(folder), "--arch", f"{beside / 'net.py'}:build", "-d", str(beside / "x.pt"), "-q", *options)


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Where each part of a model went."""
    seen: list[dict[str, str]] = []
    infer = accelerate.infer_auto_device_map

    def noted(*args: object, **kwargs: object) -> dict[str, str]:
        seen.append(dict(infer(*args, **kwargs)))
        return seen[-1]

    monkeypatch.setattr(accelerate, "infer_auto_device_map", noted)
    return seen


@pytest.mark.parametrize("command", ["scan", "gate"])
@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["--device-map", "auto"], {"cpu"}),
        (["--device-map", "auto", "--max-memory", "cpu=20KB"], {"cpu", "disk"}),
        (["--device-map", "sequential", "--max-memory", "cpu=20KB", "--dtype", "bfloat16"], {"cpu", "disk"}),
        (["--device-map", "sequential", "--max-memory", "cpu=1KB"], {"disk"}),
    ],
)
def test_a_model_that_is_spread_gives_the_same_report(
    options: list[str], places: set[str], command: str, sharded: Path, maps: list[dict[str, str]]
) -> None:
    report = sharded.parent / "r.json"
    cast = options[options.index("--dtype") :] if "--dtype" in options else []
    assert run(command, *given(sharded, *cast, "-o", f"json={report}", "--per-unit")) == 0
    expected = json.loads(report.read_text())

    assert run(command, *given(sharded, *options, "-o", f"json={report}", "--per-unit")) == 0

    found = json.loads(report.read_text())
    del expected["run"], found["run"]
    assert found == expected
    assert set(maps[0].values()) == places
    assert list((sharded.parent / "tmp").glob("deadcheck-*")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "cpu=1GB"], "--max-memory says how a model is spread; add --device-map auto"),
        (["--device-map", "even"], "--device-map: 'even' is not one of auto, sequential"),
        (
            ["--device-map", "auto", "--max-memory", "1GB"],
            "--max-memory '1GB' is not DEVICE=SIZE; write --max-memory 0",
        ),
        (
            ["--device-map", "auto", "--max-memory", "cpu=lots"],
            "is not a mapping of devices to sizes; write it as {0: 2",
        ),
        (
            ["--device-map", "auto", "--max-memory", "tpu=1GB"],
            "accelerate cannot spread the model (Device tpu is not rec",
        ),
    ],
)
def test_what_cannot_be_spread_is_said(options: list[str], message: str, sharded: Path, capsys) -> None:
    assert run("scan", *given(sharded, *options)) == 2

    assert message in capsys.readouterr().err
    assert list((sharded.parent / "tmp").glob("deadcheck-*")) == []


def test_without_accelerate_the_command_says_how_to_get_it(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)

    assert run("scan", *given(sharded, "--device-map", "auto")) == 2
    assert "--device-map needs accelerate; install torch-deadcheck[big]" in capsys.readouterr().err


def test_a_program_is_not_spread(tmp_path: Path, capsys) -> None:
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(6, 3), nn.ReLU())), tmp_path / "net.pt")
    torch.save(torch.randn(320, 6), tmp_path / "x.pt")

    assert run("scan", str(tmp_path / "net.pt"), "--trust", "-d", str(tmp_path / "x.pt"), "--device-map", "auto") == 2
    assert "is a program, and cannot be spread over devices; leave out --device-map" in capsys.readouterr().err
