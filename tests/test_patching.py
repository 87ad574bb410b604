"""A study of a model before and after a patch: advice, stale batch norms, what is left, programs of odd kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deadcheck import pipeline
from deadcheck.config import Config, ScanSettings
from deadcheck.formats import LoadedModel, LoadOptions, open_model
from deadcheck.patch_plan import Kind, Replacement
from deadcheck.patch_result import PatchResult
from deadcheck.patching import examine, make
from deadcheck.remedies.base import Choice
from deadcheck.rewriting.in_modules import ModuleTree
from deadcheck.sites import ModelIdentity
from deadcheck.study import Study

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


def study(model: nn.Module, tmp_path: Path, x: Tensor = X, **settings: object) -> Study:
    np.save(tmp_path / "x.npy", x.numpy())
    loaded = LoadedModel(model, ModelIdentity(None, None, None, "object", "object"))
    scan = replace(ScanSettings(), data=str(tmp_path / "x.npy"), **settings)  # type: ignore[arg-type]
    return Study(ModuleTree(loaded, pipeline.runnable(model)), replace(Config(), scan=scan))


def result(model: nn.Module, tmp_path: Path, choice: Choice | None = None, **settings: object) -> PatchResult:
    of = study(model, tmp_path, **settings)
    return examine(of, make(of, choice or Choice()))


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def dead(layer: nn.Linear, units: slice) -> nn.Linear:
    with torch.no_grad():
        layer.bias[units] = -100
    return layer


def advice(found: PatchResult) -> list[str]:
    return [item.id for item in found.advice]


def test_a_model_without_dead_units_needs_no_patch(tmp_path: Path) -> None:
    found = result(net(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), tmp_path)

    assert advice(found) == ["nothing-dead"]
    assert found.advice[0].message.endswith("so the patch changes the outputs and revives nothing")


def test_units_that_may_be_dead_are_not_said_to_be_none(tmp_path: Path) -> None:
    found = result(net(dead(nn.Linear(6, 4), slice(2)), nn.ReLU(), nn.Linear(4, 3)), tmp_path, max_samples=100)

    assert found.advice[0].message == (
        "no unit was found dead; 2 never fired, on too few samples to call them dead, so the patch changes the outputs"
    )


def test_a_dead_layer_is_no_case_for_a_slope(tmp_path: Path) -> None:
    found = result(net(dead(nn.Linear(6, 4), slice(None)), nn.ReLU(), nn.Linear(4, 3)), tmp_path)

    assert advice(found)[0] == "layer-dead"
    assert "every unit of 1 is dead" in found.advice[0].message
    assert found.sites[0].gradient is not None
    assert (found.sites[0].gradient.without_before, found.sites[0].gradient.without_after) == (4, 0)


def test_stale_batch_norms_are_recalibrated_rather(tmp_path: Path) -> None:
    model = net(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[1].running_mean[:2] = 100.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = result(model, tmp_path)

    assert advice(found)[0] == "batch-norm"
    assert "2 of the dead units fire when batch norm uses each batch's own statistics" in found.advice[0].message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_wrong_inputs_come_first(tmp_path: Path) -> None:
    model = net(dead(nn.Linear(6, 4), slice(2)), nn.ReLU(), dead(nn.Linear(4, 4), slice(2)), nn.ReLU(), nn.Linear(4, 3))
    of = study(model, tmp_path, x=X.abs() * 100)
    with torch.no_grad():
        model[0].bias[:2] = -1e6
        model[2].bias[:2] = -1e6

    assert advice(examine(of, make(of, Choice())))[0] == "data"


def test_what_was_left_is_told_with_why(tmp_path: Path) -> None:
    found = result(
        net(nn.Linear(6, 4), nn.ReLU6(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), tmp_path,
        Choice(layers=("3",)),
    )  # fmt: skip

    assert [(item.where, item.reason) for item in found.left] == [
        ("1", "with a ceiling (--clipped changes these too)"),
        ("5", "not chosen"),
    ]


def test_a_ceiling_without_dead_units_was_not_chosen(tmp_path: Path) -> None:
    model = net(dead(nn.Linear(6, 4), slice(2)), nn.ReLU(), nn.Linear(4, 4), nn.ReLU6())
    with torch.no_grad():
        model[2].bias.fill_(5.0)
    found = result(model, tmp_path, Choice(only_dead=True, clipped=True))

    assert [(item.where, item.reason) for item in found.left] == [("3", "not chosen")]


def test_a_ceiling_stays(tmp_path: Path) -> None:
    model = net(nn.Linear(6, 4), nn.ReLU6(), nn.Linear(4, 4), nn.Hardtanh(0, 3, inplace=True))
    of = study(model, tmp_path)
    patched = make(of, Choice(Replacement(Kind.LEAKY, 0.1), clipped=True))
    found = examine(of, patched)
    with torch.no_grad():
        wanted = F.leaky_relu(model[2](F.leaky_relu(model[0](X), 0.1).clamp_max(6)), 0.1).clamp_max(3)
        assert torch.equal(patched.model(X), wanted)
    assert found.is_complete
    assert [site.after is not None for site in found.sites] == [True, True]


def test_learnt_slopes_are_parameters(tmp_path: Path) -> None:
    model = net(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    of = study(model, tmp_path)
    patched = make(of, Choice(Replacement(Kind.PRELU, 0.25)))

    assert examine(of, patched).is_complete
    assert patched.model[1].weight.requires_grad  # type: ignore[index,union-attr]
    assert patched.model[1].weight.dtype == torch.float64  # type: ignore[index,union-attr]


def test_calls_cannot_learn_a_slope(tmp_path: Path) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(6, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.act(self.fc(x)) - 0.1)

    found = result(Calls(), tmp_path, Choice(Replacement(Kind.PRELU, 0.25)))

    assert [site.change.site for site in found.sites] == ["act"]
    assert [item.where for item in found.skipped] == [":relu#1"]


def test_written_out_by_hand_is_listed(tmp_path: Path) -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.fc(x))
            x = x - 0.2
            return x * (x > 0)

    found = result(ByHand(), tmp_path)

    assert not found.is_complete
    assert "written out by hand" in found.skipped[0].reason


def test_the_model_and_its_memory_are_untouched(tmp_path: Path) -> None:
    from tests.test_no_trace import fingerprint

    model = net(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).train()
    model[0].weight.requires_grad_(False)
    before = fingerprint(model)
    result(model, tmp_path)

    assert fingerprint(model) == before
    assert not model[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_writes_over_its_input_is_compared_on_fresh_data(tmp_path: Path) -> None:
    found = result(net(nn.ReLU(inplace=True), nn.Linear(6, 3)), tmp_path, Choice(Replacement(Kind.LEAKY, 0.5)))

    assert found.drift is not None
    assert found.drift.relative > 0.05


def test_shared_layers_are_told_apart_by_path(tmp_path: Path) -> None:
    act = nn.ReLU()
    model = net(dead(nn.Linear(6, 5), slice(2)), act, dead(nn.Linear(5, 5), slice(4, 5)), act, nn.Linear(5, 3))
    of = study(model, tmp_path)
    patched = make(of, Choice(Replacement(Kind.LEAKY, 0.1), only_dead=True))
    found = examine(of, patched)
    with torch.no_grad():
        z = model[0](X)
        first = (z <= 0).all(dim=0)
        h = torch.where(first, F.leaky_relu(z, 0.1), F.relu(z))
        z = model[2](F.relu(model[0](X)))
        second = (z <= 0).all(dim=0)
        z = model[2](h)
        h = torch.where(second, F.leaky_relu(z, 0.1), F.relu(z))
        assert first.tolist() == [True, True, False, False, False]
        assert second.tolist() != first.tolist()
        assert torch.equal(patched.model(X), model[4](h))
    assert [site.change.modules for site in found.sites] == [("1",), ("3",)]
    assert all(site.after is not None for site in found.sites)
    assert model[1] is model[3]


def test_loaders_are_opened_for_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loading.py").write_text(
        "import torch\nopened = []\ndef loader():\n    opened.append(1)\n"
        "    generator = torch.Generator().manual_seed(len(opened))\n"
        "    for _ in range(5):\n        "
        "yield torch.randn(64, 6, generator=generator), torch.zeros(64, dtype=torch.long)\n"
    )
    model = net(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    loaded = LoadedModel(model, ModelIdentity(None, None, None, "object", "object"))
    scan = replace(ScanSettings(), data=f"{tmp_path / 'loading.py'}:loader")
    of = Study(ModuleTree(loaded, model), replace(Config(), scan=scan))
    found = examine(of, make(of, Choice()))

    assert found.drift is not None
    assert (found.drift.samples, found.drift.decisions) == (320, 320)
    assert found.drift.right_before is not None


def iterate(batches: Iterator[object]) -> int:
    return sum(1 for _ in batches)


SAMPLE_MODELS = Path(__file__).parent.parent / "sample_models"


def moved(net: nn.Sequential, alpha: float, x: Tensor) -> float:
    """Return how far the outputs of a net of torch move, on average, when every ReLU leaks."""
    layers = [nn.LeakyReLU(alpha) if isinstance(layer, nn.ReLU) else layer for layer in net]
    with torch.no_grad():
        old = net(x).double()
        return float(((nn.Sequential(*layers)(x).double() - old).norm(dim=1) / old.norm(dim=1)).mean())


@pytest.mark.parametrize("name", ["digits_mlp", "digits_mlp_healthy", "digits_cnn"])
def test_the_slope_that_is_found_is_within_5_percent_of_a_bisection(name: str) -> None:
    path = SAMPLE_MODELS / f"{name}.pt"
    loaded = open_model(path, LoadOptions())
    of = Study(ModuleTree(loaded, loaded.module), Config())
    found = make(of, Choice(), tolerance=0.01).search
    x = torch.from_numpy(np.load(path.with_suffix(".sample.npz"))["x"])
    low, high = -5.0, 0.0
    for _ in range(12):  # of the exponent: 5 / 2^12 of a decade is 0.3%
        middle = (low + high) / 2
        low, high = (middle, high) if moved(loaded.module, 10**middle, x) <= 0.01 else (low, middle)

    assert found is not None
    assert found.alpha == pytest.approx(10**low, rel=0.05)


def test_the_gradient_is_asked_of_some_samples_alone(tmp_path: Path) -> None:
    of = study(net(nn.Linear(6, 4), nn.ReLU()), tmp_path, batch_size=50)

    assert iterate(of.batches(120)) == 3
    assert iterate(of.batches()) == 8
