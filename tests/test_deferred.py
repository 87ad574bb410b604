"""On a device that runs on its own the scan gives the same report, and reads nothing from the device before its end.

No such device is needed: the counters that would be used there run on a CPU, and a mode forbids what would wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deadcheck
from deadcheck.layout import plan, positions, samples, units
from deadcheck.scratch import Scratch
from deadcheck.sites import SUMS, Family, Site
from deadcheck.stats import Rows, SiteCounter
from tests.test_stats import ACTIVATIONS
from tests.test_stats_levels import Kinds, planted
from tests.zoo import ZOO, build, inputs

COUNTS = ("zeros", "positive", "flat", "fired", "first_fired", "nonfinite", "input_min", "input_max")


@pytest.fixture
def deferring() -> Iterator[None]:
    """Count as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deadcheck.stats.runs_on_its_own", lambda device: True)
        yield


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_every_model_of_the_zoo_is_counted_the_same(kind, deferring: None) -> None:
    model, data = build(kind), inputs(kind, 23)
    late = deadcheck.scan(model, data, batch_size=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deadcheck.stats.runs_on_its_own", lambda device: False)
        at_once = deadcheck.scan(model, data, batch_size=7)

    assert [site.key for site in late] == [site.key for site in at_once]
    for one, other in zip(late, at_once, strict=True):
        assert (one.stats.samples, one.stats.observations) == (other.stats.samples, other.stats.observations)
        for name in COUNTS:
            assert np.array_equal(getattr(one.stats, name), getattr(other.stats, name), equal_nan=True), name
        for name in SUMS:
            assert np.allclose(getattr(one.stats, name), getattr(other.stats, name), 1e-4, 1e-4, equal_nan=True), name


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("stats", ["full", "counts", "verdict"])
def test_verdicts_and_what_is_known_are_the_same_at_every_level(stats: str, batch_size: int, deferring: None) -> None:
    late = deadcheck.scan(Kinds(), planted(), batch_size=batch_size, stats=stats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deadcheck.stats.runs_on_its_own", lambda device: False)
        at_once = deadcheck.scan(Kinds(), planted(), batch_size=batch_size, stats=stats)

    for one, other in zip(late, at_once, strict=True):
        assert one.codes.tolist() == other.codes.tolist()
        for name in COUNTS:
            assert np.array_equal(getattr(one.stats, name), getattr(other.stats, name), equal_nan=True), name


class Nobody(TorchDispatchMode):
    """Forbids every operator that has to wait for the values of a tensor."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item", "_to_copy")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        assert not by_mask, f"{name} by a mask waits for the device"
        moves = name == "_to_copy" and "device" in (kwargs or {})
        assert moves or name == "_to_copy" or name not in self.WAITING, f"{name} waits for the device"
        assert not moves, "moves values off the device"
        return func(*args, **(kwargs or {}))


def test_the_mode_notices_what_waits() -> None:
    with Nobody():
        for wait in (lambda x: bool(x.any()), lambda x: x.nonzero(), lambda x: int(x.sum()), lambda x: x[x > 0]):
            with pytest.raises(AssertionError, match="waits"):
                wait(torch.ones(3))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_nothing_is_read_from_the_device_while_the_scan_runs(name: str, deferring: None) -> None:
    function, activation = ACTIVATIONS[name]
    counter = SiteCounter(activation, 5, torch.device("cpu"), Scratch())
    layout = plan((samples(6), units(5), positions(4)))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(6, 5, 4, generator=generator) for _ in range(3)]
    batches[1][0, 0, 0] = math.nan
    picked = Rows(6, 6, torch.tensor([0, 1, 2, 3, 4, 4]))

    def count(z: Tensor, rows: Rows, first: int) -> None:
        counter.see_input(z, layout, rows)
        counter.see_output(function(z), layout, rows)
        counter.finish_batch(first)

    with Nobody():
        for number, z in enumerate(batches):
            count(z, picked if number == 2 else Rows(6, 6), 6 * number)

    stats = counter.freeze(Site("s", "s", name, Family.RECTIFIER, (), 1, "linear", 5))
    assert (stats.samples, stats.observations) == (6 + 6 + 5, 72)
    assert stats.nonfinite.tolist() == [1, 0, 0, 0, 0]


def test_units_are_dropped_ever_more_rarely(deferring: None) -> None:
    counter = SiteCounter(ACTIVATIONS["relu"][1], 2, torch.device("cpu"), {}, "verdict")
    layout, asked = plan((samples(2), units(2))), []
    for number in range(6):
        z = torch.tensor([[1.0, -1.0], [-1.0, -1.0]] if number == 2 else [[-1.0, -1.0], [-1.0, -1.0]])
        counter.see_input(z, layout, Rows(2, 2))
        counter.see_output(z.relu(), layout, Rows(2, 2))
        counter.finish_batch(2 * number)
        asked.append(counter.n_units)

    assert asked == [2, 2, 2, 1, 1, 1]
