"""Judges the archive of an exported program (.pt2) before torch opens it: what in it would run code of the file.

``torch.export.load`` unpickles weights, constants and sample inputs, loads native libraries, evaluates expressions as
Python, imports modules that a tree of inputs names, and writes names into Python source. A program that needs none of
that passes, and everything else is listed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

from deadcheck import archive
from deadcheck.archive import Member
from deadcheck.errors import ModelFileError

MODEL = "models/model.json"
"""The program in the archive that ``torch.export.load`` returns."""

SAMPLE = "data/sample_inputs/model.pt"

_NAME = re.compile(r"[\w.:/@+\- ]*")
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|prim)\.[A-Za-z]\w*(\.[A-Za-z]\w*)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt|log2|pow|cos|sin|tan|round)"
    r"|torch\.sym_(int|float|max|min|not|ite|sqrt|sum|fresh_size)|torch\._sym_\w+"
)
_TARGET_DENIED = frozenset(("save", "from_file", "warn", "_print", "manual_seed", "set_data", "resize_storage_bytes_"))
_TARGET_KEYS = ("target", "as_operator")
_SPEC_KEYS = ("in_spec", "out_spec")
_FREE_KEYS = ("as_string", "torch_version")
_CONTAINERS = frozenset(
    (None, "builtins.tuple", "builtins.list", "builtins.dict", "builtins.NoneType", "collections.OrderedDict",
     "collections.deque", "torch.Size")
)  # fmt: skip
_SYMBOLIC = frozenset(
    ("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling",
     "Eq", "Ne", "Gt", "Ge", "Lt", "Le", "Equality", "Unequality", "StrictGreaterThan", "GreaterThan",
     "StrictLessThan", "LessThan", "And", "Or", "Not", "Piecewise", "FloorDiv", "CleanDiv", "CeilDiv", "PythonMod",
     "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "TruncToInt", "CeilToInt", "FloorToInt",
     "RoundToInt", "PowByNatural", "FloatPow", "Where", "Identity", "IsNonOverlappingAndDenseIndicator")
)  # fmt: skip
_MAX_EXPRESSION = 4000


@dataclass(frozen=True)
class Audit:
    """What an archive holds."""

    dangers: tuple[str, ...]
    """What in it would run code of the file, in words; empty for one that may be loaded."""

    needs: tuple[str, ...]
    """Classes outside torch that its inputs or outputs are made of."""

    has_sample: bool
    """Whether it holds the inputs it was exported with."""


def audit(file: BytesIO, source: str) -> Audit:
    """Judge an archive; ModelFileError where it is damaged or no program is in it, TrustRequired for what is denied."""
    members = {member.inner: member for member in archive.members_of(file, source)}
    if not any(name.startswith("models/") for name in members):
        raise ModelFileError(f"{source}: an exported program of torch before 2.7, or none at all; export it again")
    if MODEL not in members:
        raise ModelFileError(f"{source}: holds no program called 'model'; save it with torch.export.save")
    found = _Json()
    for name, member in members.items():
        if name.endswith(".json"):
            found.judge(_parsed(source, name, archive.member_bytes(file, source, member)))
    dangers = list(found.dangers)
    for name, member in members.items():
        dangers += _judged(file, source, name, member, is_pickle=name.rpartition("/")[2] in found.pickled)
    return Audit(tuple(dict.fromkeys(dangers)), tuple(sorted(found.needs)), SAMPLE in members)


def _judged(file: BytesIO, source: str, name: str, member: Member, *, is_pickle: bool) -> Iterator[str]:
    """Yield what is dangerous in a member, by what it is."""
    folder, base = name.rpartition("/")[::2]
    if folder.startswith("data/aotinductor") or PurePosixPath(base).suffix in (".so", ".o", ".dll", ".dylib", ".cubin"):
        yield f"{name} is compiled code"
    elif folder == "data/constants" and not base.startswith(("tensor_", "model_constants_config")):
        yield f"{name} is a pickled object"
    elif base.endswith(".pt") or is_pickle:
        data = archive.member_bytes(file, source, member, limit=member.size)
        names = {name for pickled in archive.pickles_in(data, f"{source}: {name}") for name in pickled.globals}
        archive.refuse_denied(f"{source}: {name}", names)
        for strange in sorted(name for name in names if not archive.is_plain(name)):
            yield f"{name} is a pickle that names {strange}"


def _parsed(source: str, name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{source}: damaged, {name} cannot be read; export the program again") from error


class _Json:
    """What is dangerous in the descriptions of a program and its weights."""

    def __init__(self) -> None:
        self.dangers: list[str] = []
        self.needs: set[str] = set()
        self.pickled: set[str] = set()
        """Files of weights and constants that are pickles."""

    def judge(self, value: Any) -> None:
        """Look at every text in it."""
        queue: list[tuple[str, Any]] = [("", value)]
        while queue:
            key, value = queue.pop()
            if isinstance(value, dict):
                if value.get("use_pickle"):
                    self.pickled.add(str(value.get("path_name")))
                for name, item in value.items():
                    self._name("a name", name)
                    if name != "metadata":  # words for people, and places in the source
                        queue.append((name, item))
            elif isinstance(value, list):
                queue += [(key, item) for item in value]
            elif isinstance(value, str):
                self._text(key, value)

    def _text(self, key: str, text: str) -> None:
        if key in _TARGET_KEYS:
            operator = text.split(".")[3] if text.startswith("torch.ops.") and text.count(".") > 2 else ""
            if not _TARGET.fullmatch(text) or operator in _TARGET_DENIED:
                self.dangers.append(f"it calls {_shown(text)}, which is no operator of torch that only computes")
        elif key in _SPEC_KEYS:
            self._spec(text)
        elif key == "expr_str":
            if not _is_symbolic(text):
                self.dangers.append(f"the expression {_shown(text)} is more than arithmetic")
        elif key not in _FREE_KEYS:
            self._name(key, text)

    def _name(self, key: str, text: str) -> None:
        if not _NAME.fullmatch(text) or "__import__" in text:
            self.dangers.append(f"{key} {_shown(text)} is no name")

    def _spec(self, text: str) -> None:
        """Look through a tree of inputs or outputs: other classes than containers are imported, or registered."""
        try:
            queue = [json.loads(text)[1]]
            while queue:
                node = queue.pop()
                queue += node["children_spec"]
                context = json.loads(node["context"]) if isinstance(node["context"], str) else node["context"]
                if node["type"] not in _CONTAINERS:
                    self.needs.add(str(node["type"]))
                if node["type"] == "collections.defaultdict" or "__enum__" in json.dumps(context):
                    self.dangers.append(f"its inputs or outputs import a module: {_shown(json.dumps(context))}")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            if text:
                self.dangers.append(f"the tree {_shown(text)} cannot be read")


def _is_symbolic(text: str) -> bool:
    """Tell arithmetic on symbols and numbers from other Python: torch evaluates the expression."""
    if len(text) > _MAX_EXPRESSION:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_harmless(node) for node in nodes)


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _SYMBOLIC
    if isinstance(node, ast.Name):
        return node.id in _SYMBOLIC or bool(re.fullmatch(r"[a-z]{1,3}\d+", node.id))
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or bool(re.fullmatch(r"\w{1,40}", node.value))
    return isinstance(
        node,
        (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Tuple, ast.keyword, ast.operator,
         ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context),
    )  # fmt: skip


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
