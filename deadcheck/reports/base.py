"""What every report takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deadcheck.diagnosis import Diagnosis


@dataclass(frozen=True)
class RenderOptions:
    """How a report should look."""

    width: int = 120
    """Columns."""

    color: bool = False
    unicode: bool = True
    per_unit: bool = False
    """Every unit's numbers, where the format has room for them."""

    limit: int | None = None
    """Sites shown, worst first; None for all."""


Render = Callable[[Diagnosis, RenderOptions], str]


def shown(text: str, *, unicode: bool = True) -> str:
    """Return text that cannot steer a terminal or reorder a line: what is not printable (or ASCII) is spelled out."""
    return "".join(c if c.isprintable() and (unicode or c.isascii()) else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def percent(part: int, whole: int) -> str:
    """Spell a share; rounding never shows 0 % for something or 100 % for less than all."""
    if not whole or not part:
        return "0%"
    if part == whole:
        return "100%"
    share = 100 * part / whole
    if share < 0.1:
        return "<0.1%"
    if share > 99.9:
        return ">99.9%"
    return f"{share:.1f}%"
