"""Published results, found again through the public API."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import deadcheck


def grouped_nets(nets: int, width: int, hidden: int, seed: int) -> nn.Module:
    """Many small ReLU networks side by side, as grouped 1x1 convolutions with symmetric weights and no bias."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    fan_in = 1
    for _ in range(hidden):
        conv = nn.Conv1d(nets * fan_in, nets * width, 1, groups=nets, bias=False)
        nn.init.normal_(conv.weight, generator=generator)
        layers += [conv, nn.ReLU()]
        fan_in = width
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("width", "layers", "expected"),
    [
        # Lu, Shin, Su, Karniadakis 2020 (arXiv 1903.06733): a network with L layers is born dead with the probability
        # 3 * 4**-N - 2 * 8**-N for L = 3: N=2: 3/16 - 2/64 = .15625; N=3: 3/64 - 2/512 = .042969; N=4: .011230.
        (2, 3, 0.15625),
        (3, 3, 0.042969),
        (4, 3, 0.011230),
        # From their simulation for deeper ones (standard error up to .0008).
        (2, 5, 0.4965),
        (3, 10, 0.5772),
        (5, 10, 0.1280),
    ],
)
def test_born_dead_probability(width: int, layers: int, expected: float) -> None:
    nets = 20_000
    model = grouped_nets(nets, width, layers - 1, seed=width * 100 + layers)
    # With no bias and one input, +1 and -1 stand for all inputs.
    data = torch.tensor([1.0, -1.0]).view(2, 1, 1).expand(2, nets, 1)

    stats = deadcheck.scan(model, data).sites[-1].stats
    dead = (stats.fired.reshape(nets, width) == 0).all(1).mean()

    error = math.sqrt(expected * (1 - expected) / nets) + 0.0005
    assert abs(dead - expected) < 4 * error


def test_half_of_the_activations_are_zero_at_initialisation() -> None:
    # Glorot, Bordes, Bengio 2011: about 50 % at symmetric weights and no bias.
    torch.manual_seed(0)
    rates = []
    for _ in range(8):
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(512, 512, bias=False), nn.ReLU()]
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight)
        diagnosis = deadcheck.scan(nn.Sequential(*layers), torch.randn(64, 512))
        rates.append([site.zero_rate for site in diagnosis])

    means = np.mean(rates, 0)
    assert abs(means[0] - 0.5) < 0.004
    assert abs(means[1:] - 0.5).max() < 0.02


def test_apoz_of_the_worked_example() -> None:
    # MIT 6.5940, lecture on pruning: two images, three channels of 4x4, with (5, 5, 6) and (6, 7, 8) zeros.
    # APoZ = (5 + 6) / 32, (5 + 7) / 32, (6 + 8) / 32; the third channel is pruned.
    maps = torch.ones(2, 3, 16)
    for image, zeros in enumerate([(5, 5, 6), (6, 7, 8)]):
        for channel, count in enumerate(zeros):
            maps[image, channel, :count] = 0.0
    identity = nn.Conv2d(3, 3, 1, bias=False)
    with torch.no_grad():
        identity.weight[:] = torch.eye(3).view(3, 3, 1, 1)

    stats = deadcheck.scan(nn.Sequential(identity, nn.ReLU()), maps.view(2, 3, 4, 4)).sites[0].stats

    assert stats.zeros.tolist() == [11, 12, 14]
    assert stats.zero_rate.tolist() == [11 / 32, 12 / 32, 14 / 32]
    assert int(stats.zero_rate.argmax()) == 2
