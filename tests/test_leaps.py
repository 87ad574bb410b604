"""Layers that run unwatched, once it is known what they do, change no count and no site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import deadcheck
from deadcheck import leaps
from deadcheck.errors import ForwardError
from deadcheck.leaps import Leaps
from deadcheck.meter import Meter
from deadcheck.probe import Probe
from deadcheck.sites import UNKNOWN
from tests.test_no_trace import fingerprint


@pytest.fixture(scope="module", params=["compiled", "python"], autouse=True)
def way_of_leaping(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with the compiled runner, and with the one in Python."""
    if request.param == "compiled" and not leaps._BUILT:
        pytest.skip("the runner was not built here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaps, "_BUILT", request.param == "compiled")
        yield


X = torch.randn(40, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two convolutions and a head; what a test changes from pass to pass is done in ``meddle``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2)
        self.pool, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
        self.spare = nn.Parameter(torch.randn(6, 8))
        self.calls = 0

    def meddle(self, x: Tensor) -> None:
        """Do nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.meddle(x)
        x = torch.relu(self.norm(self.one(x)))
        return F.gelu(self.head(self.flat(self.pool(F.relu(self.two(x))))))


class Strides(Network):
    def meddle(self, x: Tensor) -> None:
        self.one.stride = (1 + self.calls % 2,) * 2


class Regroups(Network):
    """The output has the same shape, and another meaning: two channels of a group of their own, or of all."""

    def meddle(self, x: Tensor) -> None:
        groups = 2 if self.calls % 3 else 1
        self.two.groups = groups
        self.two.weight = nn.Parameter(self.two.weight.detach()[:, :4].repeat(1, 2 // groups, 1, 1))


class Swaps(Network):
    def meddle(self, x: Tensor) -> None:
        if self.calls == 3:
            self.head.weight = self.spare


class Hooked(Network):
    """From the third pass on the output of a layer goes through a ReLU that a hook runs."""

    def meddle(self, x: Tensor) -> None:
        if self.calls == 3:
            self.one.register_forward_hook(lambda layer, args, output: torch.relu(output))


class Patched(Network):
    def meddle(self, x: Tensor) -> None:
        if self.calls == 3:
            forward = self.one.forward
            self.one.forward = lambda x: torch.relu(forward(x))


class RectifiedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Subclassed(Network):
    def __init__(self) -> None:
        super().__init__()
        self.one = RectifiedConv(3, 8, 3)


class Bereft(Network):
    """Has lost what the file of an older torch may lack, and a forward pass does not need."""

    def __init__(self) -> None:
        super().__init__()
        del vars(self.one)["in_channels"], vars(self.two)["output_padding"]

    def meddle(self, x: Tensor) -> None:
        if self.calls == 4:
            del vars(self.norm)["num_features"], vars(self.norm)["affine"]


class Backwards(Network):
    """Turns round the order of its layers with the data."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = torch.relu(self.norm(self.one(x)))
        layers = (self.pool, self.flat) if self.calls % 2 else (self.flat, nn.Unflatten(1, x.shape[1:]), self.pool)
        for layer in layers:
            x = layer(x)
        return F.gelu(self.head(x.flatten(1)))


class Tanhs(TorchDispatchMode):
    """Gives every product a tanh that the model does not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return torch.tanh(output) if func is torch.ops.aten.addmm.default else output


class Opens(Network):
    """Runs its head under a mode of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(self.pool(torch.relu(self.norm(self.one(x)))))
        with Tanhs():
            return self.head(x)


class Modules(Network):
    """Has modules for activations, one of them for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.bend = nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.meddle(x)
        x = self.act(self.norm(self.one(x)))
        return self.bend(self.head(self.flat(self.pool(self.act(self.two(x))))))


class InPlace(Modules):
    def meddle(self, x: Tensor) -> None:
        self.act.inplace = self.calls % 2 == 0


class Approximates(Modules):
    def meddle(self, x: Tensor) -> None:
        self.bend.approximate = "tanh" if self.calls > 2 else "none"


class Slopes(Modules):
    """Has another slope from the third pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.01)

    def meddle(self, x: Tensor) -> None:
        self.act.negative_slope = 0.1 if self.calls > 2 else 0.01


class Listens(Modules):
    """From the third pass on the output of an activation is another."""

    def meddle(self, x: Tensor) -> None:
        if self.calls == 3:
            self.act.register_forward_hook(lambda module, args, output: output - 1)


class Sides(Network):
    """Calls one module on the very same values at two places, in turn the one or the other first."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.one(x)
        low = self.act(-x) if self.calls % 2 else None
        high = self.act(-x)
        low = self.act(-x) if low is None else low
        return (low + high).mean((2, 3))


class Doubles(Modules):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.one(x)
        return self.act(x.double() if self.calls % 2 else x).float().mean((2, 3))


class Capped(TorchFunctionMode):
    """Runs ReLU6 for ReLU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return F.relu6(args[0]) if func is F.relu else func(*args, **(kwargs or {}))


class Overridden(Modules):
    def forward(self, x: Tensor) -> Tensor:
        with Capped() if self.calls > 2 else nullcontext():
            return super().forward(x)


KINDS = [
    Modules,
    InPlace,
    Approximates,
    Slopes,
    Listens,
    Sides,
    Doubles,
    Overridden,
    Network,
    Strides,
    Regroups,
    Swaps,
    Hooked,
    Patched,
    Subclassed,
    Bereft,
    Backwards,
    Opens,
]


@pytest.mark.parametrize("stats", ["full", "verdict"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_that_of_a_scan_that_watches_everything(
    kind: type[Network], stats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leapt = deadcheck.scan(kind(), X, batch_size=6, stats=stats)
    monkeypatch.setattr(Leaps, "end", lambda *args: None)
    watched = deadcheck.scan(kind(), X, batch_size=6, stats=stats)

    assert [site.stats.site for site in leapt] == [site.stats.site for site in watched]
    assert all(a.stats.equals(b.stats) for a, b in zip(leapt, watched, strict=True))
    assert leapt.measurement.skipped == watched.measurement.skipped


def operators(model: nn.Module, passes: int, monkeypatch: pytest.MonkeyPatch, data: Tensor = X) -> list[list[str]]:
    """Return the operators of which the probe was told, pass by pass."""
    told: list[list[str]] = []
    dispatch = Probe.dispatch

    def noted(self: Probe, func: Any, args: Any, kwargs: Any) -> Any:
        told[-1].append(func.overloadpacket.__name__)
        return dispatch(self, func, args, kwargs)

    monkeypatch.setattr(Probe, "dispatch", noted)
    with Probe(model.eval()) as probe:
        for _ in range(passes):
            told.append([])
            with probe.batch((data,), {}, samples=len(data), first_sample=0):
                model(data)
    return told


def test_a_layer_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *later = operators(Network(), 4, monkeypatch)

    assert {"convolution", "native_batch_norm", "addmm"} <= set(first)
    assert not [name for names in later for name in names if name in ("convolution", "native_batch_norm", "addmm")]
    assert all("gelu" in names and "relu" in names for names in later)


def test_an_activation_that_is_a_module_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *later = operators(Modules(), 4, monkeypatch)

    assert {"relu", "gelu"} <= set(first)
    assert later == [[]] * 3


def test_an_activation_whose_units_are_settled_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = Modules(), []
    model.bend, run = nn.Tanh(), Meter.run_as
    model.eval()
    monkeypatch.setattr(Meter, "run_as", lambda self, step, *args: counted.append(step) or run(self, step, *args))
    with Probe(model, stats="verdict") as probe:
        for number in range(5):
            with probe.batch((X,), {}, samples=len(X), first_sample=40 * number):
                model(X)
        settled = [site.site.key for site in probe.stats() if (site.fired == UNKNOWN).all()]
    assert settled == ["act#1", "act#2", "bend"]
    assert counted == []
    assert all(site.samples == 200 for site in probe.stats())


def test_a_settled_activation_that_bends_is_recognised_in_what_is_written_out_by_hand() -> None:
    class Swish(Modules):
        def __init__(self) -> None:
            super().__init__()
            self.bend = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = self.head(self.flat(self.pool(self.one(x))))
            gate = self.bend(x)
            return x * gate if self.calls > 4 else gate

    found = deadcheck.scan(Swish(), X[:36], batch_size=6, stats="verdict")
    assert [item.what for item in found.measurement.skipped if item.what == "aten.mul"] == ["aten.mul"]


class Unequal:
    """A value that cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("not comparable")

    __hash__ = None  # type: ignore[assignment]


def test_what_cannot_be_compared_is_told_as_it_is() -> None:
    model = Network().eval()
    with Probe(model) as probe:
        for _ in range(2):
            with probe.batch((X,), {}, samples=len(X), first_sample=0):
                model(X)
        model.one.padding = Unequal()
        with pytest.raises(ValueError, match=r"^not comparable$"), probe.batch((X,), {}, samples=40, first_sample=40):
            model(X)
        assert probe.seconds >= probe._runner.seconds > 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_an_unwatched_activation_leaves_nothing_behind(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Modules().eval()
    before = fingerprint(model)
    run, times = Meter.run_as, []

    def failing(self: Meter, *args: Any) -> Tensor:
        times.append(torch._C._len_torch_dispatch_stack())
        if len(times) == 5:
            raise error("stopped")
        return run(self, *args)

    monkeypatch.setattr(Meter, "run_as", failing)
    with pytest.raises(ForwardError if error is ValueError else error, match=r"(?s)act.*stopped|^stopped$"):
        deadcheck.scan(model, X, batch_size=6)

    assert times == [0] * 5
    assert torch._C._len_torch_dispatch_stack() == 0
    model.calls = 0
    assert fingerprint(model) == before


def test_a_layer_with_a_hook_or_a_forward_of_its_own_is_watched_always(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Hooked, Patched):
        *_, last = operators(kind(), 5, monkeypatch)
        assert last.count("convolution") == 1, kind


def test_other_peoples_hooks_on_all_modules_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: torch.tanh(output) if isinstance(module, nn.Conv2d) else None
    )
    try:
        diagnosis = deadcheck.scan(Network(), X, batch_size=6)
    finally:
        handle.remove()

    assert [site.stats.samples for site in diagnosis if "tanh" in site.key] == [len(X), len(X)]


def interrupting(error: type[BaseException]) -> Callable[..., None]:
    def run(*args: Any) -> None:
        raise error("stopped")

    return run


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_an_unwatched_layer_leaves_nothing_behind(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Network().eval()
    before = fingerprint(model)
    forward, times = nn.Conv2d._conv_forward, []

    def failing(self: nn.Conv2d, *args: Any) -> Tensor:
        times.append(torch._C._len_torch_dispatch_stack())
        if len(times) == 6:
            raise error("stopped")
        return forward(self, *args)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", failing)
    with pytest.raises(ForwardError if error is ValueError else error, match=r"(?s)two.*stopped|^stopped$"):
        deadcheck.scan(model, X, batch_size=6)

    assert times == [1, 1, 0, 0, 0, 0]
    assert torch._C._len_torch_dispatch_stack() == 0
    model.calls = 0
    assert fingerprint(model) == before


TOKENS = torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """Two encoder layers, which torch runs as one operator each."""

    def __init__(self, activation: str = "gelu", *, norm_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation, norm_first=norm_first, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.calls = 0

    def mask(self, x: Tensor) -> Tensor | None:
        """Return nothing."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x, self.mask(x))


class Masked(Encoder):
    """Has a mask of its own in every pass from the third on."""

    def mask(self, x: Tensor) -> Tensor | None:
        return torch.arange(5) > self.calls + torch.arange(5)[:, None] if self.calls > 2 else None


class Reweighted(Encoder):
    """Has other weights of its first layer from the third pass on."""

    def mask(self, x: Tensor) -> Tensor | None:
        first, second = self.layers.layers
        if self.calls == 3:
            first.linear1.weight = second.linear1.weight
        return None


class Halved(Encoder):
    """The same layers see half of the tokens in every other pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x[:, : 2 + self.calls % 2].contiguous())


def test_an_encoder_layer_is_watched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for activation in ("gelu", "relu"):
        monkeypatch.undo()
        model = Encoder(activation).eval()
        first, *later = operators(model, 3, monkeypatch, TOKENS)
        assert activation + "_" in first
        assert later == [["_transformer_encoder_layer_fwd"] * 2] * 2


@pytest.mark.parametrize("kind", [Encoder, Masked, Reweighted, Halved])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_figure_of_an_encoder_is_that_of_a_scan_that_watches_everything(
    kind: type[Encoder], activation: str, norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leapt = deadcheck.scan(kind(activation, norm_first=norm_first), TOKENS, batch_size=6)
    monkeypatch.setattr(Leaps, "end", lambda *args: None)
    monkeypatch.setattr(Leaps, "find_fused", lambda *args: None)
    watched = deadcheck.scan(kind(activation, norm_first=norm_first), TOKENS, batch_size=6)

    assert [site.stats.site for site in leapt] == [site.stats.site for site in watched]
    assert all(a.stats.equals(b.stats) for a, b in zip(leapt, watched, strict=True))
    assert leapt.measurement.skipped == watched.measurement.skipped


def test_time_is_not_counted_twice_for_a_fork_that_has_not_run() -> None:
    model = Network().eval()
    with Probe(model) as probe:
        for _ in range(2):
            with probe.batch((X,), {}, samples=len(X), first_sample=0):
                model(X)
        before = probe.seconds
        probe.adopt(probe.fork())
        assert probe.seconds == before > 0
