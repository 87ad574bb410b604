"""Batches run side by side give what they give one by one, and only where no bit can differ."""

from __future__ import annotations

import functools
import itertools
import math
import os
import pkgutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deadcheck
from deadcheck import kernel, leaps, passes, pipeline, side_by_side
from deadcheck.config import ScanSettings
from deadcheck.diagnosis import Diagnosis
from deadcheck.errors import ForwardError
from deadcheck.formats import open_live
from deadcheck.out_of_memory import DoesNotFit
from deadcheck.side_by_side import may_run_side_by_side
from deadcheck.sites import SUMS


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have two threads, as on a machine with two cores, and take eight batches for many."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(passes, "LONG", 8)
    monkeypatch.setattr(passes, "SLOW", 0.0)
    monkeypatch.setattr(passes, "GAIN", math.inf)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that ran a forward pass, one a pass."""
    seen: list[str] = []
    forward = passes.Passes._forward

    def noted(*args: object, **kwargs: object) -> None:
        seen.append(threading.current_thread().name)
        forward(*args, **kwargs)

    monkeypatch.setattr(passes.Passes, "_forward", noted)
    return seen


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


class Stacks(nn.Module):
    """Hands its input on through a list that is empty again in the end, as skip connections are at times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.skips = nn.Linear(4, 6), []

    def forward(self, x: Tensor) -> Tensor:
        self.skips.append(x)
        return torch.relu(self.layer(self.skips.pop()))


STACK: list[Tensor] = []


class StacksOutside(nn.Module):
    """Does so through a list that is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        STACK.append(x)
        return torch.relu(self.layer(STACK.pop()))


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
def test_side_by_side_counts_the_very_same(samples: int, threads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()

    together, alone = both_ways(model, torch.randn(samples, 1, 8, 8), monkeypatch)

    assert_equal(together, alone)
    assert sum(name.startswith("deadcheck") for name in threads) >= 4, "all but the first four"


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
def test_side_by_side_without_the_kernel_counts_the_very_same(
    act: type[nn.Module], threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "is_built", lambda: False)
    # A product of matrices may come out in other last bits on fewer threads; what layer norm does to a row cannot.
    model = nn.Sequential(nn.LayerNorm(512), act(), nn.LayerNorm(512), act()).eval()
    together, alone = both_ways(model, torch.randn(128, 64, 512), monkeypatch)

    assert_equal(together, alone)
    assert sum(name.startswith("deadcheck") for name in threads) >= 8, "the sums do not depend on the threads"


class Deep(nn.Module):
    """Differs on fewer threads from its second activation on; notes how far each pass came."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer(x))
        for depth in range(1, 6):
            note(depth)
            x = torch.relu(x + 1e-3 * torch.get_num_threads())
        return x


def note(depth: int) -> None:
    DEPTHS.append((threading.current_thread().name, depth))


DEPTHS: deque[tuple[str, int]] = deque()


def test_a_trial_ends_where_it_first_differs(threads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    DEPTHS.clear()
    monkeypatch.setattr(side_by_side, "_CONTAINERS", (list, dict, set))  # so that the notes do not count as state
    deadcheck.scan(Deep(), torch.rand(96, 4), batch_size=8)
    in_trial = [depth for name, depth in DEPTHS if name.startswith("deadcheck")]

    assert in_trial.count(1) >= 1
    assert in_trial.count(5) <= 1, "that of the pass that was not compared"
    assert sum(name == "MainThread" for name, _ in DEPTHS) == 12 * 5


@pytest.mark.parametrize("error", [ForwardError, DoesNotFit])
def test_an_error_in_a_trial_is_not_the_scans(
    error: type[Exception], threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = network(), torch.randn(96, 1, 8, 8)

    class Fails(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                raise torch.OutOfMemoryError if error is DoesNotFit else ValueError
            return super().forward(x)

    assert_equal(deadcheck.scan(Fails(*model), data, batch_size=8), both_ways(model, data, monkeypatch)[1])


def test_a_quick_pass_is_not_worth_a_second_thread(threads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SLOW", 3600.0)
    deadcheck.scan(network(), torch.randn(96, 1, 8, 8), batch_size=8)

    assert set(threads) == {"MainThread"}


def test_two_that_take_longer_than_one_after_the_other_are_not_run_again(
    threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "GAIN", 0.0)
    together, alone = both_ways(network(), torch.randn(256, 1, 8, 8), monkeypatch)

    assert_equal(together, alone)
    assert sum(name.startswith("deadcheck") for name in threads) == 2 + 13, "the trial, and a few of 32"


def test_sites_met_on_the_way_are_the_same_sites(threads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The first batch goes the first way; the second way is met in another thread, or in two at once.
    data = torch.randn(128, 4, generator=torch.Generator().manual_seed(3))
    data[0, 0] = 1.0
    together, alone = both_ways(Branching(), data, monkeypatch)

    assert_equal(together, alone)
    assert len(together.sites) == 2
    assert any(name.startswith("deadcheck") for name in threads)


@pytest.mark.parametrize("make", [Hands, Forgets, Stacks, StacksOutside, Draws])
def test_a_model_that_remembers_or_draws_runs_one_batch_at_a_time(
    make: type[nn.Module], threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = both_ways(make(), torch.randn(96, 4), monkeypatch)

    assert_equal(together, alone)
    assert not any(name.startswith("deadcheck") for name in threads)


def test_the_code_of_a_model_tells_whether_it_remembers() -> None:
    hooked = network()
    hooked[0].register_forward_hook(lambda *args: None)
    for model, may in ((network(), True), (Branching(), True), (Hands(), False), (Stacks(), False), (hooked, False)):
        assert may_run_side_by_side(model, model) is may
    scripted = torch.jit.script(network())
    assert not may_run_side_by_side(scripted, scripted)


def test_no_batch_runs_on_fewer_threads_where_that_would_change_a_bit(
    threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x) + 1e-7 * torch.get_num_threads())

    together, alone = both_ways(Counts(), torch.randn(96, 4), monkeypatch)

    assert_equal(together, alone)
    assert 1 <= sum(name.startswith("deadcheck") for name in threads) <= 2, "the trial"


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


def test_an_interrupted_scan_leaves_no_batch_running_and_the_threads_as_they_were(threads: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(done: int, total: int | None) -> None:
        if any(name.startswith("deadcheck") for name in threads):
            raise KeyboardInterrupt

    settings = ScanSettings(batch_size=8)
    loaded = open_live(model)
    with pytest.raises(KeyboardInterrupt) as caught:
        pipeline.measure(loaded, pipeline.open_data(torch.randn(256, 1, 9, 9), settings, loaded), settings, stop)

    assert caught.tb is not None  # the frames are still there
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deadcheck")]
    assert torch.get_num_threads() == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_what_a_model_writes_into_its_input_is_written_once(
    threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x.mul_(2)))

    data = torch.ones(96, 4)

    deadcheck.scan(Doubles(), data, batch_size=8)

    assert data.unique().tolist() == [2.0]
    assert set(threads) == {"MainThread"}


FEWER = """
import torch, deadcheck
torch.set_num_threads(2)
torch.manual_seed(0)
model, x = torch.nn.Sequential(torch.nn.Linear(8, 700), torch.nn.ReLU()), torch.randn(300, 8)
stats = deadcheck.scan(model, x, batch_size=300).sites[0].stats
with torch.no_grad():
    assert stats.zeros.tolist() == (model(x) == 0).sum(0).tolist()
"""


@pytest.mark.parametrize("setting", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true"])
def test_nothing_is_left_uncounted_where_openmp_gives_fewer_threads_than_torch_asks_for(setting: str) -> None:
    name, _, value = setting.partition("=")

    done = subprocess.run([sys.executable, "-c", FEWER], env={**os.environ, name: value}, capture_output=True)

    assert done.returncode == 0, done.stderr.decode()


CLIPS = [
    functools.partial(F.hardtanh, min_val=low, max_val=high) for low, high in ((0.0, 0.1), (-0.0, 6.0), (0.0, 1e-50))
]
"""Of the last the ceiling is 0 as a float."""


class Written(nn.Module):
    """ReLUs, clipped or not, on memory of many orders, whose very outputs are kept."""

    def __init__(self, keep: Callable[[Tensor], None], rectify: Callable[..., Tensor], *, in_place: bool) -> None:
        super().__init__()
        self.rectify, self.in_place = rectify, in_place
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        for z in (
            x,
            x.to(memory_format=torch.channels_last),
            x.flatten(2).transpose(1, 2),
            x[:, 1:],
            x[:, :, ::2],
            x.expand(2, *x.shape)[0],
            x.flatten(1),
        ):
            z = z.clone(memory_format=torch.preserve_format)
            version = z._version
            h = self.rectify(z, inplace=self.in_place)
            assert (h is z, z._version) == (self.in_place, version + self.in_place)
            self.keep(h)
        return x


@pytest.mark.parametrize("rectify", [F.relu, F.relu6, *CLIPS])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("special", [(), (math.nan, -math.nan), (math.inf, -math.inf), (-0.0, 1e-42, -1e-42, 3e30)])
def test_a_relu_that_is_counted_and_run_in_one_pass_gives_the_bits_of_torch(
    rectify: Callable[..., Tensor], in_place: bool, special: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    x.view(-1)[7 : 7 + 40 * len(special)] = torch.tensor([*special] * 40)
    bare: list[Tensor] = []
    seen: list[Tensor] = []
    with torch.no_grad():
        Written(bare.append, rectify, in_place=in_place)(x)

    twice = torch.cat([x, x])
    options = {"allow_nonfinite": True, "batch_size": 4}
    found = deadcheck.scan(Written(seen.append, rectify, in_place=in_place), twice, **options)  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "is_built", lambda: False)
        model = Written([].append, rectify, in_place=in_place)
        slowly = deadcheck.scan(model, twice, **options)  # type: ignore[arg-type]

    assert len(seen) == 2 * len(bare) == 14
    for mine, theirs in zip(seen, bare * 2, strict=True):
        assert mine.stride() == theirs.stride()
        finite = ~theirs.isnan()
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine[finite].view(torch.int32), theirs[finite].view(torch.int32))
    assert sum(int(site.stats.zeros.sum()) for site in found) == 2 * sum(int((h == 0).sum()) for h in bare)
    exact = ("zeros", "positive", "flat", "nonfinite", "fired", "first_fired", "input_min", "input_max", "output_min",
             "output_max")  # fmt: skip
    for site, slow in zip(found, slowly, strict=True):
        for name in exact:
            np.testing.assert_array_equal(getattr(site.stats, name), getattr(slow.stats, name), err_msg=name)
        for name in SUMS:
            np.testing.assert_allclose(getattr(site.stats, name), getattr(slow.stats, name), rtol=1e-5, atol=1e-3)


def test_waiting_for_data_and_running_the_model_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(passes.time, "perf_counter", lambda: now[0])

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            now[0] += 2.0
            return torch.relu(self.layer(x))

    def batches() -> Iterator[Tensor]:
        for _ in range(5):
            now[0] += 3.0
            yield torch.ones(2, 4)

    spent = deadcheck.scan(Slow(), batches()).measurement.spent

    assert (spent.data, spent.forward) == (15.0, 10.0)  # 5 batches, 3 s to read and 2 s to run each


class Timed(nn.Module):
    """Takes 2 s a pass by a clock of its own."""

    def __init__(self, now: list[float]) -> None:
        super().__init__()
        self.now = now
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.now[0] += 2.0
        return F.gelu(self.layer(x) * 2)


@pytest.mark.parametrize(
    ("what", "seconds"),
    [
        ("deadcheck.stats.SiteCounter.see_input", 2.5),
        ("deadcheck.stats.SiteCounter.see_output", 2.5),
        ("deadcheck.stats.SiteCounter.finish_batch", 2.5),
        ("deadcheck.boundary.OutputWatch.see", 2.5),
        ("deadcheck.leaps.Runner.find", 5.0),
        (
            "deadcheck.follower.Follower.repeats",
            3.5,
        ),  # of the product in each pass, and in the first of the layer's two
    ],
)
def test_the_time_of_counting_is_told_apart(what: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(passes.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(leaps, "_BUILT", False)
    owner, _, name = what.rpartition(".")
    cls = pkgutil.resolve_name(owner)
    run = getattr(cls, name)

    def slow(*args: object, **kwargs: object) -> object:
        now[0] += 0.5
        return run(*args, **kwargs)

    monkeypatch.setattr(cls, name, slow)

    spent = deadcheck.scan(Timed(now), torch.ones(10, 4), batch_size=2).measurement.spent

    assert (spent.counting, spent.forward) == (seconds, 10.0 + seconds)


def test_the_time_of_counting_is_that_of_all_threads(threads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(passes.time, "perf_counter", lambda: float(next(ticks)))  # so that each count takes some

    together, alone = both_ways(network(), torch.randn(96, 1, 8, 8), monkeypatch)

    assert any(name.startswith("deadcheck") for name in threads)
    assert together.measurement.spent.counting >= alone.measurement.spent.counting - 10 > 50


def test_side_by_side_the_two_add_up_to_the_time_of_the_reader(threads: list[str]) -> None:
    spent = deadcheck.scan(network(), torch.randn(96, 1, 8, 8), batch_size=8).measurement.spent

    assert any(name.startswith("deadcheck") for name in threads)
    assert spent.data > 0 < spent.forward
