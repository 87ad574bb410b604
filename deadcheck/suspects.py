"""Recognises activations written out by hand from several operators, so that a report can name them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

_COMPARES = frozenset(("gt", "ge", "lt", "le"))
_CURVES = frozenset(("erf", "exp", "expm1", "atan"))
_KEEPS = frozenset(("_to_copy", "clone", "logical_not", "bitwise_not", "neg", "reciprocal", "square"))
_ADDS = frozenset(("add", "add_"))
_SCALES = frozenset(("add", "sub", "mul", "div", "rsub", "pow", "minimum", "add_", "sub_", "mul_", "div_"))


class Suspects:
    """Remembers signs, absolute values and curves within one forward pass, and spots where they meet their source."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], str, weakref.ref[Tensor]]] = {}

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> str | None:
        """Look at one operator; return its name if it completes a hand-written activation."""
        if name in _COMPARES:
            if isinstance(args[0], Tensor) and _is_zero(args[1]):
                self._note(output, "sign", args[0])
        elif name == "abs":
            self._note(output, "abs", args[0])
        elif name in _CURVES:
            self._note(output, "exponential" if name == "exp" else "curve", self._source(args[0]))
        elif name in _COMPLETES and _COMPLETES[name](self, args):
            return f"aten.{name}"
        elif name in _KEEPS or name in _SCALES:
            self._pass_on(args, output)
            if name in _ADDS and self._has_kind(output, "exponential") and _is_number(args[1]):
                self._note(output, "raised", self._source(output))
        return None

    def curve(self, source: Tensor, output: Tensor) -> None:
        """Note the output of an operator that bends its input."""
        self._note(output, "curve", self._source(source))

    def _pass_on(self, args: tuple[Any, ...], output: Any) -> None:
        """A number added or multiplied changes neither the kind nor the source; nor do two values of one source."""
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.numel() > 1]
        sources = [self._source(tensor) for tensor in tensors]
        if not sources or sources[0] is not sources[-1]:
            return
        kinds = [made[0] for tensor in tensors if (made := self._of(tensor)) is not None]
        self._note(output, max(kinds, key=_KINDS.index, default="straight"), sources[0])

    def _note(self, output: Any, kind: str, source: Tensor) -> None:
        if output is not source:
            self._made[id(output)] = (weakref.ref(output), kind, weakref.ref(source))

    def _of(self, value: Any) -> tuple[str, Tensor] | None:
        entry = self._made.get(id(value)) if isinstance(value, Tensor) else None
        if entry is None or entry[0]() is not value:
            return None
        source = entry[2]()
        return None if source is None else (entry[1], source)

    def _source(self, value: Tensor) -> Tensor:
        made = self._of(value)
        return value if made is None else made[1]

    def _is(self, value: Any, kind: str, source: Any) -> bool:
        made = self._of(value)
        return made is not None and made[0] == kind and made[1] is source

    def _meets(self, bent: Any, plain: Any, *kinds: str) -> bool:
        """Tell whether a bent value stands beside its source, which may have been scaled."""
        made, other = self._of(bent), self._of(plain)
        if made is None or made[0] not in kinds or not isinstance(plain, Tensor):
            return False
        return made[1] is plain or (other is not None and other[0] == "straight" and other[1] is made[1])

    def _product(self, args: tuple[Any, ...]) -> bool:
        return any(self._meets(*pair, "sign", *_BENT) for pair in (args[:2], args[1::-1]))

    def _quotient(self, args: tuple[Any, ...]) -> bool:
        above, below = self._of(args[0]), self._of(args[1])
        if above is not None and below is not None and above[0] in _BENT and below[0] in _BENT:
            return above[1] is below[1]  # as a hyperbolic tangent of exponentials
        return self._meets(args[1], args[0], "abs", *_BENT) or self._product(args)

    def _difference(self, args: tuple[Any, ...]) -> bool:
        return self._meets(args[1], args[0], *_BENT)

    def _sum(self, args: tuple[Any, ...]) -> bool:
        return any(self._meets(*pair, "abs") for pair in (args[:2], args[1::-1]))

    def _choice(self, args: tuple[Any, ...]) -> bool:
        return any(self._is(args[0], "sign", branch) or self._bends_from(args[0], branch) for branch in args[1:])

    def _bends_from(self, sign: Any, branch: Any) -> bool:
        made = self._of(branch)
        return made is not None and made[0] in _BENT and self._is(sign, "sign", made[1])

    def _larger(self, args: tuple[Any, ...]) -> bool:
        """The larger of a value and itself times a slope is a leaky ReLU."""
        return any(self._is(scaled, "straight", plain) for scaled, plain in (args[:2], args[1::-1]))

    def _softplus(self, args: tuple[Any, ...]) -> bool:
        return self._has_kind(args[0], "exponential")

    def _of_raised(self, args: tuple[Any, ...]) -> bool:
        """As 1 / (1 + exp(-x)), or log(1 + exp(x))."""
        return self._has_kind(args[0], "raised")

    def _has_kind(self, value: Any, kind: str) -> bool:
        made = self._of(value)
        return made is not None and made[0] == kind

    def _fill(self, args: tuple[Any, ...]) -> bool:
        return self._is(args[1], "sign", args[0]) and _is_zero(args[2])

    def _put(self, args: tuple[Any, ...]) -> bool:
        return len(args[1]) == 1 and self._is(args[1][0], "sign", args[0]) and _is_zero(args[2])

    def _bound(self, args: tuple[Any, ...]) -> bool:
        return any(map(_is_zero, args[:2]))


_BENT = ("curve", "exponential", "raised")
_KINDS = ("straight", "sign", "abs", *_BENT)

_COMPLETES = {
    "mul": Suspects._product,
    "mul_": Suspects._product,
    "div": Suspects._quotient,
    "sub": Suspects._difference,
    "add": Suspects._sum,
    "add_": Suspects._sum,
    "where": Suspects._choice,
    "masked_fill": Suspects._fill,
    "masked_fill_": Suspects._fill,
    "index_put": Suspects._put,
    "index_put_": Suspects._put,
    "fmax": Suspects._bound,
    "maximum": Suspects._larger,
    "logaddexp": Suspects._bound,
    "log1p": Suspects._softplus,
    "log": Suspects._of_raised,
    "reciprocal": Suspects._of_raised,
}

MAY_BE = {
    "sin": "a sine", "cos": "a cosine", "atan": "an arctangent", "sign": "a sign", "heaviside": "a step",
}  # fmt: skip
"""Operators that may be the activation of a layer, by name alone."""

NAMES = frozenset((*_COMPARES, "abs", *_CURVES, *_COMPLETES, *_KEEPS, *_SCALES, *MAY_BE))
"""Operators that are looked at; no other can be part of an activation written out by hand."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not bool(value)
    return isinstance(value, (int, float)) and value == 0
