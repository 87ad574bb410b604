"""Judges the names of classes and functions in a pickle: plain ones, and those that attacks are made of."""

from __future__ import annotations

import re
from collections.abc import Collection

from deadcheck.errors import TrustRequired
from deadcheck.safe_text import brief

_DENIED_MODULES = frozenset(
    ("os", "posix", "nt", "sys", "subprocess", "importlib", "runpy", "pty", "socket", "shutil", "ctypes", "pip",
     "timeit", "webbrowser", "code", "codeop", "pdb", "bdb", "pickle", "_pickle", "multiprocessing", "asyncio",
     "commands", "popen2", "platform", "signal", "threading", "tempfile", "urllib", "http", "ftplib", "smtplib",
     "cProfile", "profile", "trace", "imp", "pkgutil", "zipimport", "venv", "ensurepip", "idlelib", "doctest",
     "marshal", "linecache", "fileinput", "io", "_io", "nturl2path", "dill", "cloudpickle", "joblib", "pydoc", "site",
     "distutils", "setuptools", "gc", "sqlite3", "glob", "_posixsubprocess", "xmlrpc", "sympy.parsing", "numpy.f2py",
     "numpy.testing", "numpy.ctypeslib", "torch.hub", "torch.utils.cpp_extension",
     "torch.utils._config_module", "torch.package", "torch.distributed.run", "torch._inductor", "torch._dynamo")
)  # fmt: skip
_DENIED_INSIDE = frozenset(
    ("os", "sys", "posix", "nt", "builtins", "subprocess", "importlib", "ctypes", "socket", "shutil", "runpy", "pickle")
)
"""Modules that other modules hold as attributes, so that a dotted name reaches them through any package."""

_DENIED_BUILTINS = frozenset(
    ("eval", "exec", "getattr", "setattr", "delattr", "__import__", "compile", "open", "input", "breakpoint",
     "globals", "locals", "vars", "apply", "execfile", "map", "filter", "memoryview")
)  # fmt: skip
_DENIED_NAMES = frozenset(
    ("torch.load", "torch.save", "torch.compile", "torch.from_file", "torch.jit.load", "torch.ops.load_library",
     "torch.classes.load_library", "torch.serialization.load", "torch.serialization.save",
     "torch.jit._serialization.load", "torch.export.load", "torch._export.load", "logging.config.listen",
     "logging.config.dictConfig", "operator.attrgetter", "operator.methodcaller", "_operator.attrgetter",
     "_operator.methodcaller", "operator.call", "_operator.call", "functools.reduce", "collections.namedtuple",
     "types.FunctionType", "types.CodeType", "types.MethodType", "sympy.sympify", "sympy.lambdify",
     "numpy.load", "numpy.save", "numpy.fromfile", "pandas.read_pickle", "pandas.eval",
     "torch.fx.graph_module._forward_from_src", "torch.storage._load_from_bytes")
)  # fmt: skip

_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)+")
"""A module and a name in it. A message may tell the user to type it."""

_HARMLESS = re.compile(
    r"torch\._dynamo\.(eval_frame\.(OptimizedModule|OptimizeContext)|convert_frame\.(CatchErrorsWrapper|ConvertFrame\w*)"
    r"|hooks\.Hooks|repro\.after_dynamo\.WrapBackendDebug|decorators\._DimRange)"
)
"""What torch.compile leaves around a model, and on a nested tensor: never looked up, the model inside is read."""


def refuse_denied(source: str, names: Collection[str]) -> None:
    """Raise TrustRequired for a name that no model needs and that attacks are made of; no flag allows it."""
    strange = sorted(name for name in names if not _NAME.fullmatch(name))
    if strange:
        raise TrustRequired(
            f"{source}: names {brief(strange[0])!r}, which is no name; nothing was run; do not load this file"
        )
    denied = sorted(name for name in names if is_denied(name))
    if denied:
        raise TrustRequired(
            f"{source}: names {denied[0]}, which no model needs and an attack would use; nothing was run; "
            "do not load this file, and tell whoever gave it to you"
        )


def is_denied(name: str) -> bool:
    """Tell whether a global is one that runs code or reaches the system, whoever asks for it."""
    if _HARMLESS.fullmatch(name):
        return False
    parts = name.split(".")
    if any(".".join(parts[:i]) in _DENIED_MODULES for i in range(1, min(len(parts), 4) + 1)):
        return True
    if name in _DENIED_NAMES or not _DENIED_INSIDE.isdisjoint(parts[1:-1]):
        return True
    root, inside = parts[0], parts[1:]
    if root in ("builtins", "__builtin__"):
        return not _DENIED_BUILTINS.isdisjoint(inside)
    # Methods that reach files, and attributes through which everything can be reached.
    return (
        inside[-1:] == ["from_file"]
        or name.startswith(("pathlib.Path.", "pathlib.PosixPath.", "logging.FileHandler", "logging.handlers."))
        or any(part.startswith("__") and part.endswith("__") for part in inside)
    )


_PLAIN = re.compile(
    r"torch\.(u?int\d+|float\d+\w*|bfloat16|complex\d+|bool|[A-Z][A-Za-z0-9]*Storage|Size|device|Tensor|per_\w+"
    r"|q?u?int\d+x?\d*|contiguous_format|preserve_format|channels_last(_3d)?|strided|sparse_\w+)"
    r"|torch\.storage\.(Untyped|Typed)Storage|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter"
    r"|parameter_with_state|qtensor|sparse_tensor|sparse_csr_tensor)|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)|torch\.serialization\._get_layout"
    r"|collections\.(OrderedDict|defaultdict|Counter)|builtins\.(dict|set|frozenset|complex|int|float|list|tuple)"
    r"|_codecs\.encode"
)


def is_plain(name: str) -> bool:
    """Tell whether a global only makes a tensor, a container or a number."""
    return _PLAIN.fullmatch(name) is not None
