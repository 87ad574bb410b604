"""Units as ranges: there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadcheck.ranges import count, listed, mask_of, ranges_of


@given(st.lists(st.booleans(), max_size=60))
def test_a_mask_comes_back_from_its_ranges(units: list[bool]) -> None:
    ranges = ranges_of(np.array(units, bool))

    assert mask_of(ranges, len(units)).tolist() == units
    assert count(ranges) == sum(units)
    assert [unit for first, last in ranges for unit in range(first, last + 1)] == [i for i, u in enumerate(units) if u]


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        (((3, 3),), "unit 3"),
        (((0, 1),), "units 0-1"),
        (((0, 0), (2, 2), (4, 4)), "units 0, 2, 4"),
        (tuple((2 * i, 2 * i) for i in range(8)), "units 0, 2, 4, 6, 8, 10 and 2 more"),
        ((*((2 * i, 2 * i) for i in range(6)), (100, 1999)), "units 0, 2, 4, 6, 8, 10 and 1,900 more"),
    ],
)
def test_ranges_are_listed_for_a_person(ranges: tuple[tuple[int, int], ...], text: str) -> None:
    assert listed(ranges) == text
