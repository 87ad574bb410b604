"""Judges every text in the description of an exported program by the place it stands in: torch makes Python of many."""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deadcheck.safe_text import brief

_PATH = re.compile(r"[\w.:/@+\- ]*")
"""Paths of weights and modules; they are put between quotes."""

_CLASS = re.compile(r"[\w\-]+(\.[\w\-]+)+")

_TARGET = re.compile(
    r"torch\.ops\.(aten|prims)\.(_?[A-Za-z]\w*|__i?(and|or|xor|lshift|rshift)__)(\.[A-Za-z]\w*)?"
    r"|torch\.ops\.prim\.(device|dtype|layout)(\.default)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|map_impl|scan|associative_scan|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt|log2|pow|cos|sin|tan|round)"
    r"|torch\.sym_(int|float|max|min|not|ite|sqrt|sum|fresh_size)|torch\._sym_[a-z0-9]+"
)
_TARGET_DENIED = frozenset(
    ("save", "from_file", "warn", "_print", "manual_seed", "seed", "set_data", "set_grad_enabled", "wait", "backward",
     "_backward", "dist_backward", "record_stream", "resize_storage_bytes_", "_sparse_coo_tensor_unsafe",
     "_sparse_compressed_tensor_unsafe", "_sparse_csr_tensor_unsafe", "_sparse_csc_tensor_unsafe",
     "_sparse_bsr_tensor_unsafe", "_sparse_bsc_tensor_unsafe", "_nested_view_from_buffer", "_nested_view_from_jagged")
)  # fmt: skip
"""Operators that write or read files, change the state of the process, or do not check what they are given."""

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
_POWERS = frozenset(("Pow", "PowByNatural", "FloatPow"))
_MAX_POWER = 8
_MAX_EXPRESSION = 4000
_SYMBOL = re.compile(r"[a-z]{1,3}\d{1,5}")
_WORD = re.compile(r"-?[\d.]+(e[+-]?\d+)?|[A-Za-z_]\w{0,39}")
_QUOTES = re.compile(r"['\"\\\n\r]")


class Judge:
    """What is dangerous in a program's texts, and the classes that its inputs and outputs need."""

    def __init__(self) -> None:
        self.dangers: list[str] = []
        self.needs: set[str] = set()
        self._texts: dict[str, Callable[[str, str], None]] = {
            **dict.fromkeys(("target", "as_operator"), self._target),
            **dict.fromkeys(("in_spec", "out_spec"), self._spec),
            **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "fqn"), self.path),
            **dict.fromkeys(("name", "as_name", "forward_arg_names", "user_input_name"), self._identifier),
            **dict.fromkeys(("as_string", "as_strings", "torch_version", "guards_code"), lambda key, text: None),
            "class_fqn": self._object,
            "expr_str": self._expression,
        }

    def program(self, document: Mapping[str, Any]) -> None:
        """Judge the description of a program."""
        self.walk("", document)
        ranges = document.get("range_constraints")
        for symbol in ranges if isinstance(ranges, dict) else ():
            if not _SYMBOL.fullmatch(symbol):
                self.dangers.append(f"the range of {quoted(symbol)} is that of no symbol")
        # These go into the source of the checks on inputs, between quotes.
        module = document["graph_module"]
        for text in _strings([_under(module, "graph", "inputs"), _under(module, "signature", "input_specs")]):
            if _QUOTES.search(text):
                self.dangers.append(f"the input {quoted(text)} holds a quote")

    def walk(self, key: str, value: Any) -> None:
        """Judge every text below a value that stands under a key."""
        queue: list[tuple[str, Any]] = [(key, value)]
        while queue:
            key, value = queue.pop()
            if isinstance(value, dict):
                for name, item in value.items():
                    self.name("a name", name)
                    if name != "metadata" or not ("target" in value or "module_call_graph" in value):
                        queue.append((name, item))
            elif isinstance(value, list):
                queue += [(key, item) for item in value]
            elif isinstance(value, str):
                self._texts.get(key, self.name)(key, value)

    def path(self, key: str, text: str) -> None:
        """Judge the path of a weight or module, which becomes attributes of the model."""
        self.name(key, text)
        if any(part.startswith("__") for part in text.split(".")):
            self.dangers.append(f"{key} {quoted(text)} is no name of a weight or module")

    def name(self, key: str, text: str) -> None:
        """Judge a name that stands in no special place."""
        if not (_CLASS if key == "the type" else _PATH).fullmatch(text):
            self.dangers.append(f"{key} {quoted(text)} is no name")

    def _identifier(self, key: str, text: str) -> None:
        if text and (not text.isidentifier() or keyword.iskeyword(text)):
            self.dangers.append(f"{key} {quoted(text)} is no name")

    def _object(self, key: str, text: str) -> None:
        self.dangers.append(f"it holds an object of {quoted(text)}")

    def _target(self, key: str, text: str) -> None:
        operator = text.split(".")[3] if text.startswith("torch.ops.") and text.count(".") > 2 else ""
        if not _TARGET.fullmatch(text) or operator in _TARGET_DENIED:
            self.dangers.append(f"it calls {quoted(text)}, which is no operator of torch that only computes")

    def _expression(self, key: str, text: str) -> None:
        if not _is_symbolic(text):
            self.dangers.append(f"the expression {quoted(text)} is more than arithmetic")

    def _spec(self, key: str, text: str) -> None:
        """Look through a tree of inputs or outputs: other classes than containers are imported, or registered."""
        try:
            root = json.loads(text)[1]
            self._tree(root)
            last = root["children_spec"][1] if len(root["children_spec"]) == 2 else root
            for name in json.loads(last["context"]) if last["type"] == "builtins.dict" else ():
                if not isinstance(name, str) or not name or not name.isidentifier() or keyword.iskeyword(name):
                    self.dangers.append(f"the argument {quoted(str(name))} is no name")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            if text:
                self.dangers.append(f"the tree {quoted(text)} cannot be read")

    def _tree(self, root: Any) -> None:
        queue = [root]
        while queue:
            node = queue.pop()
            queue += node["children_spec"]
            context = json.loads(node["context"]) if isinstance(node["context"], str) else node["context"]
            if node["type"] not in _CONTAINERS:
                self.name("the type", str(node["type"]))
                self.needs.add(str(node["type"]))
            if node["type"] == "collections.defaultdict" or "__enum__" in json.dumps(context):
                self.dangers.append(f"its inputs or outputs import a module: {quoted(json.dumps(context))}")
            if any(_QUOTES.search(text) for text in _strings(context)):
                self.dangers.append(f"the names {quoted(json.dumps(context))} of its inputs or outputs hold a quote")


def nodes(program: Any) -> Iterator[dict[str, Any]]:
    """Yield the operators of a program's graph, those of its branches too, in the order of the code."""
    queue = [program]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            if "target" in value:
                yield value
            queue += reversed(value.values())
        elif isinstance(value, list):
            queue += reversed(value)


def _under(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _strings(value: Any) -> Iterator[str]:
    queue = [value]
    while queue:
        value = queue.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            queue += value
        elif isinstance(value, Mapping):
            queue += [*value.keys(), *value.values()]


def _is_symbolic(text: str) -> bool:
    """Tell arithmetic on symbols and numbers from other Python: torch hands the text to an evaluator of Python."""
    # What is no ASCII, or no single line, may be read in another way by that evaluator than by this one.
    if len(text) > _MAX_EXPRESSION or not re.fullmatch(r"[\w ()+\-*/%,.<>=!&|~']*", text, re.ASCII):
        return False
    try:
        found = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(_is_harmless, found)) and all(map(_is_small_power, found))


def _powers(node: ast.AST) -> Sequence[ast.AST]:
    """Return base and exponent of a power; nothing of anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS:
        return node.args
    return [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) else []


def _is_small_power(node: ast.AST) -> bool:
    """Tell what is no power, or one that stays small: of a small exponent, and not itself of a power."""
    base, *exponents = _powers(node) or [node]
    return base is node or (len(exponents) == 1 and _is_small(exponents[0]) and not any(map(_powers, ast.walk(base))))


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        known = isinstance(node.func, ast.Name) and node.func.id in _SYMBOLIC
        # The second argument of Float is how many digits it has.
        return known and (len(node.args) == 1 or ast.unparse(node.func) != "Float")
    if isinstance(node, ast.BinOp):
        return not isinstance(node.op, (ast.LShift, ast.RShift))
    if isinstance(node, ast.keyword):
        return isinstance(node.value, ast.Constant) and (type(node.value.value) is bool or _is_precision(node))
    if isinstance(node, ast.Name):
        return node.id in _SYMBOLIC or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float, bool) or bool(_WORD.fullmatch(str(node.value)))
    return isinstance(
        node,
        (ast.Expression, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Tuple, ast.operator, ast.unaryop, ast.cmpop,
         ast.boolop, ast.expr_context),
    )  # fmt: skip


def _is_precision(node: ast.keyword) -> bool:
    value = node.value.value if isinstance(node.value, ast.Constant) else None
    return node.arg == "precision" and type(value) is int and 0 < value <= 200


def _is_small(node: ast.AST) -> bool:
    """Tell an exponent that keeps a power small: a number, or ``Integer(number)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer":
        return len(node.args) == 1 and _is_small(node.args[0])
    if isinstance(node, ast.UnaryOp):
        return _is_small(node.operand)
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, (int, float)) and abs(value) <= _MAX_POWER


def quoted(text: str) -> str:
    """Return a text of the file as a message shows it."""
    return f"'{brief(text, 80)}'"
