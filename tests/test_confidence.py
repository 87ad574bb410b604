"""Bounds on firing rates against published numbers, hand-worked ones, and the definitions summed term by term."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from deadcheck.confidence import firing_bound, never_fired_bound, settled_below
from deadcheck.config import Thresholds


@pytest.mark.parametrize(
    ("samples", "bound"),
    [
        (1, 0.95),  # 1 - .05
        (2, 1 - math.sqrt(0.05)),
        (1000, 0.002991),
        (0, 1.0),
    ],
)
def test_the_bound_of_a_unit_that_never_fired(samples: int, bound: float) -> None:
    assert never_fired_bound(samples, 0.05) == pytest.approx(bound, abs=5e-7)
    assert firing_bound(0, samples, 0.05) == never_fired_bound(samples, 0.05)


@pytest.mark.parametrize(("p_dead", "n_star"), [(0.05, 59), (0.01, 299), (0.003, 998), (0.001, 2995)])
def test_the_samples_needed_are_those_of_the_table(p_dead: float, n_star: int) -> None:
    assert Thresholds(p_dead=p_dead).n_star == n_star
    # n_star is the first n at which the bound lies below p_dead.
    assert never_fired_bound(n_star, 0.05) < p_dead <= never_fired_bound(n_star - 1, 0.05)


@pytest.mark.parametrize(
    ("fired", "samples", "bound"),
    [
        (1, 1, 1.0),
        (1, 2, math.sqrt(0.95)),  # P(X <= 1) = 1 - p^2 = .05
        (2, 3, 0.95 ** (1 / 3)),  # P(X <= 2) = 1 - p^3 = .05
        (3, 3, 1.0),
        (1, 3, 0.864650),  # (1 - p)^2 (1 + 2 p) = .05
    ],
)
def test_the_bound_of_a_unit_that_fired(fired: int, samples: int, bound: float) -> None:
    assert firing_bound(fired, samples, 0.05) == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize(("fired", "samples"), [(1, 1000), (7, 50), (49, 50), (500, 1000), (3, 100_000)])
def test_at_the_bound_so_few_firings_have_chance_delta(fired: int, samples: int) -> None:
    p = firing_bound(fired, samples, 0.05)
    log_terms = [
        math.lgamma(samples + 1) - math.lgamma(i + 1) - math.lgamma(samples - i + 1)
        + i * math.log(p) + (samples - i) * math.log1p(-p)
        for i in range(fired + 1)
    ]  # fmt: skip
    tail = sum(map(math.exp, log_terms))

    assert tail == pytest.approx(0.05, rel=1e-6)


def log_martingale(fired: int, samples: int, rate: float) -> float:
    """The mixture martingale, written out with the standard library."""

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    a, b = 0.5, 0.5 / rate
    mixed = log_beta(a + fired, b + samples - fired) - log_beta(a, b)
    return mixed - fired * math.log(rate) - (samples - fired) * math.log1p(-rate)


def test_a_unit_that_never_fires_is_settled_after_409_samples() -> None:
    # At k = 0 the martingale is the product of (b + i) / (a + b + i) / (1 - p) over i < n, here in exact fractions.
    a, b, p = Fraction(1, 2), Fraction(50), Fraction(1, 100)
    value, n = Fraction(1), 0
    while value < 20:
        value *= (b + n) / (a + b + n) / (1 - p)
        n += 1

    assert n == 409  # one who looks every 32 samples sees it at 416, as published
    assert not settled_below(np.array([0]), n - 1, 0.01, 0.05)[0]
    assert settled_below(np.array([0]), n, 0.01, 0.05)[0]


@pytest.mark.parametrize("samples", [1, 50, 416, 1184, 10_000, 250_000])
def test_what_is_settled_follows_the_definition(samples: int) -> None:
    fired = np.unique(np.geomspace(1, samples, 200).astype(np.int64))
    expected = [log_martingale(int(k), samples, 0.01) >= math.log(20) and k / samples < 0.01 for k in fired]

    assert settled_below(fired, samples, 0.01, 0.05).tolist() == expected


def test_a_rate_settled_above_the_border_is_not_below_it() -> None:
    # 500 of 1,000 is as far from 1 % as it gets, on the other side.
    assert log_martingale(500, 1000, 0.01) > math.log(20)
    assert not settled_below(np.array([500]), 1000, 0.01, 0.05)[0]
