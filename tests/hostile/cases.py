"""What a hostile file is to the tests: how it is made, and what the commands must say of it."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ARCH = """import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = torch.relu

    def forward(self, x):
        return self.act(x)


class Plain:
    pass
"""
"""Code of the user's own: ``arch.py`` beside every file."""


@dataclass(frozen=True)
class Case:
    """A file that is made to do harm or to deceive, and what is wanted of the commands."""

    name: str
    make: Callable[[Path, Path], Path]
    """Makes the file in a folder, with a payload that creates the marker; returns what is given to the command."""

    scan: int
    """Exit code that a scan must end with."""

    says: str
    """What its sentence must hold; for exit code 0, what the report must hold."""

    inspect: int = 0
    found: str | None = None
    """What an inspection must say; None where it must say the same."""

    flags: tuple[str, ...] = ()
    """More arguments of the scan."""

    as_data: bool = False
    """Whether it is given with ``--data``, for a good model; ``inspect`` takes models only."""

    as_config: bool = False
    """Whether it is given with ``--config``."""

    own_data: bool = False
    """Whether it brings its data along, so that no other is given."""

    armed: str = ""
    """Loader that runs the payload, to show that there is one."""


def into(name: str, content: bytes | Callable[[Path], bytes]) -> Callable[[Path, Path], Path]:
    """Return what writes a file of that content; a function makes it for a marker."""

    def make(folder: Path, marker: Path) -> Path:
        path = folder / name
        path.write_bytes(content(marker) if callable(content) else content)
        return path

    return make


def zipped(members: Mapping[str, bytes], *, folder: str = "archive/", method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip as torch writes it: stored, and all in one folder."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{folder}{name}", content)
    return held.getvalue()


def torch_zip(pickle: bytes, **storages: bytes) -> bytes:
    """Return what torch.save would write for a pickle and its storages; ``_0`` names the storage 0."""
    members = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    return zipped({**members, **{f"data/{key.strip('_')}": value for key, value in storages.items()}})


def legacy(root: bytes, *, magic: bytes = b"", version: bytes = b"", system: bytes = b"", keys: bytes = b"") -> bytes:
    """Return a file of torch before 1.6: five pickles, any of which may be given."""
    number = 0x1950A86A20F9469CFC6C
    return b"".join(
        (
            magic or b"\x80\x02\x8a\x0a" + number.to_bytes(10, "little") + b".",
            version or b"\x80\x02M\xe9\x03.",
            system or b"\x80\x02}.",
            root,
            keys or b"\x80\x02].",
        )
    )


# Opcodes of pickles.

STOP = b"."


def named(module: str, name: str) -> bytes:
    """Return the opcode that names a global."""
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """Return the opcode of a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def whole(number: int) -> bytes:
    """Return the opcode of an integer."""
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def called(module: str, name: str, *args: bytes) -> bytes:
    """Return the opcodes that call a global."""
    return named(module, name) + b"(" + b"".join(args) + b"tR"


def built(module: str, name: str, state: Mapping[str, bytes]) -> bytes:
    """Return the opcodes of an object with a state, as ``copyreg.__newobj__`` makes it."""
    items = b"".join(text(key) + value for key, value in state.items())
    return named(module, name) + b")\x81}(" + items + b"ub"


def storage(key: str, elements: int, kind: str = "FloatStorage") -> bytes:
    """Return the opcodes of a storage kept outside the pickle."""
    return b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + whole(elements) + b"tQ"


def tensor(key: str, shape: tuple[int, ...], *, stride: tuple[int, ...] | None = None, elements: int | None = None,
           offset: int = 0, kind: str = "FloatStorage") -> bytes:  # fmt: skip
    """Return the opcodes of a tensor."""
    strides = stride if stride is not None else _strides(shape)
    size = elements if elements is not None else max(1, abs(_product(shape)))
    sizes, steps = (b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (shape, strides))
    held = storage(key, size, kind)
    hooks = called("collections", "OrderedDict")
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + held
        + whole(offset)
        + sizes
        + steps
        + b"\x89"
        + hooks
        + b"tR"
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_product(shape[i + 1 :]) for i in range(len(shape)))


def _product(numbers: tuple[int, ...]) -> int:
    out = 1
    for number in numbers:
        out *= number
    return out


def parameter(value: bytes) -> bytes:
    """Return the opcodes that make a parameter of a tensor."""
    return called("torch._utils", "_rebuild_parameter", value, b"\x88", called("collections", "OrderedDict"))


def module(kind: str, *, tables: Mapping[str, bytes] | None = None, **state: bytes) -> bytes:
    """Return the opcodes of a module of torch.nn; ``kind`` is ``linear.Linear`` and the like."""
    place, _, name = kind.rpartition(".")
    empty = dict.fromkeys(("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"), b"}")
    return built(f"torch.nn.modules.{place}", name, {"training": b"\x89", **empty, **(tables or {}), **state})


def mapping(items: Mapping[str, bytes]) -> bytes:
    """Return the opcodes of a dict."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def linear(out: int = 3, size: int = 4, *, extra: Mapping[str, bytes] | None = None) -> bytes:
    """Return the opcodes of a linear layer with its weights in storages 0 and 1."""
    weights = mapping({"weight": parameter(tensor("0", (out, size))), "bias": parameter(tensor("1", (out,)))})
    return module("linear.Linear", tables={"_parameters": weights}, in_features=whole(size), out_features=whole(out),
                  **(extra or {}))  # fmt: skip


def sequential(*children: bytes, extra: Mapping[str, bytes] | None = None) -> bytes:
    """Return the opcodes of a container of modules."""
    inside = mapping({str(number): child for number, child in enumerate(children)})
    return module("container.Sequential", tables={"_modules": inside}, **(extra or {}))


def relu(**state: bytes) -> bytes:
    """Return the opcodes of a ReLU."""
    return module("activation.ReLU", inplace=b"\x89", **state)


def saved(root: bytes) -> bytes:
    """Return a file of torch.save for the opcodes of a model of linear layers."""
    return torch_zip(b"\x80\x02" + root + STOP, _0=bytes(48), _1=bytes(12))
