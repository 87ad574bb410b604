"""The slope that is found is the largest within the tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadcheck.alpha_search import LARGEST, largest_alpha
from deadcheck.errors import PatchError


def bisected(drift: Callable[[float], float], tolerance: float, steps: int = 60) -> float:
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if drift(middle) <= tolerance else (low, middle)
    return min(low, LARGEST)


@given(st.floats(-3, 3), st.floats(-3, 3), st.sampled_from([0.8, 1.0, 1.5]), st.floats(1e-3, 0.2))
def test_it_is_near_the_largest(linear: float, square: float, power: float, tolerance: float) -> None:
    def drift(alpha: float) -> float:
        return float(10**linear * alpha**power + 10**square * alpha * alpha)

    found = largest_alpha(drift, tolerance)
    wanted = bisected(drift, tolerance)

    assert drift(found.alpha) <= tolerance
    assert found.alpha >= 0.96 * wanted
    assert len(found.steps) <= 15
    assert (found.alpha, drift(found.alpha)) in found.steps


def test_where_drift_is_proportional_two_trials_do() -> None:
    # At 1e-4 the drift is 1.76e-3, so 0.99 * 0.01 / 17.6 = 5.625e-4 is next, cut to 5.62e-4: drift 9.89e-3.
    found = largest_alpha(lambda alpha: 17.6 * alpha, 0.01)

    assert found.alpha == 5.62e-4
    assert [alpha for alpha, _ in found.steps] == [1e-4, 5.62e-4]


def test_outputs_that_do_not_move_allow_the_largest_slope() -> None:
    assert largest_alpha(lambda alpha: 0.0, 0.01).alpha == LARGEST


def test_nan_is_no_drift_that_is_allowed() -> None:
    found = largest_alpha(lambda alpha: math.nan if alpha > 1e-3 else alpha, 0.5)

    assert 0.95e-3 < found.alpha <= 1e-3


def test_a_step_ends_too() -> None:
    found = largest_alpha(lambda alpha: 0.0 if alpha < 0.3 else 1.0, 0.01)

    assert 0.28 < found.alpha < 0.3


def test_no_slope_within_the_tolerance_is_said() -> None:
    with pytest.raises(PatchError, match=r"no slope keeps the outputs within 0.01 of what they are"):
        largest_alpha(lambda alpha: 1.0, 0.01)
