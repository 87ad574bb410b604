"""Data files that lie about their size, hold objects, or never end, for a model that is fine; and a sample beside it."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import (
    STOP,
    Case,
    called,
    into,
    mapping,
    tensor,
    text,
    torch_zip,
    whole,
    zipped,
)
from tests.hostile.evil_weights import SAFETENSORS, _sparse


def _npy(shape: str, kind: str = "<f4", body: bytes = b"", *, version: int = 1, order: str = "False") -> bytes:
    head = (
        f"{{'descr': {kind if kind.startswith('[') else repr(kind)}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
    )
    data = head.encode("latin1")
    form = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, len(data)) + data + body


def _npz(method: int = zipfile.ZIP_STORED, /, **members: bytes) -> bytes:
    return zipped({f"{name}.npy": content for name, content in members.items()}, folder="", method=method)


def _badly_packed() -> bytes:
    """The third kind of block, which deflate does not have, in the first byte after the name."""
    data = bytearray(_npz(zipfile.ZIP_DEFLATED, x=_npy("(8, 4)", body=bytes(128))))
    data[30 + len("x.npy")] = 0b111
    return bytes(data)


def _objects(marker: Path) -> bytes:
    return _npy("(1,)", "|O", b"\x80\x02" + called("posix", "mkdir", text(str(marker))) + STOP)


@functools.cache
def _bomb_bytes() -> bytes:
    """300 MiB of zeros in 300 KiB."""
    held = io.BytesIO()
    with (
        zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(_npy("(78643200,)"))
        for _ in range(300):
            member.write(bytes(1 << 20))
    return held.getvalue()


def _bomb(_: Path) -> bytes:
    return _bomb_bytes()


def _pt(root: bytes, **storages: bytes) -> bytes:
    return torch_zip(b"\x80\x02" + root + STOP, **(storages or {"_0": bytes(48), "_1": bytes(12)}))


def _shared(levels: int) -> bytes:
    """Tuples of tuples, each holding the one below it twice."""
    return tensor("0", (3, 4)) + b"q\x0a0" + b"h\x0ah\x0a\x86q\x0a0" * levels + b"h\x0a"


def _holding_itself() -> bytes:
    return b"]q\x05(" + tensor("0", (3, 4)) + b"h\x05e"


def _many(_: Path) -> bytes:
    """A tuple of a million times the same tensor."""
    return _pt(tensor("0", (3, 4)) + b"q\x0a0(" + b"h\x0a" * 1_000_000 + b"t")


NPY: dict[str, bytes | Callable[[Path], bytes]] = {
    "claims-400-gb": _npy("(100000000000,)"),
    "claims-2-to-the-80": _npy("(1099511627776, 1099511627776)"),
    "negative": _npy("(-1, 4)", body=bytes(64)),
    "shape-of-text": _npy("'x'", body=bytes(64)),
    "shape-is-a-call": _npy("(__import__('os').mkdir('evil'),)", body=bytes(64)),
    "shape-is-a-power": _npy("(9**9**9,)", body=bytes(64)),
    "shape-nested": _npy("(" * 3000 + ")" * 3000, body=bytes(64)),
    "head-of-4-gb": b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFF0) + b"{}",
    "head-is-empty": b"\x93NUMPY\x01\x00\x00\x00",
    "version-9": b"\x93NUMPY\x09\x00" + struct.pack("<H", 4) + b"{}  ",
    "text": _npy("(2,)", "<U4", bytes(32)),
    "dates": _npy("(2,)", "<M8[s]", bytes(16)),
    "records": _npy("(2,)", "[('a', '<f4'), ('b', '<i4')]", bytes(16)),
    "void": _npy("(2,)", "|V8", bytes(16)),
    "long-doubles": _npy("(2, 4)", "<f16", bytes(128)),
    "complex-long-doubles": _npy("(2, 4)", "<c32", bytes(256)),
    "objects": _objects,
    "cut": _npy("(8, 4)", body=bytes(100)),
    "type-of-a-terabyte": _npy("(1,)", "<U274877906944", bytes(16)),
    "type-is-a-list-of-lists": _npy("(1,)", "[" * 200 + "]" * 200, bytes(16)),
}

TYPES = frozenset(("text", "dates", "records", "void", "long-doubles", "complex-long-doubles"))

NPZ: dict[str, bytes | Callable[[Path], bytes]] = {
    "bomb": _bomb,
    "claims-400-gb": _npz(x=_npy("(100000000000,)", body=bytes(64))),
    "objects": lambda marker: _npz(x=_objects(marker)),
    "second-is-objects": lambda marker: _npz(x=_npy("(8, 4)", body=bytes(128)), y=_objects(marker)),
    "member-is-no-array": _npz(x=b"evil"),
    "member-is-empty": _npz(x=b""),
    "unlike-lengths": _npz(x=_npy("(8, 4)", body=bytes(128)), y=_npy("(7, 4)", body=bytes(112))),
    "badly-packed": _badly_packed(),
    "outside": _npz(**{"../../x": _npy("(8, 4)", body=bytes(128)), "/etc/y": _npy("(7, 4)", body=bytes(112))}),
}

PT: dict[str, tuple[bytes | Callable[[Path], bytes], int, str]] = {
    "payload": (lambda marker: _pt(called("posix", "mkdir", text(str(marker)))), 4, "which no model needs"),
    "shared-tuples": (_pt(_shared(40)), 2, "nested"),
    "shared-tuples-20": (_pt(_shared(20)), 2, "more than"),
    "holds-itself": (_pt(_holding_itself()), 2, "nested"),
    "nested-lists": (_pt(tensor("0", (3, 4)) + b"q\x0a0" + b"]" * 200_000 + b"h\x0a" + b"a" * 200_000), 2, "nested"),
    "a-million-times-one-tensor": (_many, 2, "more than"),
    "sparse": (_sparse([0, 1]), 2, "sparse"),
    "of-1-tib": (_pt(tensor("0", (1 << 30, 256), stride=(0, 1), elements=256), _0=bytes(1024)), 2, "of memory"),
    "of-no-samples": (_pt(tensor("0", (0, 4), elements=0), _0=b""), 3, "holds no samples"),
    "of-numbers": (_pt(mapping({"x": whole(5)})), 2, "holds no tensors"),
    "keys-by-number": (_pt(b"}K\x05" + tensor("0", (3, 4)) + b"s"), 0, "of 3 units are dead"),
    "of-strange-types": (_pt(mapping({"x": tensor("0", (4, 4), kind="BoolStorage")}), _0=bytes(16)), 2, "bool"),
    "of-quantised-numbers": (_pt(tensor("0", (4, 4), kind="QInt8Storage"), _0=bytes(16)), 2, "no scale"),
}  # fmt: skip


def _beside(name: str, content: bytes | Callable[[Path], bytes]) -> Callable[[Path, Path], Path]:
    """Return what puts a sample beside a good model; the model is given."""

    def make(folder: Path, marker: Path) -> Path:
        import torch
        from torch import nn

        into(f"net.sample.{name}", content)(folder, marker)
        torch.save(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), folder / "net.pt")
        return folder / "net.pt"

    return make


CASES = (
    *(
        Case(f"npy-{name}", into("x.npy", content), 2, "an array of" if name in TYPES else "x.npy", as_data=True,
             armed="numpy" if name == "objects" else "")
        for name, content in NPY.items()
    ),
    *(
        Case(f"npz-{name}", into("x.npz", content), 2, "x.npz", as_data=True, armed="npz" if "objects" in name else "")
        for name, content in NPZ.items()
    ),
    *(
        Case(f"data-{name}", into("x.pt", content), code, says, as_data=True)
        for name, (content, code, says) in PT.items()
    ),
    *(
        Case(f"data-safetensors-{name}", into("x.safetensors", SAFETENSORS[name]), 2, "safetensors", as_data=True)
        for name in ("head-too-large", "cut", "overlapping", "claims-4-gb", "head-nested")
    ),
    Case("data-safetensors-type-of-4-bits", into("x.safetensors", SAFETENSORS["type-of-4-bits"]), 2,
         "cannot go to a model", as_data=True),
    Case("sample-beside-payload", _beside("pt", PT["payload"][0]), 4, "which no model needs", found="net.sample.pt",
         own_data=True),
    Case("sample-beside-bomb", _beside("npz", _bomb), 2, "net.sample.npz", found="net.sample.npz", own_data=True),
)  # fmt: skip
