"""Renders what ``deadcheck inspect`` found, for people and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from deadcheck import __version__
from deadcheck.inspection import Inspection, TensorInfo
from deadcheck.safe_text import brief

_SHOWN = 12
_WIDTH = 400
"""Letters of a line at most; names may be megabytes long."""

_BITS = {"bool": 8, "float64": 64, "int64": 64, "complex64": 64, "complex128": 128, "float16": 16, "bfloat16": 16,
         "int16": 16, "int8": 8, "uint8": 8}  # fmt: skip


def render_text(found: Inspection) -> str:
    """Return a few lines for a person, in which no text of the file can pass for a line of ours."""
    lines = [f"deadcheck inspect  {brief(found.path, _WIDTH)}"]
    for label, values in _rows(found):
        for number, value in enumerate(values):
            lines.append(f"  {label if number == 0 else '':<12} {brief(value, _WIDTH)}")
    return "\n".join(lines) + "\n"


def _rows(found: Inspection) -> Iterator[tuple[str, list[str]]]:
    yield "what", [f"{found.what}, {_size(found.bytes)}"]
    yield "modules", _listed([f"{count} x {name}" for name, count in found.classes])
    yield "names", _listed(found.names)
    yield "entries", _listed([f"{name}: {what}" for name, what in found.entries])
    if found.tensors:
        kinds = ", ".join(sorted({tensor.dtype for tensor in found.tensors}))
        elements = sum(tensor.elements for tensor in found.tensors)
        yield (
            "tensors",
            [
                f"{len(found.tensors):,} with {elements:,} numbers ({kinds}, {_size(sum(map(_bytes, found.tensors)))})",
                *_listed([f"{t.name}  {'x'.join(map(str, t.shape)) or 'one number'}" for t in found.tensors]),
            ],
        )
    counts = Counter(found.activations)
    yield (
        "activations",
        _listed(
            [
                f"{name}{f' at {where}' if where else ''}{f' ({n} times)' * (n > 1)}"
                for (where, name), n in counts.items()
            ]
        ),
    )
    yield "prefix", [f"{found.prefix!r} on the names of the weights, which a scan strips"] if found.prefix else []
    yield "sample", [found.sample] if found.sample else []
    yield "wrong", list(found.problems)
    yield "next", [found.next or "nothing to type: this file cannot be scanned as it is"]


def _listed(items: Sequence[str]) -> list[str]:
    more = [f"… and {len(items) - _SHOWN:,} more (-f json lists them)"] if len(items) > _SHOWN else []
    return [*items[:_SHOWN], *more]


def _bytes(tensor: TensorInfo) -> int:
    return tensor.elements * _BITS.get(tensor.dtype, 32) // 8


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def render_json(found: Inspection) -> str:
    """Return one JSON object."""
    report = {
        "schema_version": "1.0",
        "tool": {"name": "deadcheck", "version": __version__},
        "status": "pass",
        "exit_code": 0,
        "model": {"path": found.path, "bytes": found.bytes, "format": found.kind},
        "what": found.what,
        "tensors": [asdict(tensor) for tensor in found.tensors],
        "modules": [{"class": name, "count": count} for name, count in found.classes],
        "names": list(found.names),
        "activations": [{"where": where, "activation": name} for where, name in found.activations],
        "entries": [{"key": key, "holds": what} for key, what in found.entries],
        "prefix": found.prefix,
        "sample": found.sample,
        "problems": list(found.problems),
        "refused": found.refused,
        "next": found.next or None,
        "error": None,
    }
    return json.dumps(report, indent=1, ensure_ascii=True) + "\n"
