"""From which place in the code of a model an activation is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

NOT_THE_MODELS = {__file__}
"""Files whose code stands between an activation and the code of the model that calls it."""


def _place_of(files: set[str], number: int, caller: FrameType) -> int:
    """Return a number for the frames from ``caller`` to the innermost that is of none of the files, and a number."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in files:
        frame = frame.f_back
    parts = [number]
    while frame is not None:
        parts += id(frame.f_code), frame.f_lasti
        frame = frame.f_back if frame is not caller else None
    return hash(tuple(parts))


try:
    from deadcheck._leaping import place_of as _compiled
except ImportError:  # no compiler where it was installed
    _find: Callable[[set[str], int, FrameType], int] = _place_of
else:
    _find = _compiled  # the same quickly, though not the same number


def place_of(number: int, caller: FrameType) -> int:
    """Return a number for the place in the code of a model from which this is called.

    A ``caller`` runs the model, and a program that is not made of Python frames tells its place by a ``number``.
    """
    return _find(NOT_THE_MODELS, number, caller)
