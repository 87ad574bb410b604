"""Work memory that the sites of one scan share, since fresh memory is slow."""

from __future__ import annotations

from typing import Any

import numpy as np


class Scratch:
    """One piece of memory for each type, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._held: dict[Any, np.ndarray[Any, Any]] = {}

    def blank(self, size: int, dtype: Any) -> np.ndarray[Any, Any]:
        """Return memory, shape (size,), not cleared; it is the same at the next call for the type."""
        held = self._held.get(dtype)
        if held is None or len(held) < size:
            held = self._held[dtype] = np.empty(size, dtype)
        return held[:size]
