"""Pickles of a few KiB that take for ever to walk, to hash, to compare or to hold."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import Case, called, into, named, text, torch_zip, whole

FOREVER = "take for ever to look up"


def _tuples(levels: int) -> bytes:
    return b"N" + b"\x8c\x01x\x86q\x00" + b"0h\x00h\x00\x86q\x00" * levels


def _frozen_pair(levels: int) -> bytes:
    """Two frozensets at each level, each holding both of the level below: comparing two of them doubles per level."""
    body = b"K\x01q\x000K\x02q\x010"
    for _ in range(levels):
        body += b"(h\x00h\x01K\x03\x91q\x02" + b"0(h\x00h\x01K\x04\x91q\x03" + b"0h\x02q\x000h\x03q\x010"
    return body


def _compared(_: Path) -> bytes:
    first, second = _frozen_pair(40), _frozen_pair(40)
    return b"\x80\x04}q\x09" + first + b"h\x09h\x00Ns0" + second + b"h\x09h\x00Ns."


def _colliding(_: Path) -> bytes:
    """30,000 tuples of two numbers with one and the same hash: a table of them is looked through from end to end."""
    mask = (1 << 64) - 1
    one, two, five = 11400714785074694791, 14029467366897019727, 2870177450012600261

    def rotated(value: int) -> int:
        return ((value << 31) | (value >> 33)) & mask

    inverse = pow(two, -1, 1 << 64)
    base = rotated((five + 1 * two) & mask) * one & mask
    wanted = rotated((base + 1 * two) & mask)
    out = []
    number = 2
    while len(out) < 30_000:
        number += 1
        state = rotated((five + number * two) & mask) * one & mask
        lane = (rotated_back(wanted) - state) * inverse & mask
        if lane < 1 << 60:
            out.append((number, lane))
    return b"\x80\x04}(" + b"".join(whole(a) + whole(b) + b"\x86N" for a, b in out) + b"u."


def rotated_back(value: int) -> int:
    """Undo the rotation of the hash of tuples."""
    return ((value >> 31) | (value << 33)) & ((1 << 64) - 1)


def _integers(_: Path) -> bytes:
    """Numbers that leave one remainder by 2**61 - 1, which is their hash."""
    return b"\x80\x02}(" + b"".join(whole(5 + k * ((1 << 61) - 1)) + b"N" for k in range(30_000)) + b"u."


def _hashed(kind: str) -> Callable[[Path], bytes]:
    """A deep tuple is hashed by the making of a set or dict, not by an opcode."""
    return lambda _: b"\x80\x04" + _tuples(40) + b"q\x050" + called("builtins", kind, b"](h\x05e") + b"."


def _long_number(_: Path) -> bytes:
    number = (1 << 8_000_000) - 1
    data = number.to_bytes(1_000_001, "little")
    return b"\x80\x02}" + text("n") + b"\x8b" + struct.pack("<i", len(data)) + data + b"s."


PICKLES: dict[str, tuple[bytes | Callable[[Path], bytes], int, str]] = {
    # name: (pickle, exit code, sentence)
    "shared-tuples": (b"\x80\x04" + _tuples(40) + b".", 2, "holds a tuple"),
    "shared-tuples-as-a-key": (b"\x80\x04}" + _tuples(40) + b"Ns.", 4, FOREVER),
    "shared-tuples-in-a-set": (b"\x80\x04\x8f(" + _tuples(40) + b"\x90.", 4, FOREVER),
    "shared-tuples-in-a-frozen-set": (b"\x80\x04(" + _tuples(40) + b"\x91.", 4, FOREVER),
    "shared-tuples-in-a-called-set": (_hashed("set"), 4, FOREVER),
    "shared-tuples-in-a-called-frozen-set": (_hashed("frozenset"), 4, FOREVER),
    "shared-tuples-in-a-called-dict": (lambda _: b"\x80\x04" + _tuples(40) + b"q\x050" + called(
        "collections", "OrderedDict", b"](h\x05N\x86e") + b".", 4, FOREVER),
    "a-million-levels": (b"\x80\x04" + _tuples(300_000) + b".", 2, "holds a tuple"),
    "frozen-sets-compared": (_compared, 4, FOREVER),
    "tuples-of-one-hash": (_colliding, 4, FOREVER),
    "integers-of-one-hash": (_integers, 4, FOREVER),
    "key-by-an-object": (lambda _: b"\x80\x04" + _tuples(40) + b"q\x050}" + named("argparse", "Namespace")
                         + b"(h\x05tRNs.", 2, "no entry"),
    "storage-key-of-tuples": (lambda _: b"\x80\x04" + _tuples(40) + b"q\x050(" + text("storage")
                              + named("torch", "FloatStorage") + b"h\x05" + text("cpu") + b"K\x01tQ.", 2, "damaged"),
    "nested-lists": (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", 2, "holds a list"),
    "nested-dicts": (b"\x80\x02" + b"}N" * 200_000 + b"}" + b"s" * 200_000 + b".", 2, "no entry"),
    "a-million-sets": (b"\x80\x04(" + b"\x8f" * 1_000_000 + b"l.", 2, "steps"),
    "four-million-nones": (b"\x80\x04](" + b"N" * 4_000_000 + b"e.", 2, "steps"),
    "a-million-nones": (b"\x80\x04](" + b"N" * 1_000_000 + b"e.", 2, "holds a list"),
    "a-million-marks": (b"\x80\x04" + b"(" * 1_000_000 + b"l.", 2, "holds a list"),
    "long-number": (_long_number, 2, "no entry"),
    "decimal-number": (b"I" + b"9" * 1_000_000 + b"\n.", 2, "model.pt"),
    "long-text": (b"\x80\x02}" + text("x" * 20_000_000) + b"Ns.", 2, "no entry"),
    "wide-text": (b"\x80\x02}" + text("x" * 20_000_000 + "\U0001f600") + b"Ns.", 2, "no entry"),
    "text-of-a-terabyte": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.", 2, "damaged"),
    "bytes-of-2-to-the-63": (b"\x80\x04\x8e" + struct.pack("<Q", (1 << 63) - 1) + b"x.", 2, "damaged"),
    "bytearray-of-a-terabyte": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", 2, "damaged"),
    "frame-of-a-terabyte": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"}.", 2, "no entry"),
    "memo-number": (b"\x80\x02}r\xff\xff\xff\xff.", 2, "no entry"),
    "call-of-bytearray": (b"\x80\x02" + called("builtins", "bytearray", whole(1 << 40)) + b".", 4, "torch.save never does"),
    "call-of-a-tensor": (b"\x80\x02" + called("torch", "Tensor", whole(1 << 40)) + b".", 4, "torch.save never does"),
    "call-of-a-range": (b"\x80\x02" + called("builtins", "list", called("builtins", "range", whole(1 << 40))) + b".", 4,
                        "torch.save never does"),
}  # fmt: skip

CASES = (
    *(
        Case(f"bomb-{name}", into("model.pt", content), code, says,
             found=says if code == 4 and not name.startswith("call-of") else "what")
        for name, (content, code, says) in PICKLES.items()
        if name != "decimal-number"
    ),
    *(
        Case(f"bomb-{name}-in-zip", into("model.pt", lambda marker, c=content: torch_zip(c(marker) if callable(c) else c)),
             code, says, found="what")
        for name, (content, code, says) in PICKLES.items()
        if name in ("frozen-sets-compared", "shared-tuples-in-a-called-set")
    ),
    Case("bomb-decimal-number", into("model.pt", PICKLES["decimal-number"][0]), 2, "model.pt", inspect=2),
)  # fmt: skip
