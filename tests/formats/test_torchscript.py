"""TorchScript programs: trust, names of sites, and what hides an activation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deadcheck
from deadcheck import LoadOptions
from deadcheck.errors import ForwardError, TrustRequired, UsageError
from deadcheck.formats.from_torchscript import load_program
from deadcheck.scripted import Program

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
TRUST = LoadOptions(trust=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.relu(self.conv(x)) + x)


class Net(nn.Module):
    """Blocks of one type, a shared activation, calls, a loop and a recurrent layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.fc = nn.Linear(4, 8)
        self.rnn = nn.RNN(8, 6, nonlinearity="relu", batch_first=True)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.cell = nn.GRUCell(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        y, _state = self.rnn(F.gelu(self.fc(x.mean((2, 3)))).unsqueeze(1))
        y, _states = self.lstm(y)
        h = torch.zeros(x.size(0), 3)
        for turn in range(3):  # noqa: B007 (TorchScript gives a name one type)
            h = self.cell(y[:, 0], h)
        return h.clamp(min=0)


def saved(program: torch.jit.ScriptModule, path: Path) -> Path:
    torch.jit.save(program, path)
    return path


def program(kind: str, model: nn.Module, x: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.script(model.eval()) if kind == "script" else torch.jit.trace(model.eval(), x, check_trace=False)


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_sites_are_those_of_the_eager_model(tmp_path: Path, kind: str) -> None:
    model, x = Net().eval(), torch.randn(11, 3, 8, 8)
    eager = deadcheck.scan(model, x, batch_size=4)

    diagnosis = deadcheck.scan(saved(program(kind, model, x[:4]), tmp_path / "m.pt"), x, batch_size=4, load=TRUST)

    assert [site.stats.site for site in diagnosis] == [site.stats.site for site in eager]
    for site, reference in zip(diagnosis, eager, strict=True):
        assert site.stats.zeros.tolist() == reference.stats.zeros.tolist()
        assert site.stats.first_fired.tolist() == reference.stats.first_fired.tolist()
    assert not diagnosis.measurement.skipped


class LastState(nn.Module):
    """Uses of a recurrent layer what ``pick`` takes of it; the rest of its outputs is not used at all."""

    def __init__(self, layer: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.pick = layer, pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "pick", "shape"),
    [
        (nn.GRU(5, 6, batch_first=True), lambda out: out[1][-1], (7, 4, 5)),
        (nn.GRU(5, 6, num_layers=2, bidirectional=True), lambda out: out[1][0], (4, 7, 5)),
        (nn.LSTM(5, 6, batch_first=True), lambda out: out[1][0][-1], (7, 4, 5)),
        (nn.LSTM(5, 6, batch_first=True), lambda out: out[1][1][-1], (7, 4, 5)),
        (nn.LSTM(5, 6, batch_first=True), lambda out: out[0].sum(1) + out[1][1][-1], (7, 4, 5)),
    ],
    ids=["gru", "gru of two layers and directions", "lstm, hidden", "lstm, cell state", "lstm, two of three"],
)
def test_a_traced_recurrent_layer_of_which_a_state_alone_is_used_is_counted_by_its_output(
    layer: nn.Module, pick: Callable[[Any], Tensor], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """A trace drops what is not used, so that the first thing that the layer returns is no longer its output."""
    model, x = LastState(layer, pick).eval(), torch.randn(*shape)
    size = len(x)  # of GRU's time-first input the samples are on axis 1, and one batch has them all
    path = saved(program("trace", model, x), tmp_path / "m.pt")

    (eager,), (traced,) = (deadcheck.scan(what, x, batch_size=size, load=TRUST) for what in (model, path))

    assert traced.stats.site == eager.stats.site
    assert (traced.stats.samples, traced.stats.observations) == (eager.stats.samples, eager.stats.observations)
    assert traced.stats.output_max.tolist() == eager.stats.output_max.tolist()


def test_a_live_program_is_measured_by_its_names_and_left_alone() -> None:
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    live = torch.jit.script(model)
    code = live.code

    diagnosis = deadcheck.scan(live, x)

    assert [site.stats.site for site in diagnosis] == [site.stats.site for site in deadcheck.scan(model, x)]
    assert live.code == code


def test_keys_are_stable_between_two_saves(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    keys = []
    for number in range(2):
        path = saved(torch.jit.script(Net().eval()), tmp_path / f"{number}.pt")
        keys.append([site.key for site in deadcheck.scan(path, x, load=TRUST)])

    assert keys[0] == keys[1]


def test_the_program_computes_the_same_with_marks(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    path = saved(torch.jit.script(model), tmp_path / "m.pt")
    marked = Program(load_program(path, TRUST))
    marked.mark()

    with torch.no_grad():
        assert marked.module(x).equal(torch.jit.load(path)(x))


def test_without_trust_it_is_refused_with_the_command(tmp_path: Path) -> None:
    path = saved(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), tmp_path / "m.pt")

    with pytest.raises(TrustRequired, match=r"is a TorchScript program, .* add --trust"):
        deadcheck.scan(path, torch.randn(3, 2))


def test_arch_does_not_go_with_a_program(tmp_path: Path) -> None:
    path = saved(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), tmp_path / "m.pt")

    with pytest.raises(UsageError, match="brings its own code"):
        deadcheck.scan(path, torch.randn(3, 2), load=LoadOptions(arch="a:b", trust=True))


def test_a_dropout_traced_in_training_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU()).train()
    path = saved(torch.jit.trace(model, torch.randn(2, 6), check_trace=False), tmp_path / "m.pt")

    diagnosis = deadcheck.scan(path, torch.randn(5, 6), load=TRUST)

    assert "1: drew a random mask, as dropout does in training" in diagnosis.measurement.warnings


def test_a_shared_weight_under_two_names_feeds_as_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.second(self.act(self.first(x))))

    x = torch.randn(9, 4)
    path = saved(torch.jit.trace(Tied().eval(), x), tmp_path / "m.pt")

    diagnosis = deadcheck.scan(path, x, load=TRUST)

    assert [(site.key, site.stats.site.fed_by, site.stats.observations) for site in diagnosis] == [
        ("act", ("first",), 18)
    ]


def test_data_of_the_wrong_shape_is_refused_with_what_the_operator_said(tmp_path: Path) -> None:
    path = saved(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU())), tmp_path / "m.pt")

    said = r"failed in 0 \(Linear\) at sample 0, given \(20, 5\) float32; in_features=3 .*: mat1 and mat2 shapes cannot"
    with pytest.raises(ForwardError, match=said):
        deadcheck.scan(path, torch.randn(20, 5), load=TRUST)


def test_what_a_program_raises_itself_is_told(tmp_path: Path) -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dim() != 3:
                raise ValueError("three axes, please")
            return F.relu(x)

    path = saved(torch.jit.script(Picky()), tmp_path / "m.pt")

    with pytest.raises(
        ForwardError, match=r"failed in Picky at sample 0, given \(20, 5\) float32: three axes, please;"
    ):
        deadcheck.scan(path, torch.randn(20, 5), load=TRUST)
