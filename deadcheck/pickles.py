"""Reads a pickle without importing or running anything, so that what it would do can be judged first.

An interpreter of the opcodes (``pickletools`` describes them). Containers and numbers become what they are; a class or
function stays a name, and calling one gives an inert record, unless a ``Maker`` knows better.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from deadcheck.errors import ModelFileError, TrustRequired

MAX_STEPS = 3_000_000
"""Opcodes, and items copied, with what takes most memory counted several times; a state dict of 60,000 tensors takes
less. At this many the reader has run for some seconds and holds some hundred MiB."""

_HEAVY = dict.fromkeys(("EMPTY_SET", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"), 6)
"""Opcodes that take much more memory than one byte in the file, and what they count."""

_MAX_KEY_COST = 1000
"""Parts of a tuple that is used as a key, shared ones counted each time: hashing and comparing walk them all."""

_MAX_ODD_KEYS = 5000
"""Keys that are no text and no number: a file can choose tuples that all fall into one place of the table."""


@dataclass(eq=False, repr=False)
class Global:
    """A class or function that a pickle names, not looked up."""

    name: str


@dataclass(eq=False, repr=False)
class Inert:
    """An object that a pickle would make, not made: what it would call, with what, and what it would put into it."""

    name: str
    args: Any
    state: Any = None
    items: list[Any] = field(default_factory=list)
    """Items that would be set on it: keys and values in turn, or values."""


@dataclass(eq=False, repr=False)
class Stored:
    """Something that the pickle keeps outside itself, a tensor's storage most of all."""

    kind: str
    """Class of the storage."""

    key: str
    elements: int
    view: tuple[int, int] | None = None
    """First element and number of elements, where it is a part of the storage (torch before 0.4)."""


@dataclass(frozen=True)
class Pickled:
    """What one pickle holds."""

    root: Any
    globals: frozenset[str]
    calls: frozenset[str]
    """Names that it calls, a part of the globals."""

    storages: tuple[Stored, ...]
    stop: int
    """Where the pickle ends."""


class Maker:
    """Decides what the names of a pickle turn into; this one makes nothing."""

    def named(self, name: str) -> Any:
        """Return what a global stands for."""
        return Global(name)

    def called(self, name: str, args: Any) -> Any:
        """Return what calling a global gives."""
        return Inert(name, args)

    def stored(self, stored: Stored) -> Any:
        """Return what a storage stands for."""
        return stored


_GETATTR = "builtins.getattr"


def _is_bound_method(args: Any) -> bool:
    """Tell a method of an object in the file, which is pickled as a call of getattr and does nothing by itself."""
    return isinstance(args, tuple) and len(args) == 2 and isinstance(args[0], Inert) and type(args[1]) is str


class _Mark:
    """Begins a group of values on the stack."""


_MARK = _Mark()
_DAMAGE = (ValueError, IndexError, KeyError, EOFError, OverflowError, TypeError, AttributeError, RecursionError)


def read(data: bytes, source: str, start: int = 0, maker: Maker | None = None) -> Pickled:
    """Read the pickle that begins at ``start``, as far as ``maker`` makes anything of it.

    ModelFileError where it is damaged, TrustRequired where it names a global in a way that hides it.
    """
    try:
        return _Reader(source, maker or Maker()).run(data, start)
    except _DAMAGE as error:
        raise ModelFileError(
            f"{source}: damaged, its pickle cannot be read ({type(error).__name__}); save or download the file again"
        ) from error


class _Reader:
    def __init__(self, source: str, maker: Maker) -> None:
        self.source = source
        self.maker = maker
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Any] = {}
        self.spelled: dict[int, str] = {}
        self.calls: set[str] = set()
        self.storages: list[Stored] = []
        self.costs: dict[int, int] = {}
        self.costly: list[Any] = []
        self.steps = 0
        self.odd_keys = 0

    def run(self, data: bytes, start: int) -> Pickled:
        stream = BytesIO(data)
        stream.seek(start)
        ended = False
        for opcode, argument, _ in pickletools.genops(stream):
            self.count(_HEAVY.get(opcode.name, 1))
            ended = opcode.name == "STOP"
            if ended:
                break
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise self._refusal(f"uses the opcode {opcode.name}, which torch never writes")
            handler(self, argument)
        if not ended:
            raise EOFError
        root = self._pop()
        names = set(self.names) - ({_GETATTR} if _GETATTR not in self.calls else set())
        return Pickled(root, frozenset(names), frozenset(self.calls), tuple(self.storages), stream.tell())

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ModelFileError(
                f"{self.source}: its pickle takes more than {MAX_STEPS:,} steps, so it was not read; "
                "save the weights alone, as safetensors where they are very many"
            )

    def _refusal(self, what: str) -> TrustRequired:
        return TrustRequired(f"{self.source}: its pickle {what}; nothing was run; do not load this file")

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value must stand")
        return value

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark where a value must stand")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("no mark")

    def push(self, argument: Any) -> None:
        self.stack.append(argument)

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self._refusal("names a global in a way that hides it")
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full not in self.names:
            self.names[full] = self.maker.named(full)
            self.spelled[id(self.names[full])] = full
        self.stack.append(self.names[full])

    def spelled_global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.name(module, name)

    def stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self.name(module, name)

    def instance(self, argument: Any) -> None:
        items = self._since_mark()
        self.spelled_global(argument)
        self.call(self._pop(), tuple(items))

    def object_(self, _: Any) -> None:
        function, *items = self._since_mark()
        self.call(function, tuple(items))

    def extension(self, _: Any) -> None:
        raise self._refusal("names a global by number, which hides it")

    def reduce(self, _: Any) -> None:
        args, function = self._pop(), self._pop()
        self.call(function, args)

    def new_with_keywords(self, _: Any) -> None:
        keywords, args, function = self._pop(), self._pop(), self._pop()
        self.call(function, (args, keywords) if keywords else args)

    def call(self, function: Any, args: Any) -> None:
        name = self.spelled.get(id(function))
        if name is None:
            raise self._refusal("calls something that is no named class or function")
        if name == _GETATTR and _is_bound_method(args):
            self.stack.append(Inert(name, args))
            return
        self.calls.add(name)
        self.count(len(args) if isinstance(args, tuple) else 0)
        if name in _CONTAINERS:
            self.stack.append(self.contained(_CONTAINERS[name], args))
        else:
            self.stack.append(self.maker.called(name, args))

    def contained(self, make: Callable[[Any], Any], args: Any) -> Any:
        """Return the container that a call makes of another one."""
        items = args[-1] if isinstance(args, tuple) and args else ()
        if not isinstance(items, (dict, list, tuple, set, frozenset)):
            items = ()
        self.count(len(items))
        if make in (set, frozenset):
            self.check_keys(items)
        elif not isinstance(items, dict):
            items = [(key, value) for key, value in items]
            self.check_keys([key for key, _ in items])
        return self.costed(make(items), items)

    def costed(self, made: Any, items: Collection[Any]) -> Any:
        """Note what hashing an immutable container costs."""
        if isinstance(made, (tuple, frozenset)) and items:
            # Bounded, since the sum would double at each of a million levels.
            self.costs[id(made)] = min(1 + sum(self.costs.get(id(item), 1) for item in items), _MAX_KEY_COST + 1)
            self.costly.append(made)  # kept, so that no other object takes its id
        return made

    def build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, OrderedDict):
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        else:
            raise self._refusal(f"sets the state of a {type(target).__name__}, which torch never does")

    def persistent(self, identity: Any) -> None:
        if not isinstance(identity, tuple) or not identity:
            raise ValueError("not an identity that torch writes")
        if identity[0] == "module":  # torch before 1.6 put a class and its source text here
            self.stack.append(identity[1])
            return
        _, kind, key, _, elements = identity[:5]
        view = None if len(identity) < 6 or identity[5] is None else tuple(identity[5][1:3])
        name = self.spelled.get(id(kind))
        numbers = (elements, *(view or ()))
        if identity[0] != "storage" or name is None or type(key) is not str:
            raise ValueError("not a storage")
        if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers) or len(numbers) == 2:
            raise ValueError("not a size of a storage")
        stored = Stored(name, key, elements, view)
        self.storages.append(stored)
        self.stack.append(self.maker.stored(stored))

    def stack_persistent(self, _: Any) -> None:
        self.persistent(self._pop())

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def pop_mark(self, _: Any) -> None:
        self._since_mark()

    def duplicate(self, _: Any) -> None:
        self.stack.append(self._top())

    def put(self, argument: Any) -> None:
        self.memo[int(argument)] = self._top()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self._top()

    def get(self, argument: Any) -> None:
        self.stack.append(self.memo[int(argument)])

    def add(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, (dict, set)):
            self.check_keys(items[::2] if isinstance(target, dict) else items)
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key] = value
        elif isinstance(target, list):
            target += items
        elif isinstance(target, set):
            target.update(items)
        elif isinstance(target, Inert):
            target.items += items
        else:
            raise TypeError("no container")

    def add_one(self, _: Any) -> None:
        self.add([self._pop()])

    def add_pair(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self.add([key, value])

    def add_many(self, _: Any) -> None:
        self.add(self._since_mark())

    def collect(self, make: Callable[[Any], Any], count: int | None) -> None:
        items = self._since_mark() if count is None else [self._pop() for _ in range(count)][::-1]
        if make in (dict, set, frozenset):
            self.check_keys(items[::2] if make is dict else items)
        made = make(zip(items[::2], items[1::2], strict=True) if make is dict else items)
        self.stack.append(self.costed(made, items))

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Refuse keys whose hashing would never end, or that all fall into one place of the table."""
        for key in keys:
            self.odd_keys += type(key) not in _PLAIN_KEYS
            cheap = self.costs.get(id(key), 1) <= _MAX_KEY_COST and self.odd_keys <= _MAX_ODD_KEYS
            if not cheap or type(key) is complex or (type(key) is int and abs(key) >= 1 << 60):
                raise self._refusal("uses keys that no model uses, and that take for ever to look up")


_PLAIN_KEYS = frozenset((str, int, float, bool, bytes, type(None), Global, Inert))

_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "collections.OrderedDict": OrderedDict,
    **dict.fromkeys(("collections.defaultdict", "collections.Counter", "builtins.dict"), dict),
    "builtins.set": set,
    "builtins.frozenset": frozenset,
}
"""Kinds of containers whose making runs nothing of anybody's."""


def _collects(make: Callable[[Any], Any], count: int | None) -> Callable[[_Reader, Any], None]:
    return lambda reader, _: reader.collect(make, count)


def _pushes(value: Any) -> Callable[[_Reader, Any], None]:
    return lambda reader, _: reader.stack.append(value)


_HANDLERS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda reader, _: None,
    "FRAME": lambda reader, _: None,
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
         "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
         "BINBYTES8", "BYTEARRAY8"),
        _Reader.push,
    ),
    "NONE": _pushes(None), "NEWTRUE": _pushes(True), "NEWFALSE": _pushes(False),
    "GLOBAL": _Reader.spelled_global, "STACK_GLOBAL": _Reader.stack_global,
    "INST": _Reader.instance, "OBJ": _Reader.object_,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Reader.extension),
    "REDUCE": _Reader.reduce, "NEWOBJ": _Reader.reduce, "NEWOBJ_EX": _Reader.new_with_keywords, "BUILD": _Reader.build,
    "BINPERSID": _Reader.stack_persistent,
    "MARK": _Reader.mark, "POP": _Reader.pop, "POP_MARK": _Reader.pop_mark, "DUP": _Reader.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Reader.put), "MEMOIZE": _Reader.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Reader.get),
    "EMPTY_TUPLE": _collects(tuple, 0), "TUPLE1": _collects(tuple, 1), "TUPLE2": _collects(tuple, 2),
    "TUPLE3": _collects(tuple, 3), "TUPLE": _collects(tuple, None), "FROZENSET": _collects(frozenset, None),
    "EMPTY_LIST": _collects(list, 0), "LIST": _collects(list, None), "EMPTY_SET": _collects(set, 0),
    "EMPTY_DICT": _collects(dict, 0), "DICT": _collects(dict, None),
    "APPEND": _Reader.add_one, "APPENDS": _Reader.add_many, "ADDITEMS": _Reader.add_many,
    "SETITEM": _Reader.add_pair, "SETITEMS": _Reader.add_many,
}  # fmt: skip
