"""Reads files of data; none is unpickled, and none takes more memory than it gives."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deadcheck import torch_file
from deadcheck.archive import entries_of
from deadcheck.errors import DataError, ModelFileError, first_line
from deadcheck.folder import check_safetensors
from deadcheck.pickles import Global, Inert
from deadcheck.safe_text import brief

_MAX_INFLATED = 4 << 30
_MAX_RATIO = 100
_MAX_NESTED = 16
_MAX_ENTRIES = 500_000
_NUMPY_DAMAGE = (OSError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error, LookupError,
                 NotImplementedError, SyntaxError, TokenError, TypeError, RuntimeError)  # fmt: skip


def sha256_of(path: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_data(path: Path) -> Any:
    """Return what a file of data holds; its kind is told by its first bytes, then by its suffix.

    DataError where it is damaged, would run code, or holds no data.
    """
    start = _first_bytes(path)
    readers: dict[str, Callable[[Path], Any]] = {
        "npy": _read_npy, "npz": _read_npz, "pt": _read_pt, "safetensors": _read_safetensors,
    }  # fmt: skip
    kind = _kind(path, start)
    if kind is None:
        known = "it looks like text" if start.isascii() and b"\0" not in start else "its kind is not known"
        raise DataError(f"{path}: not data that can be read ({known}); give .npz, .npy, .pt or .safetensors")
    return readers[kind](path)


def _first_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; give a file, or file.py:name for a loader")
        if not path.exists():
            raise DataError(f"{path}: no such file; check the path, or give module:name for a loader")
        if not path.is_file():
            raise DataError(f"{path}: not a regular file; give a file")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not start:
        raise DataError(f"{path}: the file is empty; save the data again")
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a Git LFS pointer, not the data; run 'git lfs pull'")
    return start


def _kind(path: Path, start: bytes) -> str | None:
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PK"):
        try:
            names = [info.filename for info in entries_of(path)]
        except ModelFileError as error:
            raise DataError(str(error)) from error
        is_npz = all(name.endswith(".npy") for name in names) if names else path.suffix == ".npz"
        return "npz" if is_npz else "pt"
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return "safetensors"
    return "pt" if start[:1] == b"\x80" or (path.suffix in (".pt", ".pth") and b"\0" in start) else None


def _numpy(load: Callable[[], Any], path: Path) -> Any:
    try:
        return load()
    except ValueError as error:
        if any(words in str(error) for words in ("allow_pickle", "Object arrays", "Python objects")):
            raise DataError(
                f"{path}: holds Python objects, which need pickle and could run code; save it with a numeric dtype"
            ) from error
        raise DataError(f"{path}: damaged or cut short ({_line(error)}); save the data again") from error
    except _NUMPY_DAMAGE as error:
        raise DataError(f"{path}: damaged or cut short ({_line(error)}); save the data again") from error


def _line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    return first_line(error).partition(". ")[0][:200]


def _read_npy(path: Path) -> Any:
    # Mapped, so that a header claiming more than the file holds fails before anything is allocated.
    return _numpy(lambda: np.load(path, mmap_mode="r", allow_pickle=False), path)


def _read_npz(path: Path) -> dict[str, Any]:
    def load() -> dict[str, Any]:
        entries = entries_of(path)
        if not entries:
            raise DataError(f"{path}: holds no arrays; save the inputs under their names")
        inflated = sum(info.file_size for info in entries)
        packed = max(path.stat().st_size, 1)
        if inflated > _MAX_INFLATED or (inflated > 256 << 20 and inflated > _MAX_RATIO * packed):
            raise DataError(
                f"{path}: {packed} bytes that would inflate to {inflated}, as a zip bomb does; save it as .npy instead"
            )
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise DataError(f"{path}: damaged, {brief(strange[0])!r} in it is no array; save the data again")
        return arrays

    return _numpy(load, path)  # type: ignore[no-any-return]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except ModelFileError as error:
        raise DataError(str(error)) from error
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: damaged safetensors ({_line(error)}); save the data again") from error


def _read_pt(path: Path) -> Any:
    try:
        data = torch_file.load(path).root
    except ModelFileError as error:
        raise DataError(str(error)) from error
    _check_entries(data, path)
    if isinstance(data, list) and len(data) == 2 and all(isinstance(item, Tensor) for item in data):
        data = tuple(data) if data[0].dim() and data[0].shape == data[1].shape else data  # inputs and targets
    if not isinstance(data, (Tensor, Mapping, tuple, list)):
        raise DataError(f"{path}: holds a {type(data).__name__}, not data; save a tensor, or a dict or tuple of them")
    if isinstance(data, Mapping) and not any(isinstance(value, Tensor) for value in data.values()):
        raise DataError(f"{path}: the dict holds no tensors; save the inputs under their names")
    return data


def _check_entries(data: Any, path: Path) -> None:
    """Look at every entry before anything walks them, a shared one under each of its places: so there may be no end."""
    queue, count = [(data, 0)], 0
    while queue:
        value, depth = queue.pop()
        count += 1
        if isinstance(value, (Inert, Global)):
            raise DataError(
                f"{path}: needs {value.name}, which could run code, so it was not read; "
                "save tensors, dicts and lists alone"
            )
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise DataError(f"{path}: holds a sparse tensor; save it dense (tensor.to_dense())")
        if depth > _MAX_NESTED:
            raise DataError(f"{path}: is nested more than {_MAX_NESTED} deep, which no data is; save tensors")
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, set)) else ()
        if count + len(queue) + len(items) > _MAX_ENTRIES:
            raise DataError(f"{path}: holds more than {_MAX_ENTRIES:,} entries; save tensors of many samples each")
        queue += [(item, depth + 1) for item in items]
