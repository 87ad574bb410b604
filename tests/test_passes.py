"""Batches run side by side give what they give one by one, and only where no bit can differ."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck import passes
from deadcheck.diagnosis import Diagnosis
from deadcheck.errors import ForwardError
from deadcheck.side_by_side import may_run_side_by_side


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have two threads, as on a machine with two cores, and take eight batches for many."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(passes, "LONG", 8)
    yield
    torch.set_num_threads(before)


class Watched(nn.Module):
    """Remembers, outside of itself, the names of the threads that run it."""

    def __init__(self, model: nn.Module, seen: list[str]) -> None:
        super().__init__()
        self.model = model
        self.note = seen.append

    def forward(self, x: Tensor) -> Tensor:
        self.note(threading.current_thread().name)
        result: Tensor = self.model(x)
        return result


class Branching(nn.Module):
    """Goes one of two ways, as the first sample says."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x)) if x[0, 0] > 0 else torch.relu(self.two(x))


class Hands(nn.Module):
    """Hands its input from one line to the next through an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.keep(x)
        y = torch.relu(self.layer(self.held))
        self.held = None
        return y

    def keep(self, x: Tensor) -> None:
        self.held = x


class Forgets(Hands):
    """Keeps what it was given last."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["held"] = x
        return torch.relu(self.layer(x))


class Draws(nn.Module):
    """Adds noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x) + torch.randn(6))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.GELU(), nn.Linear(16, 4)
    )


def both_ways(model: nn.Module, data: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Diagnosis, Diagnosis]:
    """Scan side by side as far as that goes, and one by one."""
    together = deadcheck.scan(model, data, batch_size=8)
    monkeypatch.setattr(passes, "LONG", 10**9)
    return together, deadcheck.scan(model, data, batch_size=8)


def assert_equal(a: Diagnosis, b: Diagnosis) -> None:
    assert [d.stats.site for d in a.sites] == [d.stats.site for d in b.sites]
    assert all(x.stats.equals(y.stats) for x, y in zip(a.sites, b.sites, strict=True))
    assert a.measurement.output_constant == b.measurement.output_constant
    assert a.measurement.inputs == b.measurement.inputs


@pytest.mark.parametrize("samples", [64, 67, 131])
def test_side_by_side_counts_the_very_same(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    model = Watched(network(), threads)

    together, alone = both_ways(model, torch.randn(samples, 1, 8, 8), monkeypatch)

    assert_equal(together, alone)
    assert any(name.startswith("deadcheck") for name in threads)


def test_sites_met_on_the_way_are_the_same_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first batch goes the first way; the second way is met in another thread, or in two at once.
    data = torch.randn(128, 4, generator=torch.Generator().manual_seed(3))
    data[0, 0] = 1.0
    threads: list[str] = []

    together, alone = both_ways(Watched(Branching(), threads), data, monkeypatch)

    assert_equal(together, alone)
    assert len(together.sites) == 2
    assert any(name.startswith("deadcheck") for name in threads)


@pytest.mark.parametrize("make", [Hands, Forgets, Draws])
def test_a_model_that_remembers_or_draws_runs_one_batch_at_a_time(
    make: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    together, alone = both_ways(Watched(make(), threads), torch.randn(96, 4), monkeypatch)

    assert_equal(together, alone)
    assert not any(name.startswith("deadcheck") for name in threads)


def test_the_code_of_a_model_tells_whether_it_remembers() -> None:
    hooked = network()
    hooked[0].register_forward_hook(lambda *args: None)
    for model, may in ((network(), True), (Branching(), True), (Hands(), False), (hooked, False)):
        assert may_run_side_by_side(model, model) is may
    scripted = torch.jit.script(network())
    assert not may_run_side_by_side(scripted, scripted)


def test_no_batch_runs_on_fewer_threads_where_that_would_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x) + 1e-7 * torch.get_num_threads())

    threads: list[str] = []

    together, alone = both_ways(Watched(Counts(), threads), torch.randn(96, 4), monkeypatch)

    assert_equal(together, alone)
    assert not any(name.startswith("deadcheck") for name in threads)


def test_the_first_batch_that_fails_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            if bool((x > 100).any()):
                raise ValueError("too large")
            return torch.relu(self.layer(x))

    data = torch.randn(160, 4)
    data[75:] = 1000.0  # batch 9 of 8 samples, from sample 72 on, and all after it

    with pytest.raises(ForwardError, match=r"at sample 72.*too large"):
        deadcheck.scan(Fails(), data, batch_size=8)

    assert torch.get_num_threads() == 2
    assert deadcheck.scan(network(), torch.randn(64, 1, 8, 8), batch_size=8).sites
