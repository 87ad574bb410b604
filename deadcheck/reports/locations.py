"""How hosts want a file named, and a finding told from the others."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from deadcheck.breach import Breach
from deadcheck.reports.base import Outcome


def relative(path: str) -> str:
    """Return a path from the working directory, where the file lies in it; with forward slashes."""
    absolute = os.path.abspath(path)
    inside = os.path.relpath(absolute)
    return Path(path if inside.startswith(os.pardir) else inside).as_posix()


def uri(path: str) -> str:
    """Return a path as a relative or absolute URI."""
    name = relative(path)
    try:
        spelled = quote(os.fsencode(name), safe="/")
    except UnicodeEncodeError:  # no file has such a name; a report may claim one
        spelled = quote(name.encode("utf-8", "backslashreplace"), safe="/")
    return f"file://{spelled}" if name.startswith("/") else spelled


def fingerprints(found: Iterable[tuple[Outcome, Breach]]) -> list[str]:
    """Return what stays the same of each finding from one run to the next, unique among them."""
    met: Counter[tuple[str, str, str]] = Counter()
    out = []
    for outcome, item in found:
        name = ("" if outcome.model is None else relative(outcome.model), item.rule or item.id, item.where)
        text = "\0".join((*name, str(met[name])))
        out.append(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32])
        met[name] += 1
    return out
