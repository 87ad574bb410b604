"""Weights that lie: safetensors, sparse and quantised tensors, and the dicts around them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import (
    STOP,
    Case,
    called,
    into,
    mapping,
    named,
    storage,
    tensor,
    text,
    torch_zip,
    whole,
)

ARCH = ("--arch", "arch.py:net")


def _safe(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def _entry(shape: list[object], begin: object, end: object, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "head-too-large": _safe({"a": _entry([1], 0, 4)}, bytes(4), length=1 << 62),
    "head-beyond-the-file": _safe({"a": _entry([1], 0, 4)}, bytes(4), length=100_000),
    "head-of-nothing": _safe(b""),
    "cut": _safe({"a": _entry([2], 0, 8)}, bytes(4)),
    "overlapping": _safe({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, bytes(12)),
    "hole": _safe({"a": _entry([1], 0, 4), "b": _entry([1], 8, 12)}, bytes(12)),
    "claims-4-gb": _safe({"a": _entry([1 << 30], 0, 4 << 30)}, bytes(4)),
    "shape-and-size-differ": _safe({"a": _entry([100], 0, 4)}, bytes(4)),
    "product-overflows": _safe({"a": _entry([1 << 32, 1 << 32], 0, 4)}, bytes(4)),
    "negative": _safe({"a": _entry([-1], 0, 4)}, bytes(4)),
    "twice": _safe(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                   b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)),
    "unknown-type": _safe({"a": _entry([1], 0, 4, "F33")}, bytes(4)),
    "type-of-4-bits": _safe({"a": _entry([2], 0, 1, "F4")}, bytes(1)),
    "head-is-a-list": _safe([]),
    "head-is-no-json": _safe(b"{" * 100),
    "head-nested": _safe(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "metadata-is-a-number": _safe({"__metadata__": {"a": 5}, "a": _entry([1], 0, 4)}, bytes(4)),
    "backwards": _safe({"a": _entry([1], 4, 0)}, bytes(4)),
}  # fmt: skip


def _many(_: Path) -> bytes:
    """A head of 32 MiB that names 600,000 empty tensors."""
    one = b',"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return _safe(
        b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' + b"".join(one % i for i in range(600_000)) + b"}"
    )


def _ints(key: str, shape: tuple[int, ...]) -> bytes:
    return tensor(key, shape, kind="LongStorage")


def _sparse(indices: list[int], size: int = 4) -> bytes:
    """A sparse vector whose indices are what the file says."""
    count = len(indices)
    data = (
        b"("
        + _ints("0", (1, count))
        + tensor("1", (count,))
        + called("torch", "Size", b"(" + whole(size) + b"t")
        + b"\x89t"
    )
    root = named("torch._utils", "_rebuild_sparse_tensor") + b"(" + (
        called("torch.serialization", "_get_layout", text("torch.sparse_coo")) + data + b"tR"
    )  # fmt: skip
    state = mapping({"weight": root, "bias": tensor("1", (count,))})
    return torch_zip(b"\x80\x02" + state + STOP, _0=struct.pack(f"<{count}q", *indices), _1=bytes(4 * count))


def _compressed(crow: list[int], col: list[int]) -> bytes:
    rows = len(crow) - 1
    data = (
        b"(" + _ints("0", (len(crow),)) + _ints("1", (len(col),)) + tensor("2", (len(col),))
        + called("torch", "Size", b"(" + whole(rows) + whole(4) + b"t") + b"t"
    )  # fmt: skip
    root = named("torch._utils", "_rebuild_sparse_csr_tensor") + b"(" + (
        called("torch.serialization", "_get_layout", text("torch.sparse_csr")) + data + b"tR"
    )  # fmt: skip
    state = mapping({"weight": root, "bias": tensor("2", (len(col),))})
    return torch_zip(b"\x80\x02" + state + STOP, _0=struct.pack(f"<{len(crow)}q", *crow),
                     _1=struct.pack(f"<{len(col)}q", *col), _2=bytes(4 * len(col)))  # fmt: skip


def _quantised(parameters: bytes, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,)) -> bytes:
    held = storage("0", 4, "QInt8Storage")
    sizes, steps = (b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (shape, stride))
    root = named("torch._utils", "_rebuild_qtensor") + b"(" + held + whole(0) + sizes + steps + parameters + b"\x89" + (
        called("collections", "OrderedDict") + b"tR"
    )  # fmt: skip
    state = mapping({"weight": root, "bias": tensor("1", (4,))})
    return torch_zip(b"\x80\x02" + state + STOP, _0=bytes(4), _1=bytes(16))


def _affine(scale: bytes, zero: bytes) -> bytes:
    return b"(" + named("torch", "per_tensor_affine") + scale + zero + b"t"


def _per_channel(scales: bytes, zeros: bytes, axis: bytes) -> bytes:
    return b"(" + named("torch", "per_channel_affine") + scales + zeros + axis + b"t"


TENSORS: dict[str, bytes] = {
    "sparse-index-outside": _sparse([0, 1 << 40]),
    "sparse-index-negative": _sparse([-5, 1]),
    "sparse-size-negative": _sparse([0], -1),
    "csr-outside": _compressed([0, 1, 2], [0, 1 << 40]),
    "csr-rows-lie": _compressed([0, 1 << 40, 2], [0, 1]),
    "csr-rows-fall": _compressed([2, 1, 0], [0, 1]),
    "quantised-of-1-tib": _quantised(_affine(b"G?\xf0\x00\x00\x00\x00\x00\x00", whole(0)), (1 << 40,), (0,)),
    "quantised-scale-of-text": _quantised(_affine(text("evil"), whole(0))),
    "quantised-no-scheme": _quantised(b"(" + text("evil") + b"t"),
    "quantised-axis-outside": _quantised(_per_channel(tensor("1", (4,)), _ints("1", (2,)), whole(99))),
    "quantised-scales-of-text": _quantised(_per_channel(text("a"), text("b"), whole(0))),
    "quantised-scales-short": _quantised(_per_channel(tensor("1", (1,)), _ints("1", (1,)), whole(0))),
}


def _encoded_over_and_over(_: Path) -> bytes:
    """A text of 1 MiB turned into bytes 100,000 times: 100 GiB from 2 MiB."""
    head = text("x" * (1 << 20)) + b"q\x010" + named("_codecs", "encode") + b"q\x020"
    return torch_zip(b"\x80\x02" + head + b"](" + b"h\x02h\x01\x85R" * 100_000 + b"e.")


def _copied_over_and_over(_: Path) -> bytes:
    """A list of 100,000 pairs turned into a dict 100,000 times."""
    pairs = b"](" + b"".join(text(str(i)) + b"N\x86" for i in range(100_000)) + b"eq\x010"
    head = pairs + named("collections", "OrderedDict") + b"q\x020"
    return torch_zip(b"\x80\x02" + head + b"](" + b"h\x02h\x01\x85R" * 100_000 + b"e.")


def _one_dict_under_every_name(_: Path) -> bytes:
    """A checkpoint of 100,000 entries that are all the same dict of 100,000 numbers."""
    big = b"}(" + b"".join(whole(i) + b"N" for i in range(100_000)) + b"uq\x010"
    return torch_zip(b"\x80\x02" + big + b"}(" + b"".join(whole(i) + b"h\x01" for i in range(100_000)) + b"u.")


def _arrays(make: Callable[[Path], bytes]) -> Callable[[Path, Path], Path]:
    return into("model.pt", make)


CASES = (
    *(
        Case(f"safetensors-{name}", into("model.safetensors", content), 2, "damaged safetensors", flags=ARCH)
        for name, content in SAFETENSORS.items()
        if name != "type-of-4-bits"
    ),
    Case("safetensors-type-of-4-bits", into("model.safetensors", SAFETENSORS["type-of-4-bits"]), 2, "model.safetensors",
         flags=ARCH, found="safetensors"),
    Case("safetensors-many", into("model.safetensors", _many), 2, "damaged safetensors", flags=ARCH),
    *(
        Case(f"tensor-{name}", into("model.pt", content), 2, "of memory" if "1-tib" in name else "model.pt: ",
             flags=ARCH, found="model.pt")
        for name, content in TENSORS.items()
    ),
    Case("calls-encode-over-and-over", _arrays(_encoded_over_and_over), 2, "holds a list"),
    Case("calls-copy-over-and-over", _arrays(_copied_over_and_over), 2, "steps"),
    Case("one-dict-under-every-name", _arrays(_one_dict_under_every_name), 2, "no entry of it looks like weights"),
)  # fmt: skip
