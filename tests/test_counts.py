"""Every count equals the oracle's, bit for bit, on the zoo and on the sample models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deadcheck
from deadcheck.sites import SiteStats
from tests import oracle
from tests.oracle import Counts
from tests.zoo import ZOO, build, inputs

SAMPLES = Path(__file__).parent.parent / "sample_models"


def differences(stats: SiteStats, counts: Counts) -> list[str]:
    """Return the names of the figures in which a site and the oracle differ."""
    pairs = {
        "samples": (stats.samples, counts.samples),
        "observations": (stats.observations, counts.observations),
        "zeros": (stats.zeros.tolist(), counts.zeros),
        "fired": (stats.fired.tolist(), counts.fired),
        "first_fired": (stats.first_fired.tolist(), counts.first_fired),
        "nonfinite": (stats.nonfinite.tolist(), counts.nonfinite),
    }
    wrong = [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    for unit, (low, high) in enumerate(counts.input_range):
        if math.isfinite(low) and (stats.input_min[unit], stats.input_max[unit]) != (low, high):
            wrong.append(f"input range of unit {unit}")
    for unit, (low, high) in enumerate(counts.output_range):
        if not counts.nonfinite[unit] and (stats.output_min[unit], stats.output_max[unit]) != (low, high):
            wrong.append(f"output range of unit {unit}")
    return wrong


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_every_count_equals_the_oracles(kind, batch_size: int) -> None:
    model, data = build(kind), inputs(kind, 23)  # 23 = 3 * 7 + 2: the last batch is ragged

    expected = oracle.observe(model.reference, data, batch_size)
    diagnosis = deadcheck.scan(model, data, batch_size=batch_size)

    assert {site.key for site in diagnosis} == set(expected)
    for key, counts in expected.items():
        assert differences(diagnosis.site(key).stats, counts) == [], key
    assert not [w for w in diagnosis.measurement.warnings if "guessed" in w or "told apart" in w]


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_the_reference_is_the_model(kind) -> None:
    model, data = build(kind), inputs(kind, 9)
    with torch.no_grad():
        ours, theirs = model(data.clone()), model.reference(oracle.Oracle(), data)

    if kind.exact_reference:
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    else:
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_wrong_count_is_noticed() -> None:
    model, data = build(ZOO[0]), inputs(ZOO[0], 9)
    counts = oracle.observe(model.reference, data, 4)[":relu#1"]
    stats = deadcheck.scan(model, data, batch_size=4).site(":relu#1").stats

    for name in ("zeros", "fired", "first_fired", "nonfinite"):
        spoiled = [getattr(counts, name)[0] + 1, *getattr(counts, name)[1:]]
        assert differences(stats, dataclasses.replace(counts, **{name: spoiled})) == [name]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 3])), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 5),
    st.tuples(st.integers(5, 11), st.integers(5, 9)),
    st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_random_convolutions_of_odd_shapes(layers, samples, batch_size, size, seed) -> None:
    torch.manual_seed(seed)
    convs, width = nn.ModuleList(), 2
    for channels, kernel in layers:
        convs.append(nn.Conv2d(width, channels, kernel, padding=kernel // 2))
        width = channels
    acts = [nn.ReLU() for _ in convs]
    model = nn.Sequential(*(module for pair in zip(convs, acts, strict=True) for module in pair))
    data = torch.randn(samples, 2, *size)

    def reference(keeper: oracle.Oracle, x: torch.Tensor) -> None:
        for number, conv in enumerate(convs):
            z = conv(x)
            x = keeper.keep(str(2 * number + 1), z, z.clamp(min=0))

    diagnosis = deadcheck.scan(model, data, batch_size=batch_size)

    for key, counts in oracle.observe(reference, data, batch_size).items():
        assert differences(diagnosis.site(key).stats, counts) == []


@pytest.mark.parametrize("name", ["digits_mlp", "digits_mlp_healthy", "digits_cnn"])
def test_the_sample_models_equal_the_oracle(name: str) -> None:
    # Read with trust here, by plain torch: the oracle must not depend on our reader.
    model = torch.load(SAMPLES / f"{name}.pt", weights_only=False).eval()
    data = torch.from_numpy(np.load(SAMPLES / f"{name}.sample.npz")["x"])

    def reference(keeper: oracle.Oracle, x: torch.Tensor) -> None:
        for number, module in enumerate(model):
            before = x
            x = module(x)
            if isinstance(module, nn.ReLU):
                keeper.keep(str(number), before, x)

    diagnosis = deadcheck.scan(SAMPLES / f"{name}.pt")

    for key, counts in oracle.observe(reference, data, 64).items():
        assert differences(diagnosis.site(key).stats, counts) == []


def test_a_unit_that_fires_once_in_5000_at_one_position_is_found() -> None:
    conv = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        conv.weight[:] = 1
        conv.bias[:] = torch.tensor([-5.0, 0.0])
    data = torch.zeros(5000, 1, 4, 4)
    data[3217, 0, 2, 1] = 6.0

    stats = deadcheck.scan(nn.Sequential(conv, nn.ReLU()), data).sites[0].stats

    assert stats.fired.tolist() == [1, 1]
    assert stats.first_fired.tolist() == [3217, 3217]
    assert stats.zeros.tolist() == [5000 * 16 - 1, 5000 * 16 - 1]


def test_functional_and_module_give_the_same_counts() -> None:
    torch.manual_seed(0)
    fc = nn.Linear(6, 4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = fc

        def forward(self, x):
            return F.relu(self.fc(x))

    data = torch.randn(50, 6)
    a = deadcheck.scan(nn.Sequential(fc, nn.ReLU()), data).sites[0].stats
    b = deadcheck.scan(Net(), data).sites[0].stats

    assert a.zeros.tolist() == b.zeros.tolist()


def test_experts_in_one_grouped_product_are_said_to_be_counted_together() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 8, 16))

        def forward(self, x):
            order = x[:, 0].argsort()
            ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32)
            return torch.relu(torch._grouped_mm(x[order], self.experts, offs=ends))[order.argsort()]

    found = deadcheck.scan(Grouped(), torch.randn(12, 8)).measurement
    (site,) = found.sites

    assert (site.site.units, site.site.axis_from, site.observations) == (16, "linear", 12)
    assert [note for note in found.warnings if "one that is dead in a single expert does not show" in note]


def test_a_layer_cut_to_the_length_of_the_batch_is_one_site() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.shift = nn.Parameter(torch.randn(5, 9)), nn.Parameter(torch.randn(9, 5))

        def forward(self, x):
            n = len(x)
            return torch.relu(x[:, :n] @ self.wide[:, :n].T + self.shift[9 - n :].sum(0) + self.shift[:n])

    sites = deadcheck.scan(Cut(), torch.randn(23, 9), batch_size=9).measurement.sites

    assert [(site.site.units, site.samples) for site in sites] == [(5, 23)]


def test_a_part_of_a_parameter_is_named_by_its_index() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.last = nn.Parameter(torch.randn(3, 5, 5)), nn.Linear(5, 4)
            self.grid = nn.Parameter(torch.randn(2, 2, 5, 6))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(x @ layer.T)
            low, high = self.grid[1][0].chunk(2, -1)
            return torch.relu(self.last(x)), torch.relu(x @ self.grid[0][1]), torch.relu(x @ low) + torch.relu(x @ high)

    sites = deadcheck.scan(Deep(), torch.randn(7, 5)).measurement.sites

    names = ("layers[0]", "layers[1]", "layers[2]", "last", "grid[0][1]", "grid[1][0]", "grid[1][0][3:]")
    assert [site.site.fed_by for site in sites] == [(name,) for name in names]
