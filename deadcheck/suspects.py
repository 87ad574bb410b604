"""Recognises activations written out by hand from several operators, so that a report can name them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

_COMPARES = frozenset(("gt", "ge", "lt", "le"))
_COPIES = frozenset(("_to_copy", "clone", "logical_not", "bitwise_not"))


class Suspects:
    """Remembers signs and absolute values within one forward pass, and spots where they meet their source again."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], str, weakref.ref[Tensor]]] = {}

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> str | None:
        """Look at one operator; return its name if it completes a hand-written activation."""
        if name in _COMPARES:
            if isinstance(args[0], Tensor) and _is_zero(args[1]):
                self._note(output, "sign", args[0])
        elif name == "abs":
            self._note(output, "abs", args[0])
        elif name in _COPIES:
            made = self._of(args[0])
            if made is not None:
                self._note(output, *made)
        elif name in _COMPLETES and self._made:
            return f"aten.{name}" if _COMPLETES[name](self, args) else None
        return None

    def _note(self, output: Any, kind: str, source: Tensor) -> None:
        self._made[id(output)] = (weakref.ref(output), kind, weakref.ref(source))

    def _of(self, value: Any) -> tuple[str, Tensor] | None:
        entry = self._made.get(id(value)) if isinstance(value, Tensor) else None
        if entry is None or entry[0]() is not value:
            return None
        source = entry[2]()
        return None if source is None else (entry[1], source)

    def _is(self, value: Any, kind: str, source: Any) -> bool:
        made = self._of(value)
        return made is not None and made[0] == kind and made[1] is source

    def _pair(self, args: tuple[Any, ...], kind: str) -> bool:
        return self._is(args[1], kind, args[0]) or self._is(args[0], kind, args[1])

    def _product(self, args: tuple[Any, ...]) -> bool:
        return self._pair(args, "sign")

    def _sum(self, args: tuple[Any, ...]) -> bool:
        return self._pair(args, "abs")

    def _choice(self, args: tuple[Any, ...]) -> bool:
        return any(self._is(args[0], "sign", branch) for branch in args[1:])

    def _fill(self, args: tuple[Any, ...]) -> bool:
        return self._is(args[1], "sign", args[0]) and _is_zero(args[2])

    def _put(self, args: tuple[Any, ...]) -> bool:
        return len(args[1]) == 1 and self._is(args[1][0], "sign", args[0]) and _is_zero(args[2])


_COMPLETES = {
    "mul": Suspects._product,
    "mul_": Suspects._product,
    "add": Suspects._sum,
    "add_": Suspects._sum,
    "where": Suspects._choice,
    "masked_fill": Suspects._fill,
    "masked_fill_": Suspects._fill,
    "index_put": Suspects._put,
    "index_put_": Suspects._put,
}


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not bool(value)
    return isinstance(value, (int, float)) and value == 0
