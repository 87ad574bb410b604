"""Tells what a file is from its first bytes, and checks a zip before torch sees it."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from deadcheck.errors import ModelFileError, TrustRequired

_MAX_PICKLE = 256 << 20
_ENCRYPTED = 0x1

_DENIED_MODULES = frozenset(
    ("os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "pty", "socket", "shutil", "ctypes", "pip",
     "timeit", "webbrowser", "code", "codeop", "pdb", "bdb", "pickle", "_pickle", "multiprocessing", "asyncio",
     "commands", "popen2", "platform", "signal", "threading", "tempfile", "urllib", "http", "ftplib", "smtplib",
     "cProfile", "profile", "trace", "imp", "pkgutil", "zipimport", "venv", "ensurepip", "idlelib", "doctest",
     "marshal", "linecache", "fileinput", "io", "_io", "nturl2path", "dill",
     "cloudpickle", "joblib", "torch.hub", "torch.utils.cpp_extension", "torch.utils._config_module",
     "torch.package", "torch.distributed.run", "torch._inductor", "torch._dynamo")
)  # fmt: skip
_DENIED_BUILTINS = frozenset(
    ("eval", "exec", "getattr", "setattr", "delattr", "__import__", "compile", "open", "input", "breakpoint",
     "globals", "locals", "vars", "apply", "execfile", "map", "filter", "memoryview")
)  # fmt: skip
_DENIED_NAMES = frozenset(
    ("torch.load", "torch.jit.load", "torch.ops.load_library", "torch.classes.load_library", "torch.serialization.load",
     "types.FunctionType", "types.CodeType", "types.MethodType", "torch.jit._serialization.load", "torch.export.load",
     "torch._export.load", "logging.FileHandler", "logging.config.listen", "logging.config.dictConfig",
     "operator.attrgetter", "operator.methodcaller", "_operator.attrgetter", "_operator.methodcaller",
     "functools.reduce", "numpy.load", "numpy.testing._private.utils.runstring", "numpy.f2py.capi_maps.getinit",
     "torch.fx.graph_module._forward_from_src", "torch.storage._load_from_bytes")
)  # fmt: skip


def first_bytes(path: Path) -> bytes:
    """Return the start of a regular file; ModelFileError with what to do for everything else."""
    try:
        if path.is_dir():
            raise ModelFileError(f"{path}: is a folder, not a model file; name the file in it")
        if not path.exists():
            raise ModelFileError(f"{path}: no such file; check the path")
        if not path.is_file():
            raise ModelFileError(f"{path}: not a regular file; give a saved model")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not start:
        raise ModelFileError(f"{path}: the file is empty; save the model again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelFileError(f"{path}: a Git LFS pointer, not the model itself; run 'git lfs pull'")
    return start


def refuse_other_kinds(path: Path, start: bytes) -> None:
    """Raise ModelFileError for a file that is recognised and is no PyTorch model."""
    for is_it, what in (
        (start.startswith(b"\x93NUMPY"), "a NumPy array, not a model; give it with --data"),
        (start.startswith(b"GGUF"), "a GGUF model, which torch cannot run; scan the PyTorch model it was made from"),
        (start[1:7] == b"Tensor" or start.startswith(b"\x89HDF"), "not a PyTorch model; convert it to PyTorch first"),
        (path.suffix == ".onnx", "an ONNX model; scan the PyTorch model it was exported from"),
        (start[257:262] == b"ustar", "a tar file of torch before 1.6; load and save it again with a newer torch"),
        (_is_html(start), "a web page, not a model; the download failed, fetch it again"),
        (_is_text(start), "text, not a model; check the path"),
    ):
        if is_it:
            raise ModelFileError(f"{path}: {what}")


def _is_html(start: bytes) -> bool:
    return start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))


def _is_text(start: bytes) -> bool:
    try:
        text = start[:-3].decode() if len(start) == 512 else start.decode()
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t" for c in text)


def check_zip(path: Path) -> list[str]:
    """Return the members of a zip that torch may open, or raise ModelFileError for one that is made to deceive."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: a damaged or cut-off zip ({error}); save or download the model again") from error
    names = [info.filename for info in infos]
    size = path.stat().st_size
    folders = {name.partition("/")[0] for name in names}
    for wrong, what in (
        (len(set(names)) != len(names), "two members of one name"),
        (any(".." in name.split("/") or name.startswith(("/", "\\")) for name in names), "a member outside its folder"),
        (any(info.flag_bits & _ENCRYPTED for info in infos), "an encrypted member"),
        (
            any(info.compress_type != zipfile.ZIP_STORED for info in infos),
            "compressed members, which torch never writes",
        ),
        (sum(info.file_size for info in infos) > size, "members that are larger than the file"),
        (len(folders) > 1, "more than one folder"),
    ):
        if wrong:
            raise ModelFileError(f"{path}: a zip with {what}, so it was not read; save the model again with torch.save")
    return names


def refuse_other_zips(path: Path, members: list[str]) -> None:
    """Raise ModelFileError for a zip that is not what ``torch.save`` writes."""
    inner = {name.partition("/")[2] for name in members}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise ModelFileError(f"{path}: a TorchScript program, which this version cannot scan; scan the eager model")
    if "archive_format" in inner or any(name.startswith(("models/", "serialized_")) for name in inner):
        raise ModelFileError(
            f"{path}: an exported program (.pt2), which this version cannot scan; scan the eager model"
        )
    if members and all(name.endswith(".npy") for name in members):
        raise ModelFileError(f"{path}: NumPy arrays (.npz), not a model; give them with --data")
    if "data.pkl" not in inner:
        raise ModelFileError(f"{path}: a zip, but not one that torch.save writes; give a saved model")


def names_in(path: Path, *, is_zip: bool) -> set[str]:
    """Return every global that a model file's pickles name, without building anything.

    TrustRequired for one that no model needs and that attacks are made of; ModelFileError for what is no pickle.
    """
    names: set[str] = set()
    for data in _pickles(path, is_zip=is_zip):
        names |= _globals(path, data)
    denied = sorted(name for name in names if is_denied(name))
    if denied:
        raise TrustRequired(
            f"{path}: names {denied[0]}, which no model needs and an attack would use; nothing was run; "
            "do not load this file, and tell whoever gave it to you"
        )
    return names


def _pickles(path: Path, *, is_zip: bool) -> Iterator[bytes]:
    """Yield the pickles of a torch file: one in a zip, up to five in a row in the format before torch 1.6."""
    if not is_zip:
        with path.open("rb") as file:
            data = file.read(_MAX_PICKLE)
        start = 0
        for _ in range(5):
            stop = _end_of_pickle(data, start)
            if stop is None:
                return
            yield data[start:stop]
            start = stop
        return
    with zipfile.ZipFile(path) as archive:
        member = next(info for info in archive.infolist() if info.filename.partition("/")[2] == "data.pkl")
        if member.file_size > _MAX_PICKLE:
            raise ModelFileError(f"{path}: its pickle takes {member.file_size} bytes, which no model needs; not read")
        yield archive.read(member)


def _end_of_pickle(data: bytes, start: int) -> int | None:
    """Return where the pickle that begins at ``start`` ends, or None where there is none."""
    stream = BytesIO(data)
    stream.seek(start)
    try:
        for opcode, _, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return stream.tell()
    except (ValueError, IndexError, KeyError, EOFError, OverflowError, UnicodeDecodeError):
        pass
    return None


def is_pickle(path: Path) -> bool:
    """Tell whether a file begins with a whole pickle, as torch before 1.6 and ``pickle.dump`` write."""
    with path.open("rb") as file:
        return _end_of_pickle(file.read(_MAX_PICKLE), 0) is not None


def is_denied(name: str) -> bool:
    """Tell whether a global is one that runs code or reaches the system, whoever asks for it."""
    parts = name.split(".")
    if any(".".join(parts[:i]) in _DENIED_MODULES for i in range(1, len(parts) + 1)):
        return True
    root = parts[0]
    return name in _DENIED_NAMES or (root in ("builtins", "__builtin__") and bool(set(parts[1:]) & _DENIED_BUILTINS))


def _globals(path: Path, data: bytes) -> set[str]:
    names: set[str] = set()
    strings: list[str | None] = []
    memo: dict[int, str | None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in ("GLOBAL", "INST"):
                names.add(_spelled(str(argument)))
                strings.append(None)
            elif name == "STACK_GLOBAL":
                if len(strings) < 2 or strings[-1] is None or strings[-2] is None:
                    raise TrustRequired(
                        f"{path}: names a global in a way that hides it; nothing was run; do not load it"
                    )
                names.add(f"{strings[-2]}.{strings[-1]}")
                strings.append(None)
            elif name.startswith("EXT"):
                raise TrustRequired(
                    f"{path}: names a global by number, which hides it; nothing was run; do not load it"
                )
            elif "UNICODE" in name or name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
                strings.append(str(argument))
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = strings[-1] if strings else None
            elif name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else None
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                strings.append(memo.get(int(str(argument))))
            elif name not in ("PROTO", "FRAME", "MARK"):
                strings.append(None)
    except (ValueError, IndexError, KeyError, EOFError, OverflowError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: its pickle is damaged ({error}); save or download the model again") from error
    return names


def _spelled(argument: str) -> str:
    """Turn ``module name`` into ``module.name``, in today's spelling of Python 2's module names."""
    module, _, name = argument.partition(" ")
    return f"{'builtins' if module == '__builtin__' else module}.{name}"
