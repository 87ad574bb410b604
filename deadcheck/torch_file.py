"""Opens what ``torch.save`` wrote: tensors are mapped from the file, everything else that it names stays inert.

Takes the place of ``torch.load``, which either runs the file or refuses all of it for one stray object.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from deadcheck import archive, pickles
from deadcheck.denied import refuse_denied
from deadcheck.errors import DeadcheckError, ModelFileError, TrustRequired, first_line
from deadcheck.pickles import Global, Stored

_MAX_DIMENSIONS = 64
_SPARE = 256 << 20
_SHARES = 4
"""Tensors may take this many times the file's size and ``_SPARE`` bytes more: parts of one storage may be shared or
repeated, and a file could claim a buffer of any size that is made of one number."""


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
    archive.first_bytes(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        return _load(file, str(path), lambda: _mapped(path, size))


def _mapped(path: Path, size: int) -> torch.UntypedStorage:
    # Private pages: writing to a tensor never writes to the file.
    whole: Any = torch.UntypedStorage.from_file(str(path), False, size)
    return whole  # type: ignore[no-any-return]


def loads(data: bytes, source: str) -> TorchFile:
    """Read the bytes of a file of ``torch.save``, in the same way."""
    return _load(BytesIO(data), source, lambda: torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage())


def _load(file: BinaryIO, source: str, whole: Callable[[], torch.UntypedStorage]) -> TorchFile:
    start = file.read(2)
    layout = _zip_layout(file, source) if start == b"PK" else _legacy_layout(file, source)
    maker = _TensorMaker(source, layout, file.seek(0, 2), whole)
    try:
        with torch.sparse.check_sparse_tensor_invariants():
            inert = pickles.read(layout.pickle, source, layout.start, maker)
    except DeadcheckError:
        raise
    except (RuntimeError, NotImplementedError, AssertionError, OSError, MemoryError, UnicodeError) as error:
        raise ModelFileError(
            f"{source}: a tensor in it cannot be built ({first_line(error)[:200]}); save or download the file again"
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


def _judged(source: str, *found: pickles.Pickled) -> frozenset[str]:
    names = found[0].globals.union(*(pickled.globals for pickled in found))
    refuse_denied(source, names)
    for name in sorted(_UNCALLED & found[0].calls.union(*(pickled.calls for pickled in found))):
        raise TrustRequired(
            f"{source}: its pickle calls {name}, which torch.save never does; nothing was run; do not load this file"
        )
    return names


_UNCALLED = frozenset(("torch.Tensor", "builtins.bytearray", "builtins.bytes", "builtins.list", "builtins.range"))
"""Harmless names that a number turns into a demand for memory."""


def _check_sizes(source: str, storages: tuple[Stored, ...], records: dict[str, tuple[int, int]]) -> None:
    for stored in storages:
        if stored.key not in records:
            raise ModelFileError(
                f"{source}: damaged, the storage {stored.key!r} is missing; save or download the file again"
            )
        wanted, held = stored.elements * _dtype_of(stored.kind, source).itemsize, records[stored.key][1]
        if wanted > held:
            raise ModelFileError(
                f"{source}: damaged, it claims {wanted} bytes for the storage {stored.key!r}, which holds {held}; "
                "save or download the file again"
            )


def _zip_layout(file: BinaryIO, source: str) -> _Layout:
    by_name = {member.inner: member for member in archive.members_of(file, source)}
    order = by_name.get("byteorder")
    if order is not None and archive.member_bytes(file, source, order) == b"big":
        raise ModelFileError(f"{source}: saved on a big-endian machine; load and save it again on this kind of machine")
    data = archive.member_bytes(file, source, archive.needed(by_name, "data.pkl", source))
    found = pickles.read(data, source)
    records = {
        name.removeprefix("data/"): (member.offset, member.size)
        for name, member in by_name.items()
        if name.startswith("data/")
    }
    names = _judged(source, found)
    _check_sizes(source, found.storages, records)
    return _Layout(data, 0, names, records)


def _legacy_layout(file: BinaryIO, source: str) -> _Layout:
    """Find the parts of a file of torch before 1.6: four pickles, then the storages' keys, then their bytes in turn."""
    file.seek(0)
    data = file.read(archive.MAX_PICKLE)
    found = archive.pickles_in(data, source)
    names = _judged(source, *found)
    if len(found) < archive.LEGACY_PICKLES:
        return _Layout(data, 0, names, {})
    root, keys = found[3:]
    items = {stored.key: _dtype_of(stored.kind, source).itemsize for stored in root.storages}
    records: dict[str, tuple[int, int]] = {}
    place, end = keys.stop, file.seek(0, 2)
    for key in keys.root if isinstance(keys.root, list) else ():
        file.seek(place)
        held = struct.unpack("<q", file.read(8).ljust(8, b"\xff"))[0]
        size = held * items.get(key, 1) if type(key) is str else -1
        if size < 0 or place + 8 + size > end:
            raise ModelFileError(f"{source}: damaged, cut off in a storage; save or download the file again")
        records[key] = (place + 8, size)
        place += 8 + size
    _check_sizes(source, root.storages, records)
    return _Layout(data, found[2].stop, names, records)


def _dtype_of(kind: str, source: str) -> torch.dtype:
    """Return the element type of a storage class, by its name."""
    name = kind.rpartition(".")[2]
    if name not in _STORAGE_TYPES:
        raise ModelFileError(f"{source}: an unknown kind of storage, {kind}; save the model again with a newer torch")
    return _STORAGE_TYPES[name]


_STORAGE_TYPES: dict[str, torch.dtype] = {
    **{name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()},
    "UntypedStorage": torch.uint8,
    "TypedStorage": torch.uint8,
}

_QUANTISED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)

_CONSTANTS: dict[str, Any] = {
    **{str(value): value for value in vars(torch).values() if isinstance(value, (torch.dtype, torch.qscheme))},
    **{str(value): value for value in vars(torch).values() if isinstance(value, (torch.memory_format, torch.layout))},
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _TensorMaker(pickles.Maker):
    """Makes tensors, and the plain values that torch pickles by a call."""

    def __init__(self, source: str, layout: _Layout, size: int, whole: Callable[[], torch.UntypedStorage]) -> None:
        self.source = source
        self.layout = layout
        self.size_of_file = size
        self._open = whole
        self._whole: Any = None
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._encoded: dict[tuple[str, str], bytes] = {}
        self._left = _SHARES * size + _SPARE

    def named(self, name: str) -> Any:
        return _CONSTANTS.get(name) or Global(name)

    def called(self, name: str, args: Any) -> Any:
        make = _MAKERS.get(name)
        if make is None or not isinstance(args, tuple):
            return super().called(name, args)
        return make(self, *args)

    def stored(self, stored: Stored) -> Any:
        dtype = _dtype_of(stored.kind, self.source)
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
            self._whole = self._open()
        if size == 0:
            return torch.UntypedStorage(0)
        part: torch.UntypedStorage = self._whole[offset : offset + size]
        if offset % 16:
            part = part.clone()  # torch's kernels may count on aligned elements
        return part

    def check(self, storage: Any, offset: Any, size: Any, stride: Any, itemsize: int) -> None:
        """Refuse a tensor that leaves its storage, or that takes memory out of nothing."""
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers) or len(size) != len(stride):
            raise ValueError("a shape that no tensor has")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
        if (last + 1) * itemsize > storage._untyped_storage.nbytes():
            raise self.damaged("a tensor in it is larger than its storage")
        taken = math.prod(size) * itemsize
        self._left -= taken
        if self._left < 0:
            raise self.damaged(f"its tensors would take {taken} bytes of memory, out of a file of {self.size_of_file}")

    def strided(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Return a view of a storage."""
        if not isinstance(storage, torch.storage.TypedStorage):
            raise TypeError("no storage")
        kind = dtype or storage.dtype
        if kind in _QUANTISED:
            raise self.damaged("a quantised tensor in it has no scale")
        self.check(storage, offset, size, stride, kind.itemsize)
        return torch.empty(0, dtype=kind).set_(storage._untyped_storage, offset, torch.Size(size), tuple(stride))

    def damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: damaged, {what}; save or download the file again")

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
        _, _, bits = (*more, None, None, None)[:3]
        return _turned(self.strided(storage, offset, size, stride), bits)

    def tensor_of_type(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Tensor:
        _, _, dtype, bits = (*more, None, None, None, None)[:4]
        if not isinstance(dtype, torch.dtype):
            raise TypeError("no dtype")
        return _turned(self.strided(storage, offset, size, stride, dtype), bits)

    def parameter(self, data: Any, requires_grad: Any = True, *_: Any) -> nn.Parameter:
        if not isinstance(data, Tensor):
            raise TypeError("a parameter of no tensor")
        grad = requires_grad is True and (data.is_floating_point() or data.is_complex())
        return nn.Parameter(data, requires_grad=grad)

    def quantised(self, storage: Any, offset: Any, size: Any, stride: Any, parameters: Any, *_: Any) -> Tensor:
        if not isinstance(storage, torch.storage.TypedStorage):
            raise TypeError("no storage")
        self.check(storage, offset, size, stride, storage.dtype.itemsize)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantised tensors are on their way out
            return torch._utils._rebuild_qtensor(  # type: ignore[no-any-return]
                storage, offset, size, stride, parameters, False, OrderedDict()
            )

    def sparse(self, layout: Any, data: Any) -> Tensor:
        if layout is not torch.sparse_coo:
            return self.compressed(layout, data)
        indices, values, size = data[:3]
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=True)

    def compressed(self, layout: Any, data: Any) -> Tensor:
        outer, inner, values, size = data
        return torch.sparse_compressed_tensor(outer, inner, values, size, layout=layout, check_invariants=True)

    def of_type(self, function: Any, kind: Any, args: Any, _: Any) -> Any:
        if not isinstance(function, Global) or function.name not in _MAKERS or not isinstance(kind, Global):
            return pickles.Inert(getattr(kind, "name", "a tensor's subclass"), args)
        value = self.called(function.name, args)
        if kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
            return value
        return pickles.Inert(kind.name, args)

    def encoded(self, text: Any, encoding: Any = "latin1") -> bytes:
        """Return the bytes of a text, made once however often they are asked for."""
        if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
            raise ValueError("text that cannot be encoded")
        if (text, encoding) not in self._encoded:
            self._encoded[text, encoding] = text.encode(encoding)
        return self._encoded[text, encoding]

    def size(self, sizes: Any = ()) -> torch.Size:
        if len(sizes) > _MAX_DIMENSIONS:
            raise ValueError("a shape that no tensor has")
        return torch.Size(sizes)

    def reconstructed(self, kind: Any, *_: Any) -> Any:
        """Return what an object pickled by protocol 0 or 1 stands for."""
        return pickles.Inert(kind.name, ()) if isinstance(kind, Global) else kind


def _turned(tensor: Tensor, bits: Any) -> Tensor:
    """Return what is meant where the numbers in the file are conjugated or negated, as torch saves a lazy view."""
    if not bits:
        return tensor
    tensor = tensor.conj().resolve_conj() if bits.get("conj") else tensor
    return -tensor if bits.get("neg") else tensor


_MAKERS: dict[str, Callable[..., Any]] = {
    "copyreg._reconstructor": _TensorMaker.reconstructed,
    "torch._utils._rebuild_tensor": _TensorMaker.tensor,
    "torch._utils._rebuild_tensor_v2": _TensorMaker.tensor,
    "torch._utils._rebuild_tensor_v3": _TensorMaker.tensor_of_type,
    "torch._utils._rebuild_parameter": _TensorMaker.parameter,
    "torch._utils._rebuild_parameter_with_state": _TensorMaker.parameter,
    "torch._utils._rebuild_qtensor": _TensorMaker.quantised,
    "torch._utils._rebuild_sparse_tensor": _TensorMaker.sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _TensorMaker.compressed,
    "torch._tensor._rebuild_from_type_v2": _TensorMaker.of_type,
    "torch.nn.parameter.Parameter": _TensorMaker.parameter,
    "torch.nn.parameter.UninitializedParameter": lambda maker, *_: nn.UninitializedParameter(),
    "torch.nn.parameter.UninitializedBuffer": lambda maker, *_: nn.UninitializedBuffer(),
    "torch.Size": _TensorMaker.size,
    "torch.device": lambda maker, *args: torch.device(*args),
    "torch.serialization._get_layout": lambda maker, name: _CONSTANTS[name],
    "_codecs.encode": _TensorMaker.encoded,
    "builtins.complex": lambda maker, real=0.0, imag=0.0: complex(real, imag),
}
