"""Pickles that would run code, or hide that they would, in every dress that torch reads."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import STOP, Case, built, called, into, legacy, mapping, named, text, torch_zip, zipped

DENIED = "which no model needs and an attack would use"


def _mkdir(marker: Path) -> bytes:
    return called("posix", "mkdir", text(str(marker)))


def _stack_global(marker: Path) -> bytes:
    return b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + text(str(marker)) + b"\x85R."


def _inst(marker: Path) -> bytes:
    return b"(" + text(str(marker)) + b"iposix\nmkdir\n."


def _obj(marker: Path) -> bytes:
    return b"(" + named("posix", "mkdir") + text(str(marker)) + b"o."


def _newobj_ex(marker: Path) -> bytes:
    return b"\x80\x04" + named("builtins", "exec") + text(f"import os; os.mkdir({str(marker)!r})") + b"\x85}\x92."


def _joined_names(marker: Path) -> bytes:
    """The names are put together by an unpickled str.join, so that neither is spelled out in the file."""
    join = named("builtins", "getattr") + b"(" + text("") + text("join") + b"tR"
    module = join + b"(" + b"]" + text("po") + b"a" + text("six") + b"a" + b"tR"
    return b"\x80\x04" + module + text("mkdir") + b"\x93" + text(str(marker)) + b"\x85R."


def _memo_swap(marker: Path) -> bytes:
    """A memo entry is written twice: who reads the first alone sees a harmless name."""
    return (
        b"\x80\x04" + named("collections", "OrderedDict") + b"q\x000" + named("posix", "mkdir") + b"q\x000h\x00"
        + text(str(marker)) + b"\x85R."
    )  # fmt: skip


def _built_state(marker: Path) -> bytes:
    """The payload stands behind an object that looks like a usual stray."""
    held = built("argparse", "Namespace", {"lr": b"K\x01"})
    return b"\x80\x02" + held + b"0" + _mkdir(marker) + STOP


def _chain(marker: Path) -> bytes:
    """What a call gives is called in turn, so that no call of the payload is spelled out."""
    getter = called("operator", "attrgetter", text("mkdir"))
    inside = called("importlib", "import_module", text("os"))
    return b"\x80\x02" + getter + b"(" + inside + b"tR(" + text(str(marker)) + b"tR."


def _by_protocol(protocol: int) -> Callable[[Path], bytes]:
    class Payload:
        def __init__(self, marker: Path) -> None:
            self.marker = marker

        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            import os

            return os.mkdir, (str(self.marker),)

    return lambda marker: pickle.dumps({"state_dict": Payload(marker)}, protocol)


def _dotted(path: str, name: str, argument: Callable[[Path], str]) -> Callable[[Path], bytes]:
    head = f"\x8c{chr(len(path))}{path}\x8c{chr(len(name))}{name}".encode("latin1")
    return lambda marker: b"\x80\x04" + head + b"\x93" + text(argument(marker)) + b"\x85R."


def _call(module: str, name: str, *args: Callable[[Path], bytes] | bytes) -> Callable[[Path], bytes]:
    def make(marker: Path) -> bytes:
        return b"\x80\x02" + called(module, name, *(arg(marker) if callable(arg) else arg for arg in args)) + STOP

    return make


def _path(marker: Path) -> bytes:
    return text(str(marker))


def _code(marker: Path) -> bytes:
    return text(f"__import__('os').mkdir({str(marker)!r})")


_SPELLINGS: dict[str, Callable[[Path], bytes]] = {
    "global": lambda marker: b"\x80\x02" + _mkdir(marker) + STOP,
    "stack-global": _stack_global,
    "inst": _inst,
    "obj": _obj,
    "newobj-ex": _newobj_ex,
    "memo-swap": _memo_swap,
    "build-after-state": _built_state,
    "popped-result": lambda marker: b"\x80\x02" + _mkdir(marker) + b"0}.",
    "in-a-key": lambda marker: b"\x80\x02}" + _mkdir(marker) + b"K\x01s.",
    "beside-weights": lambda marker: b"\x80\x02" + mapping({"state_dict": b"}", "evil": _mkdir(marker)}) + STOP,
    **{f"protocol-{number}": _by_protocol(number) for number in range(6)},
}

_FUNCTIONS: dict[str, Callable[[Path], bytes]] = {
    "os-system": _call("os", "system", lambda marker: text(f"mkdir {marker}")),
    "nt-system": _call("nt", "system", lambda marker: text(f"mkdir {marker}")),
    "subprocess": _call("subprocess", "check_call", lambda marker: b"]" + text("mkdir") + b"a" + _path(marker) + b"a"),
    "builtins-eval": _call("builtins", "eval", _code),
    "builtin-of-python-2": _call("__builtin__", "eval", _code),
    "builtins-exec": _call("builtins", "exec", _code),
    "builtins-getattr": _call("builtins", "getattr", called("builtins", "__import__", text("os")), text("mkdir")),
    "builtins-import": _call("builtins", "__import__", text("os")),
    "builtins-open": _call("builtins", "open", _path, text("w")),
    "io-open": _call("io", "open", _path, text("w")),
    "importlib": _call("importlib", "import_module", text("os")),
    "runpy": _call("runpy", "run_path", _path),
    "torch-hub": _call("torch.hub", "load", _path),
    "torch-load": _call("torch", "load", _path),
    "torch-jit-load": _call("torch.jit", "load", _path),
    "load-library": _call("torch.ops", "load_library", _path),
    "cpp-extension": _call("torch.utils.cpp_extension", "load", _path),
    "pip-main": _call("pip", "main", b"]"),
    "timeit": _call("timeit", "timeit", _code),
    "file-handler": _call("logging", "FileHandler", _path),
    "numpy-runstring": _call("numpy.testing._private.utils", "runstring", _code, b"}"),
    "shutil-move": _call("shutil", "move", _path, _path),
    "pathlib-touch": _call("pathlib", "Path.touch", lambda marker: called("pathlib", "Path", _path(marker))),
    "ctypes": _call("ctypes", "CDLL", _path),
    "bdb-run": _call("bdb", "Bdb.run", called("bdb", "Bdb"), _code),
    "pydoc-locate": _call("pydoc", "pipepager", text(""), lambda marker: text(f"mkdir {marker}")),
    "sympy": _call("sympy", "sympify", _code),
    "namedtuple": _call("collections", "namedtuple", text("x"), text("y")),
    "from-file": _call("torch._C", "StorageBase.from_file", _path),
    "dotted-torch": _dotted("torch", "os.mkdir", str),
    "dotted-collections": _dotted("collections", "abc.sys.modules", str),
    "dotted-builtins": _dotted("torch.serialization", "__builtins__.get", str),
    "dotted-globals": _dotted("torch.nn.modules.linear", "Linear.__init__.__globals__.get", str),
}

_ARMED_NOT = {
    "newobj-ex", "pathlib-touch", "nt-system", "builtins-getattr", "builtins-import", "importlib", "torch-hub", "torch-load", "torch-jit-load",
    "load-library", "cpp-extension", "pip-main", "runpy", "shutil-move", "ctypes", "namedtuple", "from-file",
    "dotted-collections", "dotted-builtins", "dotted-globals", "builtin-of-python-2", "bdb-run", "pydoc-locate",
    "numpy-runstring",
}  # fmt: skip
"""Payloads that need more than one call, or another system, to leave a mark."""


def _in_zip(make: Callable[[Path], bytes]) -> Callable[[Path], bytes]:
    return lambda marker: torch_zip(make(marker))


def _part(name: str) -> Callable[[Path], bytes]:
    def make(marker: Path) -> bytes:
        evil = b"\x80\x02" + _mkdir(marker) + STOP
        return legacy(evil) if name == "root" else legacy(b"\x80\x02}.", **{name: evil})

    return make


def _persistent(marker: Path) -> bytes:
    return torch_zip(b"\x80\x02(" + text("storage") + _mkdir(marker) + text("0") + text("cpu") + b"K\x01tQ.")


def _persistent_text(marker: Path) -> bytes:
    return b"P" + str(marker).encode() + b"\n."


def _legacy_module_source(marker: Path) -> bytes:
    """Torch before 1.6 kept a class and the text of its source in a persistent id."""
    held = b"(" + text("module") + named("posix", "mkdir") + text("net.py") + text("class Net: pass") + b"tQ"
    return legacy(b"\x80\x02" + held + b"(" + text(str(marker)) + b"tR.")


def _second_pickle(marker: Path) -> bytes:
    """The payload stands after the pickle's end, where a careless reader goes on."""
    return torch_zip(b"\x80\x02}." + b"\x80\x02" + _mkdir(marker) + STOP)


def _tar(marker: Path) -> bytes:
    """A tar of torch before 0.2, whose first bytes are a pickle that ends at once."""
    import io
    import tarfile

    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (
            ("N.", b""), ("storages", b"\x80\x02K\x00."), ("tensors", b"\x80\x02K\x00."),
            ("pickle", b"\x80\x02" + _mkdir(marker) + STOP),
        ):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return held.getvalue()


def _two_pickles_in_one_zip(marker: Path) -> bytes:
    return zipped({"data.pkl": b"\x80\x02}.", "Data.pkl": b"\x80\x02" + _mkdir(marker) + STOP, "version": b"3\n"})


def _optimised(marker: Path) -> bytes:
    return torch_zip(pickletools.optimize(b"\x80\x02" + _mkdir(marker) + STOP))


CASES = (
    *(
        Case(f"pickle-{name}", into("model.pt", make), 4, DENIED, armed="" if name in _ARMED_NOT else "pickle")
        for name, make in _SPELLINGS.items()
    ),
    *(
        Case(f"pickle-{name}-in-zip", into("model.pt", _in_zip(make)), 4, DENIED, armed="" if name in _ARMED_NOT else "torch")
        for name, make in _SPELLINGS.items()
        if name not in ("protocol-0", "protocol-1", "protocol-5")
    ),
    *(
        Case(f"names-{name}", into("model.pt", make), 4, DENIED, armed="" if name in _ARMED_NOT else "pickle")
        for name, make in _FUNCTIONS.items()
    ),
    *(
        Case(f"legacy-{name}-pickle", into("model.pt", _part(name)), 4, DENIED, armed="" if name == "keys" else "torch")
        for name in ("magic", "version", "system", "root", "keys")
    ),
    Case("pickle-joined-names", into("model.pt", _joined_names), 4, "calls something that is no named class",
         armed="pickle"),
    Case("pickle-calls-a-result", into("model.pt", _chain), 4, "calls something that is no named class",
         armed="pickle"),
    Case("pickle-extension", into("model.pt", b"\x80\x02\x82\x01."), 4, "names a global by number"),
    Case("pickle-extension-4", into("model.pt", b"\x80\x02\x84\x01\x00\x00\x00."), 4, "names a global by number"),
    Case("pickle-persistent-payload", into("model.pt", _persistent), 2, "damaged", armed="torch"),
    Case("pickle-persistent-text", into("model.pt", _persistent_text), 2, "text, not a model", inspect=2),
    Case("legacy-module-source", into("model.pt", _legacy_module_source), 4, DENIED),
    Case("pickle-second-behind-the-first", into("model.pt", _second_pickle), 2, "no entry of it looks like weights",
         found="no entry of it looks like weights"),
    Case("tar-behind-a-pickle", into("model.pt", _tar), 2, "tar file of torch before 0.2", inspect=2),
    Case("zip-two-pickles", into("model.pt", _two_pickles_in_one_zip), 2, "two members of one name"),
    Case("pickle-out-of-band", into("model.pt", b"\x80\x05\x97."), 4, "which torch never writes"),
    Case("pickle-unknown-opcode", into("model.pt", b"\x80\x04\xff."), 2, "damaged"),
    Case("pickle-calls-a-number", into("model.pt", b"\x80\x02K\x01)R."), 4, "calls something that is no named class"),
    Case("pickle-build-on-a-list", into("model.pt", b"\x80\x02]}b."), 4, "sets the state of a list"),
    Case("pickle-of-a-function", into("model.pt", _in_zip(_call("glob", "glob", _path))), 4, "glob.glob"),
)  # fmt: skip
