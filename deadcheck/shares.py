"""Numbers and shares of units: read exactly, compared as whole numbers, spelled without a false 0 % or 100 %."""

from __future__ import annotations

import re
from fractions import Fraction

from deadcheck.errors import UsageError
from deadcheck.safe_text import brief

_LONGEST = 40
"""Characters of a share; Python takes no number of thousands of digits."""


def share(text: str) -> Fraction:
    """Read ``5%`` or ``0.05`` exactly; UsageError says how to write it."""
    if re.fullmatch(r"[1-9][0-9]?|100", text):
        raise UsageError(f"{text} could mean {text}% or {text} times; write {text}% or {int(text) / 100:g}")
    if len(text) > _LONGEST or not re.fullmatch(r"[0-9]+(\.[0-9]+)?(e-[0-9]{1,2})?|[0-9]+(\.[0-9]+)? *%", text):
        raise UsageError(f"{brief(text)!r} is not a share; write it as 5% or 0.05")
    number = Fraction(text.rstrip("% ")) / (100 if text.endswith("%") else 1)
    if number > 1:
        raise UsageError(f"{text!r} is not a share; write it as 5% or 0.05")
    return number


def number_of(number: int, thing: str) -> str:
    """Spell a number of things: ``1 layer``, ``1,024 layers``."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def too_few(number: int, thing: str) -> str:
    """Say that a number of things is too small: ``1 sample is too few``."""
    return f"{number_of(number, thing)} {'is' if number == 1 else 'are'} too few"


def exceeds(part: int, whole: int, limit: Fraction) -> bool:
    """Tell whether ``part / whole`` is above a limit; exact."""
    return part * limit.denominator > limit.numerator * whole


def reaches(part: int, whole: int, limit: Fraction) -> bool:
    """Tell whether ``part / whole`` is at or above a limit, and not nothing; exact."""
    return part > 0 and part * limit.denominator >= limit.numerator * whole


def spelled(limit: Fraction) -> str:
    """Spell a limit as a percentage: ``5%``, ``2.5%``."""
    percents = limit * 100
    return f"{percents.numerator}%" if percents.denominator == 1 else f"{float(percents):.10g}%"


def percent(part: int, whole: int, beside: Fraction | None = None) -> str:
    """Spell a share; rounding never shows 0 % for something or 100 % for less than all.

    ``beside`` is a limit that is printed next to it: digits are added until the two differ where the shares do.
    """
    if not whole or not part:
        return "0%"
    if part == whole:
        return "100%"
    exact = 100 * part / whole
    if beside is not None and Fraction(part, whole) != beside:
        for digits in range(1, 12):
            if Fraction(f"{exact:.{digits}f}") != beside * 100 and 0 < float(f"{exact:.{digits}f}") < 100:
                return f"{exact:.{digits}f}%"
    if exact < 0.1:
        return "<0.1%"
    if exact > 99.9:
        return ">99.9%"
    return f"{exact:.1f}%"
