"""Text that can steer neither a terminal nor a CI runner, whatever a file named."""

from __future__ import annotations

import re


def shown(text: str, *, unicode: bool = True) -> str:
    """Return text that cannot steer a terminal or reorder a line: what is not printable (or ASCII) is spelled out."""
    return "".join(c if c.isprintable() and (unicode or c.isascii()) else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def inert(text: str) -> str:
    """Return text of which no line is a command to a CI runner that reads the log.

    GitHub runs a line that begins with ``::name::`` after any spaces, and one that holds ``##[name]`` anywhere; Azure
    and TeamCity read ``##vso[`` and ``##teamcity[``. Where a name wraps, any piece of it may begin a line.
    """
    text = re.sub(r"(?m)^(\s*)::", r"\1:\\x3a", text)
    return re.sub(r"##(\w*\[)", r"#\\x23\1", text)


def shortened(text: str, most: int) -> str:
    """Return text of at most so many characters, cut in its middle: names differ at both ends."""
    if len(text) <= most:
        return text
    keep = most - 1
    return text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]


def brief(text: str, most: int = 120) -> str:
    """Return a text of a file as a sentence holds it: on one line, and cut."""
    return shown(shortened(text, most))


def plain(text: str) -> str:
    """Return lines of text that cannot steer a terminal."""
    return "\n".join(shown(line) for line in text.split("\n"))
