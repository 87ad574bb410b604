"""A strip of characters that shows where in a layer the units sit that never fire."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = ".:-=+*%#"


def strip(off: npt.NDArray[np.bool_], cells: int, *, unicode: bool) -> str:
    """Return up to ``cells`` characters, one per run of neighbouring units: the fuller, the more of them are off.

    A cell with none is a blank dot or space, and only a cell with all of them is full.
    """
    levels = _BLOCKS if unicode else _ASCII
    empty = "·" if unicode else " "
    out = []
    for part in np.array_split(off, min(cells, max(len(off), 1))):
        n, total = int(part.sum()), len(part)
        if not n:
            out.append(empty)
        elif n == total:
            out.append(levels[-1])
        else:
            out.append(levels[n * (len(levels) - 1) // total])
    return "".join(out)


def legend(*, unicode: bool) -> str:
    """Return the line that explains the strip."""
    levels = _BLOCKS if unicode else _ASCII
    empty = "·" if unicode else "blank"
    return f"where in the layer units never fire: {empty} none  {levels[0]} few  {levels[3]} some  {levels[-1]} all"
