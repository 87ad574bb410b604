"""Opens what ``torch.save`` wrote: tensors are mapped from the file, everything else that it names stays inert.

Takes the place of ``torch.load``, which either runs the file or refuses all of it for one stray object.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deadcheck import archive, pickles
from deadcheck.errors import DeadcheckError, ModelFileError, TrustRequired
from deadcheck.pickles import Global, Stored

_MAX_ENCODED = 1 << 20


@dataclass(frozen=True)
class TorchFile:
    """A torch file, read."""

    root: Any
    globals: frozenset[str]
    """Every class and function that it names."""


def load(path: Path) -> TorchFile:
    """Read a file of ``torch.save``, the format before torch 1.6 included.

    Tensors share the file's pages; ``pickles.Inert`` and ``pickles.Global`` stand for what is no tensor, container or
    number. ModelFileError where it is damaged or lies about sizes, TrustRequired where it names what an attack needs.
    """
    layout = _zip_layout(path) if archive.is_zip(path) else _legacy_layout(path)
    maker = _TensorMaker(path, layout)
    try:
        with torch.sparse.check_sparse_tensor_invariants():
            inert = pickles.read(layout.pickle, str(path), layout.start, maker)
    except DeadcheckError:
        raise
    except (RuntimeError, NotImplementedError, AssertionError, OSError, MemoryError, UnicodeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"{path}: a tensor in it cannot be built ({text[:200]}); save or download the file again"
        ) from error
    return TorchFile(inert.root, layout.globals)


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a file are, after it has been judged."""

    pickle: bytes
    start: int
    globals: frozenset[str]
    records: dict[str, tuple[int, int]]
    """(offset, bytes) of every storage, by key."""


def _judged(path: Path, found: pickles.Pickled) -> frozenset[str]:
    archive.refuse_denied(str(path), found.globals)
    for name in sorted(found.calls):
        if name in _UNCALLED:
            raise TrustRequired(
                f"{path}: its pickle calls {name}, which torch.save never does; nothing was run; do not load this file"
            )
    return found.globals


_UNCALLED = frozenset(("torch.Tensor", "builtins.bytearray", "builtins.bytes", "builtins.list", "builtins.range"))
"""Harmless names that a number turns into a demand for memory."""


def _check_sizes(path: Path, storages: tuple[Stored, ...], records: dict[str, tuple[int, int]]) -> None:
    for stored in storages:
        if stored.key not in records:
            raise ModelFileError(
                f"{path}: damaged, the storage {stored.key!r} is missing; save or download the file again"
            )
        wanted, held = stored.elements * _dtype_of(stored.kind).itemsize, records[stored.key][1]
        if wanted > held:
            raise ModelFileError(
                f"{path}: damaged, it claims {wanted} bytes for the storage {stored.key!r}, which holds {held}; "
                "save or download the file again"
            )


def _zip_layout(path: Path) -> _Layout:
    members = archive.check_zip(path)
    by_name = {member.inner: member for member in members}
    if "data.pkl" not in by_name:
        raise ModelFileError(f"{path}: a zip, but not one that torch.save writes; give what torch.save wrote")
    order = by_name.get("byteorder")
    if order is not None and archive.read_member(path, order) == b"big":
        raise ModelFileError(f"{path}: saved on a big-endian machine; load and save it again on this kind of machine")
    data = archive.read_member(path, by_name["data.pkl"])
    found = pickles.read(data, str(path))
    records = {
        name.removeprefix("data/"): (member.offset, member.size)
        for name, member in by_name.items()
        if name.startswith("data/")
    }
    _check_sizes(path, found.storages, records)
    return _Layout(data, 0, _judged(path, found), records)


def _legacy_layout(path: Path) -> _Layout:
    """Find the parts of a file of torch before 1.6: four pickles, then the storages' keys, then their bytes in turn."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = bytes(mapped[: archive.MAX_PICKLE])
        first = pickles.read(data, str(path))
        if first.root != archive.LEGACY_MAGIC:
            return _Layout(data, 0, _judged(path, first), {})
        version = pickles.read(data, str(path), first.stop)
        system = pickles.read(data, str(path), version.stop)
        found = pickles.read(data, str(path), system.stop)
        names = _judged(path, found)
        keys = pickles.read(data, str(path), found.stop)
        items = {stored.key: _dtype_of(stored.kind).itemsize for stored in found.storages}
        records: dict[str, tuple[int, int]] = {}
        place = keys.stop
        for key in map(str, keys.root if isinstance(keys.root, list) else ()):
            held = struct.unpack("<q", mapped[place : place + 8])[0] if place + 8 <= len(mapped) else -1
            size = held * items.get(key, 1)
            if held < 0 or place + 8 + size > len(mapped):
                raise ModelFileError(
                    f"{path}: damaged, cut off in the storage {key!r}; save or download the file again"
                )
            records[key] = (place + 8, size)
            place += 8 + size
    _check_sizes(path, found.storages, records)
    return _Layout(data, system.stop, names, records)


def _dtype_of(kind: str) -> torch.dtype:
    """Return the element type of a storage class, by its name."""
    name = kind.rpartition(".")[2]
    if name not in _STORAGE_TYPES:
        raise ModelFileError(f"an unknown kind of storage, {kind}; save the model again with a newer torch")
    return _STORAGE_TYPES[name]


_STORAGE_TYPES: dict[str, torch.dtype] = {
    **{name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()},
    "UntypedStorage": torch.uint8,
    "TypedStorage": torch.uint8,
}

_CONSTANTS: dict[str, Any] = {
    **{str(value): value for value in vars(torch).values() if isinstance(value, (torch.dtype, torch.qscheme))},
    **{str(value): value for value in vars(torch).values() if isinstance(value, (torch.memory_format, torch.layout))},
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _TensorMaker(pickles.Maker):
    """Makes tensors, and the plain values that torch pickles by a call."""

    def __init__(self, path: Path, layout: _Layout) -> None:
        self.path = path
        self.layout = layout
        self._whole: Any = None
        self._storages: dict[str, torch.UntypedStorage] = {}

    def named(self, name: str) -> Any:
        return _CONSTANTS.get(name) or Global(name)

    def called(self, name: str, args: Any) -> Any:
        make = _MAKERS.get(name)
        if make is None or not isinstance(args, tuple):
            return super().called(name, args)
        return make(*args)

    def stored(self, stored: Stored) -> Any:
        dtype = _dtype_of(stored.kind)
        if stored.key not in self._storages:
            offset, _ = self.layout.records[stored.key]
            self._storages[stored.key] = self._bytes(offset, stored.elements * dtype.itemsize)
        storage = self._storages[stored.key]
        if stored.view is not None:
            first, count = stored.view
            storage = storage[first * dtype.itemsize : (first + count) * dtype.itemsize]
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def _bytes(self, offset: int, size: int) -> torch.UntypedStorage:
        if self._whole is None:
            # Private pages: writing to a tensor never writes to the file.
            self._whole = torch.UntypedStorage.from_file(str(self.path), False, self.path.stat().st_size)
        if size == 0:
            return torch.UntypedStorage(0)
        part: torch.UntypedStorage = self._whole[offset : offset + size]
        if offset % 16:
            part = part.clone()  # torch's kernels may count on aligned elements
        return part


def _strided(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return a view of a storage, after checking that it stays inside."""
    kind = _checked(storage, offset, size, stride, dtype)
    return torch.empty(0, dtype=kind).set_(storage._untyped_storage, offset, torch.Size(size), tuple(stride))


def _checked(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the element type of a tensor that stays inside its storage."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise TypeError("no storage")
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers) or len(size) != len(stride):
        raise ValueError("a shape that no tensor has")
    kind: torch.dtype = dtype or storage.dtype
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    if (last + 1) * kind.itemsize > storage._untyped_storage.nbytes():
        raise ValueError("a tensor larger than its storage")
    return kind


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *_: Any) -> Tensor:
    return _strided(storage, offset, size, stride)


def _tensor_of_type(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, _: Any, dtype: Any, *__: Any
) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise TypeError("no dtype")
    return _strided(storage, offset, size, stride, dtype)


def _parameter(data: Any, requires_grad: Any = True, *_: Any) -> nn.Parameter:
    if not isinstance(data, Tensor):
        raise TypeError("a parameter of no tensor")
    return nn.Parameter(data, requires_grad=bool(requires_grad) and (data.is_floating_point() or data.is_complex()))


def _quantised(storage: Any, offset: Any, size: Any, stride: Any, parameters: Any, *_: Any) -> Tensor:
    _checked(storage, offset, size, stride)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantised tensors are on their way out
        return torch._utils._rebuild_qtensor(  # type: ignore[no-any-return]
            storage, offset, size, stride, parameters, False, OrderedDict()
        )


def _sparse(layout: Any, data: Any) -> Tensor:
    if layout is not torch.sparse_coo or not 3 <= len(data) <= 4:
        raise ValueError("a sparse tensor of an unknown layout")
    indices, values, size = data[:3]
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=True)


def _compressed(layout: Any, data: Any) -> Tensor:
    outer, inner, values, size = data
    return torch.sparse_compressed_tensor(outer, inner, values, size, layout=layout, check_invariants=True)


def _of_type(function: Any, kind: Any, args: Any, _: Any) -> Any:
    if not isinstance(function, Global) or function.name not in _MAKERS or not isinstance(kind, Global):
        return pickles.Inert(getattr(kind, "name", "a tensor's subclass"), args)
    value = _MAKERS[function.name](*args)
    if kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
        return value
    return pickles.Inert(kind.name, args)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii") or len(text) > _MAX_ENCODED:
        raise ValueError("text that cannot be encoded")
    return text.encode(encoding)


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(items)


def _container(*args: Any) -> dict[Any, Any]:
    return dict(args[0]) if args and isinstance(args[0], (dict, list)) else {}


def _reconstructed(kind: Any, *_: Any) -> Any:
    """Return what an object pickled by protocol 0 or 1 stands for."""
    return pickles.Inert(kind.name, ()) if isinstance(kind, Global) else kind


_MAKERS: dict[str, Callable[..., Any]] = {
    "copyreg._reconstructor": _reconstructed,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _compressed,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.parameter.UninitializedParameter": lambda *_: nn.UninitializedParameter(),
    "torch.nn.parameter.UninitializedBuffer": lambda *_: nn.UninitializedBuffer(),
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch.device": lambda *args: torch.device(*args),
    "torch.serialization._get_layout": lambda name: _CONSTANTS[name],
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _container,
    "collections.Counter": _container,
    "builtins.dict": _container,
    "builtins.set": lambda items=(): set(items),
    "builtins.frozenset": lambda items=(): frozenset(items),
    "builtins.complex": lambda real=0.0, imag=0.0: complex(real, imag),
    "_codecs.encode": _encoded,
}
