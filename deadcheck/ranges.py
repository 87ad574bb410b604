"""Units as inclusive ranges, the way reports spell them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Ranges = tuple[tuple[int, int], ...]
"""Ascending, disjoint, both ends included."""

BoolArray = npt.NDArray[np.bool_]


def ranges_of(mask: BoolArray) -> Ranges:
    """Return where a mask is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    return tuple(zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True))


def mask_of(ranges: Ranges, units: int) -> BoolArray:
    """Return a mask over ``units`` units that is true inside disjoint ranges."""
    if not ranges:
        return np.zeros(units, np.bool_)
    steps = np.zeros(units + 1, np.int8)
    first, last = np.array(ranges).T
    # Disjoint ranges have no two first units alike and no two last ones, so plain indexing adds each once.
    steps[first] += 1
    steps[last + 1] -= 1
    mask: BoolArray = np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_)
    return mask


def count(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the number of units inside disjoint ranges."""
    return sum(last - first + 1 for first, last in ranges)


def listed(ranges: Ranges, *, most: int = 6) -> str:
    """Spell ranges for a person: ``units 3-17, 20 and 40 more``."""
    names = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    rest = count(ranges[most:])
    word = "unit" if count(ranges) == 1 else "units"
    return f"{word} {', '.join(names)}" + (f" and {rest:,} more" if rest else "")
