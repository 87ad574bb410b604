"""One real model gives the same counts in every format that PyTorch saves it in."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import deadcheck
from deadcheck import Diagnosis, LoadOptions

FOLDER = Path(__file__).parent.parent.parent / "sample_models"
ARCHITECTURES = FOLDER / "architectures.py"
SAMPLES = 203
BATCH = 32
"""Divides no number of samples used here: the last batch is a short one."""

MODELS = ("residual", "transformer", "cnn")


def architecture(name: str) -> Callable[[], nn.Module]:
    spec = importlib.util.spec_from_file_location("architectures", ARCHITECTURES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, FACTORY[name])


FACTORY = {"residual": "residual_cnn", "transformer": "transformer", "cnn": "cnn"}


def trained(name: str) -> nn.Module:
    model = architecture(name)().eval()
    if name == "residual":
        model.load_state_dict(load_file(FOLDER / "digits_residual.safetensors"))
    elif name == "transformer":
        model.load_state_dict(torch.load(FOLDER / "digits_transformer.pt", weights_only=True))
    else:
        model = torch.load(FOLDER / "digits_cnn.pt", weights_only=False)
    return model.eval()


def data() -> Tensor:
    with np.load(FOLDER / "digits_cnn.sample.npz") as arrays:
        return torch.from_numpy(arrays["x"])[:SAMPLES]


def save_state_dict(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path / "m.pt")
    return path / "m.pt"


def save_checkpoint(model: nn.Module, path: Path) -> Path:
    optimiser = torch.optim.Adam(model.parameters())
    model(data()[:8]).sum().backward()
    optimiser.step  # noqa: B018 (its state stays empty: the weights must not move)
    torch.save({"epoch": 3, "model": model.state_dict(), "optimizer": optimiser.state_dict()}, path / "m.pth")
    model.zero_grad()
    return path / "m.pth"


def save_lightning(model: nn.Module, path: Path) -> Path:
    torch.save(
        {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {f"net.{name}": value for name, value in model.state_dict().items()},
            "loops": {},
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.01, "path": Path("runs")},
        },
        path / "m.ckpt",
    )
    return path / "m.ckpt"


def save_data_parallel(model: nn.Module, path: Path) -> Path:
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path / "m.pt")
    return path / "m.pt"


def save_compiled(model: nn.Module, path: Path) -> Path:
    torch.save({f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}, path / "m.pt")
    return path / "m.pt"


def save_old_format(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path / "m.pt", _use_new_zipfile_serialization=False)
    return path / "m.pt"


def save_safetensors(model: nn.Module, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "m.safetensors")
    return path / "m.safetensors"


def save_sharded(model: nn.Module, path: Path) -> Path:
    folder, state = path / "m", model.state_dict()
    folder.mkdir()
    shards = {f"model-{i:05}-of-00002.safetensors": list(state)[i - 1 :: 2] for i in (1, 2)}
    for name, keys in shards.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / name)
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["Net"], "model_type": "net"}))
    return folder


WITH_ARCH = (
    save_state_dict, save_checkpoint, save_lightning, save_data_parallel, save_compiled, save_old_format,
    save_safetensors, save_sharded,
)  # fmt: skip


@pytest.fixture(scope="module")
def eager() -> dict[str, Diagnosis]:
    return {name: deadcheck.scan(trained(name), data(), batch_size=BATCH) for name in MODELS}


def same_counts(expected: Diagnosis, given: Diagnosis) -> None:
    assert len(given.sites) == len(expected.sites)
    for site, reference in zip(given, expected, strict=True):
        for name in ("zeros", "positive", "fired", "first_fired", "nonfinite"):
            assert getattr(site.stats, name).tolist() == getattr(reference.stats, name).tolist(), (site.key, name)
        assert (site.stats.samples, site.stats.observations) == (reference.stats.samples, reference.stats.observations)


def same_sites(expected: Diagnosis, given: Diagnosis) -> None:
    for site, reference in zip(given, expected, strict=True):
        assert site.stats.site == reference.stats.site


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("save", WITH_ARCH, ids=lambda save: save.__name__.removeprefix("save_"))
def test_weights(eager: dict[str, Diagnosis], tmp_path: Path, model: str, save: Callable[..., Path]) -> None:
    load = LoadOptions(arch=f"{ARCHITECTURES}:{FACTORY[model]}")

    diagnosis = deadcheck.scan(save(trained(model), tmp_path), data(), batch_size=BATCH, load=load)

    same_counts(eager[model], diagnosis)
    same_sites(eager[model], diagnosis)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, nn.DataParallel, AveragedModel], ids=["plain", "data-parallel", "averaged"]
)
def test_whole_module(eager: dict[str, Diagnosis], tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.save(wrap(trained("cnn")), tmp_path / "m.pt")

    diagnosis = deadcheck.scan(tmp_path / "m.pt", data(), batch_size=BATCH)

    assert diagnosis.measurement.model.read == "rebuilt"
    same_counts(eager["cnn"], diagnosis)
    same_sites(eager["cnn"], diagnosis)


def scripted(model: nn.Module) -> Any:
    return torch.jit.script(model)


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, data()[:BATCH], check_trace=False)


@torch.no_grad()
def traced_without_gradients(model: nn.Module) -> Any:
    """An encoder layer becomes one fused operator then."""
    return torch.jit.trace(model, data()[:BATCH], check_trace=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("make", [scripted, traced, traced_without_gradients], ids=lambda make: make.__name__)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_torchscript(
    eager: dict[str, Diagnosis], tmp_path: Path, model: str, make: Callable[[nn.Module], Any], frozen: bool
) -> None:
    program = make(trained(model))
    torch.jit.save(torch.jit.freeze(program) if frozen else program, tmp_path / "m.pt")

    diagnosis = deadcheck.scan(tmp_path / "m.pt", data(), batch_size=BATCH, load=LoadOptions(trust=True))

    assert diagnosis.measurement.model.format == "torchscript"
    same_counts(eager[model], diagnosis)
    if not frozen:  # a frozen program no longer says which module its code came from
        same_sites(eager[model], diagnosis)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_exported_program(eager: dict[str, Diagnosis], tmp_path: Path, model: str, dynamic: bool) -> None:
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(trained(model), (data()[:BATCH],), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "m.pt2")

    diagnosis = deadcheck.scan(tmp_path / "m.pt2", data(), batch_size=BATCH)

    assert diagnosis.measurement.model.format == "pt2"
    assert diagnosis.measurement.model.read == "audited"
    same_counts(eager[model], diagnosis)
    same_sites(eager[model], diagnosis)
    said = "the program takes 32 samples at a time, so the data was cut to that and filled up at the end"
    assert (said in diagnosis.measurement.warnings) is not dynamic
