"""A model run in another type, or under autocast, is counted as it computes there, and is afterwards what it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck import cli, passes
from deadcheck.errors import DataError, ForwardError, UsageError
from tests import oracle, zoo
from tests.test_counts import differences
from tests.test_no_trace import DATA, fingerprint, stateful

RUNS = [
    ("bfloat16", None), ("float16", None), ("float64", None), ("float32", None),
    ("model", "bfloat16"), ("model", "float16"),
]  # fmt: skip

KINDS = [
    zoo.Functional, zoo.ResidualBlock, zoo.SharedAct, zoo.Crelu, zoo.Tokens, zoo.Heads,
    zoo.ConvFlatten, zoo.Branches, zoo.ChannelsLast, zoo.Reparametrised, zoo.NotFinite, zoo.Sliced, zoo.SqueezeExcite,
    zoo.Looped, zoo.Ensemble, zoo.Modulated,
]  # fmt: skip
"""Models whose reference computes the very bits of the model in every type."""


def autocast(name: str | None) -> AbstractContextManager[object]:
    return nullcontext() if name is None else torch.autocast("cpu", getattr(torch, name), cache_enabled=False)


def named(dtype: str, cast: str | None) -> str:
    own = "float32" if dtype == "model" else dtype
    return own if cast is None else f"autocast {cast}" if own == "float32" else f"{own}, autocast {cast}"


def held(model: nn.Module) -> list[object]:
    tensors = model.state_dict(keep_vars=True).items()
    return [(name, id(t), t.data_ptr(), t.dtype, t.detach().numpy().tobytes()) for name, t in tensors]


@pytest.mark.parametrize(("dtype", "cast"), RUNS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_counts_are_those_of_the_model_in_that_type(kind: type[zoo.Zoo], dtype: str, cast: str | None) -> None:
    model, own, data = zoo.build(kind), zoo.build(kind), zoo.inputs(kind, 23)
    before, given = held(model), data
    if dtype != "model":
        own, given = own.to(getattr(torch, dtype)), data.to(getattr(torch, dtype))
    with torch.no_grad(), autocast(cast):
        theirs = own.reference(oracle.Oracle(), given)
        assert torch.equal(own(given.clone()).nan_to_num(7.0), theirs.nan_to_num(7.0))
        expected = oracle.observe(own.reference, given, 7)

    diagnosis = deadcheck.scan(model, data, batch_size=7, dtype=dtype, autocast=cast)

    assert {site.key for site in diagnosis} == set(expected)
    for key, counts in expected.items():
        assert differences(diagnosis.site(key).stats, counts) == [], key
    assert diagnosis.measurement.env.dtype == named(dtype, cast)
    assert not [w for w in diagnosis.measurement.warnings if "guessed" in w or "told apart" in w or "cast" in w]
    assert held(model) == before


class Watched(nn.Module):
    """Keeps what a model gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        OUTPUTS.append(y[0] if isinstance(y, tuple) else y)
        return y


OUTPUTS: list[Tensor] = []


@pytest.mark.parametrize("cast", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [zoo.EncoderLayer, zoo.GraphMixing, zoo.RecurrentRelu, zoo.Cell, zoo.Neighbours])
def test_operators_that_call_others_do_so_under_autocast(kind: type[zoo.Zoo], cast: str) -> None:
    # In the handler of a dispatch mode torch has autocast off, and what such an operator calls would stay float32.
    model, data = Watched(zoo.build(kind)), zoo.inputs(kind, 7)
    OUTPUTS.clear()
    with torch.no_grad(), autocast(cast):
        model(data)

    deadcheck.scan(model, data, batch_size=7, autocast=cast)

    bare, scanned = OUTPUTS
    assert scanned.dtype is bare.dtype
    assert torch.equal(scanned, bare)


class Within(nn.Module):
    """Has a part that runs under autocast, and in that one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.layer(x)
            with torch.autocast("cpu", enabled=False):
                return torch.cat([y.float(), self.layer(x)])


@pytest.mark.parametrize("cast", [None, "float16"])
def test_a_model_with_autocast_of_its_own_keeps_it(cast: str | None) -> None:
    torch.manual_seed(0)
    model, data = Watched(Within().eval()), torch.randn(4, 3, 8)
    OUTPUTS.clear()
    with torch.no_grad(), autocast(cast):
        model(data)

    deadcheck.scan(model, data, autocast=cast)

    assert torch.equal(*OUTPUTS)


def tied() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_that_are_shared_stay_shared_while_they_are_cast(dtype: str) -> None:
    model = tied()
    seen: list[tuple[object, ...]] = []
    model.register_forward_hook(lambda m, *_: seen.append((m[0].weight is m[2].weight, m[0].weight.dtype)))

    deadcheck.scan(model, torch.randn(8, 6), dtype=dtype)

    assert seen == [(True, getattr(torch, dtype))]
    assert model[0].weight is model[2].weight
    assert model[0].weight.dtype is torch.float32


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_the_list_of_weights_that_an_rnn_keeps_is_cast_and_put_back(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model, data = kind(3, 5, num_layers=2, batch_first=True), torch.randn(7, 4, 3)
    before, flat = fingerprint(model), [id(weight) for weight in model._flat_weights]

    found = deadcheck.scan(model, data, dtype="bfloat16")

    assert found.measurement.env.dtype == "bfloat16"
    assert [id(weight) for weight in model._flat_weights] == flat
    assert fingerprint(model) == before


@pytest.mark.parametrize(("dtype", "cast"), RUNS)
def test_a_scan_in_another_type_leaves_no_trace(dtype: str, cast: str | None) -> None:
    model = stateful()
    before, state = fingerprint(model), held(model)

    deadcheck.scan(model, DATA, batch_size=10, dtype=dtype, autocast=cast)

    assert fingerprint(model) == before
    assert held(model) == state


class Breaks(nn.Module):
    """Fails in its third pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("the model broke")
        return torch.relu(self.layer(x))


@pytest.mark.parametrize("around", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("make", [stateful, Breaks])
def test_autocast_is_afterwards_as_it_was(make: type[nn.Module], around: str | None) -> None:
    def state() -> list[object]:
        return [
            *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")), torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(), torch._C._is_any_autocast_enabled(),
        ]  # fmt: skip

    model = make()
    with nullcontext() if around is None else torch.autocast("cpu", getattr(torch, around)):
        before, own = state(), held(model)
        with pytest.raises(ForwardError, match="the model broke") if make is Breaks else nullcontext():
            deadcheck.scan(model, DATA, batch_size=10, autocast="float16")
        assert state() == before
        assert held(model) == own


@pytest.mark.parametrize("cast", [None, "float16"])
def test_the_callers_store_of_cast_weights_is_neither_used_nor_added_to(cast: str | None) -> None:
    model, x = zoo.build(zoo.Functional), zoo.inputs(zoo.Functional, 9)
    with autocast(cast or "bfloat16"), torch.no_grad():
        expected = oracle.observe(model.reference, x, 9)

    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()  # fills the store
        diagnosis = deadcheck.scan(model, x, autocast=cast)
        again = zoo.build(zoo.Functional)
        deadcheck.scan(again, x, autocast=cast)
        again(x).sum().backward()

    for key, counts in expected.items():
        assert differences(diagnosis.site(key).stats, counts) == [], key
    assert diagnosis.measurement.env.dtype == f"autocast {cast or 'bfloat16'}"
    assert all(parameter.grad is not None for parameter in again.parameters())


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Have two threads, and take eight batches for many; gives an entry for each pass beside another."""
    before, forward = torch.get_num_threads(), passes.Passes._forward
    torch.set_num_threads(2)
    monkeypatch.setattr(passes, "LONG", 8)
    monkeypatch.setattr(passes, "SLOW", 0.0)
    monkeypatch.setattr(passes, "GAIN", math.inf)
    beside: list[bool] = []

    def noted(run: passes.Passes, piece: object, probe: object, **kwargs: object) -> None:
        if passes.threading.current_thread().name.startswith("deadcheck"):
            beside.append(True)
        forward(run, piece, probe, **kwargs)

    monkeypatch.setattr(passes.Passes, "_forward", noted)
    yield beside
    torch.set_num_threads(before)


@pytest.mark.parametrize("around", [None, "bfloat16"])
@pytest.mark.parametrize(("dtype", "cast"), RUNS)
def test_side_by_side_counts_the_very_same(
    dtype: str, cast: str | None, around: str | None, two_threads: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.GELU())
    data = torch.randn(131, 1, 8, 8)

    with autocast(around):
        together = deadcheck.scan(model, data, batch_size=8, dtype=dtype, autocast=cast)
        assert two_threads or dtype == "float64"  # whose last bits may depend on the threads
        monkeypatch.setattr(passes, "LONG", 10**9)
        alone = deadcheck.scan(model, data, batch_size=8, dtype=dtype, autocast=cast)

    assert all(a.stats.equals(b.stats) for a, b in zip(together.sites, alone.sites, strict=True))
    assert together.measurement.env == alone.measurement.env


def traced(model: nn.Module, x: Tensor) -> object:
    return torch.jit.trace(model, x, check_trace=False)


def exported(model: nn.Module, x: Tensor) -> object:
    return torch.export.export(model, (x,))


@pytest.mark.parametrize("make", [traced, exported])
def test_a_program_runs_under_autocast_and_is_not_cast(make: Callable[[nn.Module, Tensor], object]) -> None:
    model, x = zoo.build(zoo.Functional), zoo.inputs(zoo.Functional, 7)
    program = make(model, x)
    eager = deadcheck.scan(model, x, autocast="bfloat16", batch_size=7)

    found = deadcheck.scan(program, x, autocast="bfloat16", batch_size=7)
    deadcheck.scan(program, x, dtype="float32", batch_size=7)  # what it is
    with pytest.raises(UsageError, match=r"is a program.*cannot be cast to bfloat16; leave out --dtype"):
        deadcheck.scan(program, x, dtype="bfloat16", batch_size=7)

    assert [s.stats.zeros.tolist() for s in found] == [s.stats.zeros.tolist() for s in eager]
    assert found.measurement.env.dtype == "autocast bfloat16"


def test_a_scripted_part_of_a_model_is_not_cast_either() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.ReLU())

    with pytest.raises(UsageError, match="is a program"):
        deadcheck.scan(model, torch.randn(4, 4), dtype="float16")


def test_lazy_layers_get_weights_of_that_type() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3))

    found = deadcheck.scan(model, torch.randn(8, 4), dtype="bfloat16")

    assert found.measurement.env.dtype == "bfloat16"
    assert isinstance(model[0], nn.LazyLinear)


def test_a_weight_that_cannot_be_cast_is_told_and_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(zoo.Functional)
    before = held(model)

    def no_room(*args: object) -> Tensor:
        raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(Tensor, "to", no_room)
    with pytest.raises(ForwardError, match=r"the weight 'weight' of a Linear cannot be cast to float64 .*memory"):
        deadcheck.scan(model, zoo.inputs(zoo.Functional, 7), dtype="float64")
    monkeypatch.undo()

    assert held(model) == before


def test_dtypes_are_taken_as_torch_has_them_too() -> None:
    found = deadcheck.scan(tied(), torch.randn(8, 6), dtype=torch.bfloat16, autocast=torch.float16)

    assert found.measurement.env.dtype == "bfloat16, autocast float16"


def test_values_beyond_float16_are_told_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"clean the data \(float16 ends at 65504\), or"):
        deadcheck.scan(tied(), torch.full((4, 6), 1e6), dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of model, float32, float64, bfloat16, float16"),
        ({"dtype": ""}, "dtype '' is not one of model, float32"),
        ({"autocast": "float32"}, "autocast 'float32' is not one of bfloat16, float16"),
        ({"dtype": "float64", "autocast": "bfloat16"}, "--autocast leaves float64 weights as they are; add --dtype fl"),
        ({"device": "meta", "autocast": "bfloat16"}, "--autocast cannot be used on meta"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deadcheck.scan(tied(), torch.randn(8, 6), **options)


# The command line.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4), nn.ReLU())
    with torch.no_grad():
        model[0].bias[:3] = -100.0
    torch.save(model, tmp_path / "net.pt")
    np.savez(tmp_path / "net.sample.npz", x=torch.randn(320, 6).numpy())
    return tmp_path / "net.pt"


def run(*args: str) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["deadcheck", *args])
        with pytest.raises(SystemExit) as done:
            cli.main()
    return int(done.value.code or 0)


@pytest.mark.parametrize("command", ["scan", "gate"])
def test_the_command_line_casts(command: str, saved: Path, tmp_path: Path) -> None:
    given = [str(saved), "--dtype", "bfloat16", "--autocast", "float16", "-q", "-o", f"json={tmp_path / 'r.json'}"]

    assert run(command, *given) == 0

    told = json.loads((tmp_path / "r.json").read_text())
    assert "bfloat16, autocast float16" in json.dumps(told)


@pytest.mark.parametrize("command", [("scan",), ("gate",), ("patch", "--dry-run"), ("compare",), ("plot", "alpha")])
def test_bad_types_are_refused_by_every_command(command: tuple[str, ...], saved: Path, capsys) -> None:
    assert run(*command, str(saved), "--dtype", "half") == 2
    assert "--dtype: 'half' is not one of model, float32, float64, bfloat16, float16" in capsys.readouterr().err
    assert run(*command, str(saved), "--autocast", "int8") == 2
    assert "--autocast: 'int8' is not one of bfloat16, float16" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["out.pt", "out.pt2"])
def test_a_patch_is_measured_in_that_type_and_written_in_the_models_own(
    output: str, saved: Path, tmp_path: Path
) -> None:
    report = tmp_path / "p.json"
    given = ["--dtype", "bfloat16", "--alpha", "0.01", "-q", "-o", str(tmp_path / output)]

    assert run("patch", str(saved), *given, "--save-report", f"json={report}") == 0

    assert '"bfloat16"' in report.read_text()
    assert deadcheck.scan(tmp_path / output, torch.randn(8, 6)).measurement.env.dtype == "float32"


@pytest.mark.parametrize("command", [("compare",), ("plot", "alpha")])
@pytest.mark.parametrize("option", [("--dtype", "bfloat16"), ("--autocast", "bfloat16"), ("--dtype", "float64")])
def test_what_shows_a_model_runs_it_in_that_type(
    command: tuple[str, ...], option: tuple[str, str], saved: Path
) -> None:
    assert run(*command, str(saved), *option, "--alpha", "0.01", "-q") == 0


def test_a_checkpoint_of_another_type_is_refused(saved: Path, tmp_path: Path, capsys) -> None:
    kept = str(tmp_path / "s.part")
    assert run("scan", str(saved), "-q", "--checkpoint", kept) == 0
    assert run("scan", str(saved), "-q", "--checkpoint", kept, "--autocast", "bfloat16") == 2
    assert 'is "float32" in one and "autocast bfloat16" in the other' in capsys.readouterr().err.replace("\n", " ")
