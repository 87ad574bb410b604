"""Writes a file so that at any moment either the old one or the whole new one is there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from deadcheck.errors import UsageError


def check_target(path: Path, *, force: bool, source: Path | None = None) -> None:
    """Refuse a place that cannot or must not be written, before any work is done."""
    if source is not None and _is_same(path, source):
        raise UsageError(f"{path}: is the model itself, which is never written over; name another file with -o")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is no regular file; name another")
    if path.exists() and not force:
        raise UsageError(f"{path}: exists already; name another file, or write over it with --force")


def _is_same(path: Path, source: Path) -> bool:
    try:
        return path.samefile(source)
    except OSError:  # one of them does not exist
        return path.resolve() == source.resolve()


def write_text(path: Path, text: str, what: str = "") -> None:
    """Write a text file as ``write_safely`` does."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())

    write_safely(path, write, what)


def write_safely(path: Path, write: Callable[[Path], None], what: str = "") -> None:
    """Have ``write`` make the file under a temporary name beside it, then put it in its place, with the old one's mode.

    UsageError, which may say ``what`` it is, where the disk is full or the place cannot be written; the old file then
    stays, and nothing else does.
    """
    target = path.resolve()
    try:
        if path.exists() and not path.is_file():
            write(path)  # a device or a pipe: a file put in its place would be the end of it
            return
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        told = f"{what} to {str(path)!r}" if what else repr(str(path))
        raise UsageError(f"cannot write {told}: {error.strerror or error}; choose another place") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
