"""Models whose weights accelerate brings in for each call are counted and named as in memory, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck.errors import ForwardError
from deadcheck.probe import Probe
from tests import oracle, zoo
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
