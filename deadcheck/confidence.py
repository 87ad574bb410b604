"""Exact bounds on a unit's firing rate, from how many samples it fired in.

Samples are the unit of evidence: positions and tokens inside one sample are correlated.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from deadcheck.sites import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]


def never_fired_bound(samples: int, delta: float) -> float:
    """Upper bound on the firing rate of a unit that fired in none of ``samples``: ``1 - delta**(1/n)``.

    Clopper and Pearson's exact one-sided bound at k = 0; at n = 1000 and delta = 0.05 it is 0.002991.
    """
    return -math.expm1(math.log(delta) / samples) if samples else 1.0


def firing_bound(fired: int, samples: int, delta: float) -> float:
    """Exact one-sided upper bound on the firing rate (Clopper, Pearson 1934): the p where P(X <= fired) = delta."""
    if fired >= samples:
        return 1.0
    if fired == 0:
        return never_fired_bound(samples, delta)
    low, high = fired / samples, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _lower_tail(fired, samples, middle) > delta else (low, middle)
    return high


def _lower_tail(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial(n, p), summed in logarithms."""
    i = np.arange(k + 1)
    choose = math.lgamma(n + 1) - _log_gamma(i + 1) - _log_gamma(n - i + 1)
    return float(np.exp(choose + i * math.log(p) + (n - i) * math.log1p(-p)).sum())


def settled_below(fired: IntArray, samples: int, rate: float, delta: float) -> BoolArray:
    """Tell which firing rates are settled to lie below ``rate``, whenever one looks (no penalty for peeking).

    The beta-mixture martingale ``B(a+k, b+n-k) / B(a, b) / (p^k (1-p)^(n-k))`` with a = 1/2 and b = 1/(2p) reaches
    1/delta with chance at most delta if the rate is p (Ville's inequality; Robbins 1970).
    """
    a, b = 0.5, 0.5 / rate
    settled: BoolArray = fired < rate * samples
    if not settled.any():
        return settled
    k = fired[settled].astype(np.float64)
    log_m = (
        _log_gamma(a + k) + _log_gamma(b + samples - k) - math.lgamma(a + b + samples)
        - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
        - k * math.log(rate) - (samples - k) * math.log1p(-rate)
    )  # fmt: skip
    settled[settled] = log_m >= -math.log(delta)
    return settled


def _log_gamma(values: npt.NDArray[np.generic]) -> FloatArray:
    """Logarithm of the gamma function for x > 0: Stirling's series eight above (error below 1e-12), and back."""
    x: FloatArray = values.astype(np.float64)
    y = x + 8
    back = np.log(x * (x + 1) * (x + 2) * (x + 3) * (x + 4) * (x + 5) * (x + 6) * (x + 7))
    series = 1 / (12 * y) - 1 / (360 * y**3) + 1 / (1260 * y**5) - 1 / (1680 * y**7) + 1 / (1188 * y**9)
    result: FloatArray = (y - 0.5) * np.log(y) - y + 0.5 * math.log(2 * math.pi) + series - back
    return result
